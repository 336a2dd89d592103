"""Identifies a tokenizer by digests that a run stores and later uses compare.

`vocabulary` and `normalizer` come from tokenizer.json as the installed `tokenizers` writes it, so
layout and order do not count; another version of that package may still write more options. `probe`
covers the behaviour: if only `normalizer` differs and `probe` is equal, no visible behaviour has
changed. `template` and `ends` can change while ids stay the same.
"""

import hashlib
import json
import pathlib
from typing import NamedTuple

from drlora_jax.data.tokenizer_files import TOKENIZER_FILE, end_token_ids
from drlora_jax.data.tokenizer_probe import decoded, probe_texts
from drlora_jax.system.imports import load_package

_PIPELINE = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_FLAGS = ("special", "single_word", "lstrip", "rstrip", "normalized")
_MOST_ADDED = 100  # every number of tokens up to this one is tried


class Added(NamedTuple):
    """Control tokens that were added to a tokenizer since its identity was taken."""

    tokens: dict[int, str]
    ends_are_same: bool  # except for a padding token among the new ones
    pad_token: str | None  # the earlier one, if `ends_are_same`


def tokenizer_identity(tokenizer, directory: str | pathlib.Path) -> dict[str, str]:
    """Returns sha256 digests by name: vocabulary, normalizer, probe, template, ends.

    Args:
      tokenizer: from `load_tokenizer`.
      directory: the model directory, for tokenizer.json and the end tokens that its files name.
    """
    directory = pathlib.Path(directory)
    pipeline, vocabulary = _described(tokenizer, directory / TOKENIZER_FILE)
    return {
        "vocabulary": _digest(vocabulary),
        "normalizer": _digest(pipeline),
        "probe": _digest(_behaviour(tokenizer, tokenizer.added_tokens_decoder)),
        "template": template_identity(getattr(tokenizer, "chat_template", None)),
        "ends": _ends(tokenizer, tokenizer.pad_token_id, end_token_ids(tokenizer, directory)),
    }


def added_since(tokenizer, directory: str | pathlib.Path, before: dict[str, str]) -> Added | None:
    """Returns the control tokens added since an identity was taken; None if anything else has
    changed.

    Only control tokens may be added: an added word would change the ids of texts that contain it.
    """
    directory = pathlib.Path(directory)
    pipeline, vocabulary = _described(tokenizer, directory / TOKENIZER_FILE)
    if len(vocabulary) != 4 or _digest(pipeline) != before["normalizer"]:
        return None
    now = tokenizer.added_tokens_decoder
    last_first = []
    for index in sorted((each[0] for part in vocabulary[2:] for each in part), reverse=True):
        if index < len(vocabulary[0]) or index not in now or not now[index].special:
            break
        last_first.append(index)
    new = _new_ids(vocabulary, last_first, before["vocabulary"])
    old = {index: token for index, token in now.items() if index not in new}
    if not new or _digest(_behaviour(tokenizer, old)) != before["probe"]:
        return None
    tokens = {index: now[index].content for index in sorted(new)}
    return Added(tokens, *_padding(tokenizer, directory, before["ends"], old))


def _new_ids(vocabulary: list, last_first: list[int], before: str) -> set[int]:
    """Returns the last ids of a vocabulary that have to go for it to have the digest `before`;
    empty if none do.
    """
    start = hashlib.sha256(json.dumps(vocabulary[:2], sort_keys=True)[:-1].encode())
    for count in range(1, min(len(last_first), _MOST_ADDED) + 1):
        new = set(last_first[:count])
        digest = start.copy()  # hashing words and merges of a large vocabulary takes a second
        for part in vocabulary[2:]:
            kept = [each for each in part if each[0] not in new]
            digest.update(f", {json.dumps(kept, sort_keys=True)}".encode())
        digest.update(b"]")
        if digest.hexdigest() == before:
            return new
    return set()


def _padding(tokenizer, directory: pathlib.Path, ends: str, old: dict) -> tuple[bool, str | None]:
    """Returns whether a tokenizer with some padding token has the ends of an identity, and that
    token.
    """
    last = end_token_ids(tokenizer, directory)
    for index in (tokenizer.pad_token_id, None, *old):
        if _ends(tokenizer, index, last) == ends:
            return True, None if index is None else tokenizer.convert_ids_to_tokens(index)
    return False, None


def _ends(tokenizer, pad_id: int | None, end_ids: tuple[int, ...]) -> str:
    return _digest([(tokenizer.bos_token_id, tokenizer.eos_token_id, pad_id), end_ids])


def template_identity(template: str | dict | None) -> str:
    """Returns the sha256 of a chat template; that of None says that there is none."""
    return _digest(template)


def _described(tokenizer, file: pathlib.Path) -> tuple[object, object]:
    """Returns the pipeline and the vocabulary as JSON values."""
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
    # Without options that are off, which not all versions write.
    pipeline["model"] = {name: value for name, value in model.items() if value}
    return pipeline, [words, merges, added, more]


def _added(tokenizer) -> list:
    return sorted((i, str(t), t.special) for i, t in tokenizer.added_tokens_decoder.items())


def _behaviour(tokenizer, added: dict) -> list:
    texts = probe_texts(added)
    plain = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    around = tokenizer(texts, add_special_tokens=True, verbose=False)["input_ids"]
    ids = [list(map(int, each)) for each in (*plain, *around)]
    texts = [[decoded(tokenizer, each, skip=skip) for skip in (False, True)] for each in ids]
    return [ids, texts]


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
