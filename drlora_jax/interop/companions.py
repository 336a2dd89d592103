"""Writes the files next to the weights of an exported model: those that describe it or its
tokenizer, with `config.json` and `generation_config.json` adapted to the export.

A base model's directory may contain other files: adapters, training states, indexes of weights in
other formats, code. Readers of the export would treat them as parts of it (transformers loads an
adapter wherever adapter_config.json is), so they are left out and named in a note.
"""

import json
import pathlib
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from drlora_jax.system.paths import read_json

CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "tokenizer.model.v1",
    "tokenizer.model.v2",
    "tokenizer.model.v3",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tiktoken.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
)
TEMPLATES = "additional_chat_templates"  # a folder of NAME.jinja
LICENSES = re.compile(r"(LICEN[SC]E|NOTICE|COPYING|USE_POLICY)([-_.].*)?", re.IGNORECASE)
WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|gguf|h5|msgpack|onnx|npz)|model\.safetensors\.index\.json"
)
SHOWN = 12  # names in the note of files that were left out
# Values of config.json, where transformers 4 kept them; used if there is no generation_config.json.
GENERATION_VALUES = (
    "bos_token_id",
    "pad_token_id",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "num_beams",
    "max_length",
    "min_length",
)


def write_companions(
    source: pathlib.Path,
    target: pathlib.Path,
    *,
    has_head: bool,
    dtype: str | None = None,
    end_token_ids: Sequence[int] = (),
) -> list[str]:
    """Writes the known files of `source` to `target`; returns remarks on them.

    Args:
      has_head: whether the exported tensors include an output head.
      dtype: the dtype of all exported tensors; None: as in `source`.
      end_token_ids: tokens that answers learned to end with, the tokenizer's own first.
    """
    for name in _companions(source):
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target / name)
    config = read_json(source / CONFIG)
    values, notes = make_config(config, has_head=has_head, dtype=dtype, ends=end_token_ids)
    _write_json(target / CONFIG, values)
    notes += _write_generation(source, target, config, end_token_ids)
    left_out = _left_out(source)
    if left_out:
        more = f" and {len(left_out) - SHOWN} more" if len(left_out) > SHOWN else ""
        notes.append(f"left out: {', '.join(left_out[:SHOWN])}{more} (not part of the model)")
    return notes


def set_tokenizer(target: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Replaces settings in the tokenizer files of an export.

    A chat template there replaces all templates in separate files.
    """
    if not settings:
        return
    file = target / "tokenizer_config.json"
    values = (read_json(file) if file.is_file() else {}) | dict(settings)
    if "chat_template" in settings:
        for name in ("chat_template.jinja", "chat_template.json"):
            (target / name).unlink(missing_ok=True)
        shutil.rmtree(target / TEMPLATES, ignore_errors=True)
        template = values.pop("chat_template")
        if isinstance(template, dict):
            template = [{"name": name, "template": text} for name, text in template.items()]
        values |= {} if template is None else {"chat_template": template}
    _write_json(file, values)
    tokens = target / "special_tokens_map.json"
    if "eos_token" in settings and tokens.is_file():
        _write_json(tokens, read_json(tokens) | {"eos_token": settings["eos_token"]})


def _companions(source: pathlib.Path) -> list[str]:
    """Names the regular files of `source` that are copied."""
    licenses = [name for name in _names(source) if LICENSES.fullmatch(name)]
    folder = source / TEMPLATES
    templates = [f"{TEMPLATES}/{name}" for name in _names(folder) if _is_template(name)]
    every = (*TOKENIZER_FILES, *licenses, *templates)
    return [name for name in every if (source / name).is_file()]


def _is_template(name: str) -> bool:
    return name.endswith(".jinja") and not name.startswith(".")


def _names(folder: pathlib.Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


def _left_out(source: pathlib.Path) -> list[str]:
    """Returns the names that are neither written nor weights; folders end in a slash."""
    written = {CONFIG, GENERATION, *_companions(source)}
    found = []
    for name in _names(source):
        if name in written or WEIGHTS.fullmatch(name):
            continue
        if not (source / name).is_dir():
            found.append(name)
        elif name != TEMPLATES:
            found.append(f"{name}/")
        else:
            others = (f"{TEMPLATES}/{other}" for other in _names(source / name))
            found += [other for other in others if other not in written]
    return found


# ----------------------------------------------------------- config.json and generation_config.json


def make_config(
    config: dict, *, has_head: bool, dtype: str | None, ends: Sequence[int]
) -> tuple[dict, list[str]]:
    """Returns the values of `config.json` for the exported tensors, and remarks on what changed."""
    values, notes = dict(config), []
    nested = values.get("text_config")
    parts = [values]
    if isinstance(nested, dict):
        values["text_config"] = dict(nested)
        parts.append(values["text_config"])
    for part in parts:
        # transformers 5 reads `dtype`, older versions and other programs `torch_dtype`.
        kind = part.get("dtype") or part.get("torch_dtype")
        kind = dtype if dtype and (kind or part is values) else kind
        part |= {"dtype": kind, "torch_dtype": kind} if kind else {}
    is_tied = not has_head
    if bool(values.get("tie_word_embeddings", False)) != is_tied:
        there = "has an" if has_head else "has no"
        notes.append(
            f"config.json: tie_word_embeddings={str(is_tied).lower()}, because the model {there} "
            "output head (lm_head.weight)"
        )
        values["tie_word_embeddings"] = is_tied
    for part in parts[1:]:
        if "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = is_tied
    notes += _add_ends(values, ends, CONFIG)
    if values.pop("auto_map", None):
        notes.append("config.json: auto_map is left out, as is the code that it names")
    return values, notes


def _write_generation(
    source: pathlib.Path, target: pathlib.Path, config: dict, ends: Sequence[int]
) -> list[str]:
    file = source / GENERATION
    if file.is_file():
        values = read_json(file)
        notes = _add_ends(values, ends, GENERATION)
        if notes:
            _write_json(target / GENERATION, values)
        else:
            shutil.copyfile(file, target / GENERATION)
        return notes
    values = {key: config[key] for key in GENERATION_VALUES if config.get(key) is not None}
    values["eos_token_id"] = config.get("eos_token_id")
    _add_ends(values, ends, GENERATION)
    if values["eos_token_id"] is None:
        return []  # no end token, as in the base model
    _write_json(target / GENERATION, values)
    return []


def _add_ends(values: dict, ends: Sequence[int], name: str) -> list[str]:
    """Adds the missing ends to `eos_token_id`; returns a remark if something changed."""
    found = values.get("eos_token_id")
    here = [] if found is None else list(found) if isinstance(found, list) else [found]
    missing = [end for end in _unique(ends) if end not in here]
    if not missing:
        return []
    every = [*here, *missing]
    values["eos_token_id"] = every if len(every) > 1 else every[0]
    return [f"{name}: eos_token_id={values['eos_token_id']}, was {json.dumps(found)}"]


def _unique(ends: Iterable[int]) -> list[int]:
    return list(dict.fromkeys(int(end) for end in ends))


def _write_json(file: pathlib.Path, values: dict) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
