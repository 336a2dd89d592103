"""Explains tensor names that are not those of a model because a wrapper changed all of them."""

from collections.abc import Collection

_EMBEDDING, _HEAD = "embed_tokens.weight", "lm_head.weight"
# Parts that wrappers insert into names -> the wrapper, and how to save the model without it.
_WRAPPERS = {
    "base_model.model.": ("PEFT", "save model.merge_and_unload()"),
    "base_layer.": ("PEFT", "save model.merge_and_unload()"),
    "_orig_mod.": ("torch.compile", "save model._orig_mod"),
    "module.": ("DataParallel or DDP of torch", "save model.module"),
    "_fsdp_wrapped_module.": ("FSDP of torch", "save its full state dict"),
    "_checkpoint_wrapped_module.": ("activation checkpointing", "save the model under it"),
    "language_model.": ("a model of text and images", "save its language_model alone"),
    "pretrained_model.": ("a value head of TRL", "save model.pretrained_model"),
}


def explain_names(expected: Collection[str], found: Collection[str]) -> str:
    """Explains what all names have in common, or returns "" if that explains little."""
    expected, found = set(expected), set(found)
    parts = [part for part in _WRAPPERS if any(f".{part}" in f".{name}" for name in found)]
    bare = {_without(name, parts): name for name in found}
    prefix = _prefix(bare)
    if prefix not in ("model.", None):
        bare = {_renamed(name, prefix): whole for name, whole in bare.items()}
    missing = expected - found
    if len(expected - bare.keys()) > len(missing) // 2:
        return _about_head(missing)
    sentences = [_about_wrapper(part, found) for part in parts]
    if prefix not in ("model.", None) and _shared(prefix, found):
        sentences.append(
            f" Names begin with {_shared(prefix, found)!r}, probably because the model was saved "
            "as a part of another module; save that part alone, or rename its tensors."
        )
    elif prefix not in ("model.", None):
        start = f"begin with {prefix!r}" if prefix else "do not begin with 'model.'"
        sentences.append(
            f" Names {start}, probably because the model was saved without its head; save it as "
            "AutoModelForCausalLM, or rename its tensors."
        )
    return "".join(sentences) + _about_head(expected - bare.keys())


def _without(name: str, parts: Collection[str]) -> str:
    dotted = f".{name}"
    for part in parts:
        dotted = dotted.replace(f".{part}", ".")
    return dotted[1:]


def _prefix(names: Collection[str]) -> str | None:
    """Returns the prefix of the embedding's name, which every family has."""
    place = next((name for name in names if f".{name}".endswith(f".{_EMBEDDING}")), None)
    return None if place is None else place.removesuffix(_EMBEDDING)


def _shared(prefix: str, found: Collection[str]) -> str:
    """Returns the prefix that some other wrapper put before every tensor, the head included; "" if
    none did.
    """
    outer = prefix.removesuffix("model.")
    is_whole = outer != prefix and all(name.startswith(outer) for name in found)
    return outer if is_whole and any(name == f"{outer}{_HEAD}" for name in found) else ""


def _renamed(name: str, prefix: str) -> str:
    if name.endswith(_HEAD):
        return _HEAD
    return f"model.{name.removeprefix(prefix)}" if name.startswith(prefix) else name


def _about_wrapper(part: str, found: Collection[str]) -> str:
    what, way = _WRAPPERS[part]
    place = "begin with" if all(name.startswith(part) for name in found) else "contain"
    return f" Names {place} {part!r}: {what} wrapped the saved model; {way}, or rename the tensors."


def _about_head(missing: Collection[str]) -> str:
    if set(missing) != {_HEAD}:
        return ""
    return (
        f" Only {_HEAD} is missing: set tie_word_embeddings to true in config.json if the model's "
        "head is its embedding, else save the model with its head (AutoModelForCausalLM)."
    )
