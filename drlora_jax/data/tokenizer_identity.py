"""What a tokenizer means, as digests that a run stores and a later use compares.

`vocabulary` and `normalizer` come from tokenizer.json as the installed `tokenizers` writes it, so
layout and order do not count; another version of that package may still write more options. `probe`
is what the tokenizer does: where only `normalizer` differs and `probe` is the same, nothing changed
that shows. `template` and `ends` can change while ids stay.
"""

import hashlib
import json
import pathlib

from drlora_jax.data.packages import load_package
from drlora_jax.data.tokenizer_files import TOKENIZER_FILE, end_token_ids
from drlora_jax.data.tokenizer_probe import decoded, probe_texts

_PIPELINE = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_FLAGS = ("special", "single_word", "lstrip", "rstrip", "normalized")


def tokenizer_identity(tokenizer, directory: str | pathlib.Path) -> dict[str, str]:
    """Digests (sha256) by name: vocabulary, normalizer, probe, template, ends.

    Args:
      tokenizer: of `load_tokenizer`.
      directory: of the model, for tokenizer.json and the end tokens that its files name.
    """
    directory = pathlib.Path(directory)
    pipeline, vocabulary = _described(tokenizer, directory / TOKENIZER_FILE)
    start_and_padding = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return {
        "vocabulary": _digest(vocabulary),
        "normalizer": _digest(pipeline),
        "probe": _digest(_behaviour(tokenizer)),
        "template": template_identity(getattr(tokenizer, "chat_template", None)),
        "ends": _digest([start_and_padding, end_token_ids(tokenizer, directory)]),
    }


def template_identity(template: str | dict | None) -> str:
    """sha256 of a chat template; that of None says that there is none."""
    return _digest(template)


def _described(tokenizer, file: pathlib.Path) -> tuple[object, object]:
    """The pipeline and the vocabulary, as values that JSON can hold."""
    if file.is_file():
        text = load_package("tokenizers", "Tokenising").Tokenizer.from_file(str(file)).to_str()
    elif getattr(tokenizer, "is_fast", False):
        text = tokenizer.backend_tokenizer.to_str()
    else:
        return type(tokenizer).__name__, [sorted(tokenizer.get_vocab().items()), _added(tokenizer)]
    values = json.loads(text)
    model = values["model"]
    merges = [m.split(" ") if isinstance(m, str) else m for m in model.pop("merges", [])]
    words = model.pop("vocab")
    if isinstance(words, dict):
        words = sorted(words.items(), key=lambda item: item[1])
    added = [[t["id"], t["content"], *(t[name] for name in _FLAGS)] for t in values["added_tokens"]]
    ids = {*(t[0] for t in added), *range(len(words))}
    more = sorted(item[::-1] for item in tokenizer.get_vocab().items() if item[1] not in ids)
    pipeline = {name: values[name] for name in _PIPELINE}
    # Options that are off: not all versions write them.
    pipeline["model"] = {name: value for name, value in model.items() if value}
    return pipeline, [words, merges, added, more]


def _added(tokenizer) -> list:
    return sorted((i, str(t), t.special) for i, t in tokenizer.added_tokens_decoder.items())


def _behaviour(tokenizer) -> list:
    texts = probe_texts(tokenizer.added_tokens_decoder)
    plain = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    around = tokenizer(texts, add_special_tokens=True, verbose=False)["input_ids"]
    ids = [list(map(int, each)) for each in (*plain, *around)]
    texts = [[decoded(tokenizer, each, skip=skip) for skip in (False, True)] for each in ids]
    return [ids, texts]


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
