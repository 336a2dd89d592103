"""Computes ids and spans of many texts at once, with copies of a tokenizer's Rust part.

One copy lacks the post-processor, which may trim blanks from token spans and has no other effect
here. A second one, for texts with guarded control tokens, knows control tokens not by their names
but by aliases that no text can contain: those of a template are replaced by their aliases and
matched as before, those of a user are ordinary text.
"""

import functools
import json
import re
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from drlora_jax.data.segments import (
    GUARD,
    Segment,
    control_pattern,
    control_tokens,
    unguard,
)
from drlora_jax.system.imports import load_package

_FIRST_ALIAS = 0xF0000  # a private-use character between two guards, which user text never has
_kept: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class Encoded(NamedTuple):
    """The tokens of one document, with spans that count in the same unit as the borders."""

    ids: list[int]
    starts: np.ndarray  # int [n]
    ends: np.ndarray  # int [n]
    borders: np.ndarray  # int [segments + 1]: where each segment begins, and the last one ends


def encode_texts(documents: Sequence[Sequence[Segment]], tokenizer) -> list[Encoded]:
    """Tokenises each document as one text, without BOS and EOS tokens around it."""
    if not getattr(tokenizer, "is_fast", False):
        return [_encode_apart(segments, tokenizer) for segments in documents]
    backend = _backend(tokenizer)
    has_guard = [any(GUARD in segment.text for segment in segments) for segments in documents]
    encoded: list = [None] * len(documents)
    for guarded in (False, True):
        places = [place for place, has in enumerate(has_guard) if has == guarded]
        if not places:
            continue
        if guarded and not backend.guarded.is_exact:
            found = [_encode_apart(documents[place], tokenizer) for place in places]
        else:
            source = backend.guarded if guarded else backend.plain
            found = source.encode([[s.text for s in documents[place]] for place in places])
        for place, each in zip(places, found, strict=True):
            encoded[place] = each
    return encoded


class _Plain:
    """The tokenizer without its post-processor."""

    def __init__(self, values: str):
        self.core = load_package("tokenizers", "Tokenising").Tokenizer.from_str(values)
        self.core.no_truncation()
        self.core.no_padding()
        self.core.post_processor = None

    def encode(self, documents: Sequence[Sequence[str]]) -> list[Encoded]:
        texts = ["".join(texts) for texts in documents]
        encodings = self.core.encode_batch(texts, add_special_tokens=False)
        return [_encoded(*pair) for pair in zip(encodings, documents, strict=True)]


class _Guarded:
    """The tokenizer with aliases for its control tokens."""

    def __init__(self, tokenizer, plain: _Plain):
        added = tokenizer.added_tokens_decoder
        controls = control_tokens(tokenizer)
        names = {token.content for token in controls.values()}
        self.pattern = control_pattern(tokenizer)
        self._aliases = {
            name: f"{GUARD}{chr(_FIRST_ALIAS + place)}{GUARD}"
            for place, name in enumerate(sorted(names))
        }
        self._plain = _Plain(_without_controls(tokenizer.backend_tokenizer.to_str(), names))
        core = self._plain.core
        tokens = load_package("tokenizers", "Tokenising")
        core.add_tokens(
            [
                tokens.AddedToken(
                    self._aliases[token.content],
                    special=False,
                    single_word=token.single_word,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    normalized=token.normalized,
                )
                for token in controls.values()
            ]
        )
        known = {self._aliases.get(token.content, token.content): i for i, token in added.items()}
        ids = {core.token_to_id(text): index for text, index in known.items()}
        self._ids = {new: old for new, old in ids.items() if new is not None and new != old}
        self.is_exact = self._equals(plain, sorted(names))

    def encode(self, documents: Sequence[Sequence[str]]) -> list[Encoded]:
        replaced = [[self._replace(text) for text in texts] for texts in documents]
        found = self._plain.encode(replaced)
        return [each._replace(ids=[self._ids.get(i, i) for i in each.ids]) for each in found]

    def _replace(self, text: str) -> str:
        # Split first: the aliases contain guards themselves.
        ordinary = self.pattern.split(text)
        controls = [self._aliases[name] for name in self.pattern.findall(text)] + [""]
        return "".join(
            piece for pair in zip(map(unguard, ordinary), controls, strict=True) for piece in pair
        )

    def _equals(self, plain: _Plain, names: list[str]) -> bool:
        """Returns whether a template's control tokens get the same ids with aliases as without."""
        texts = [f"Tom {name} has{name}{name}  3\n{name}\n a" for name in names]
        pairs = zip(plain.encode([texts]), self.encode([texts]), strict=True)
        return all(a.ids == b.ids for a, b in pairs)


class _Backend:
    def __init__(self, tokenizer):
        self.size = len(tokenizer)
        self.plain = _Plain(tokenizer.backend_tokenizer.to_str())
        self._tokenizer = weakref.ref(tokenizer)

    @functools.cached_property
    def guarded(self) -> _Guarded:
        return _Guarded(self._tokenizer(), self.plain)


def _backend(tokenizer) -> _Backend:
    kept = _kept.get(tokenizer)
    if kept is None or kept.size != len(tokenizer):  # tokens have been added
        kept = _kept[tokenizer] = _Backend(tokenizer)
    return kept


def _without_controls(values: str, names: set[str]) -> str:
    """Returns the text of tokenizer.json without control tokens, both as added tokens and as words
    of the model.

    A BPE model only produces what its merges produce; others match any text in the vocabulary.
    """
    parsed = json.loads(values)
    parsed["added_tokens"] = [t for t in parsed["added_tokens"] if t["content"] not in names]
    model = parsed["model"]
    hidden = names - {model.get("unk_token")}
    if model["type"] == "Unigram":
        model["vocab"] = [[_hide(t, hidden), score] for t, score in model["vocab"]]
    elif model["type"] != "BPE":
        model["vocab"] = {_hide(t, hidden): index for t, index in model["vocab"].items()}
    return json.dumps(parsed)


def _hide(token: str, names: set[str]) -> str:
    return f"{GUARD}{GUARD}{token}" if token in names else token


def _encoded(encoding, texts: Sequence[str]) -> Encoded:
    spans = np.array(encoding.offsets, int).reshape(-1, 2)
    borders = np.cumsum([0, *map(len, texts)])
    return Encoded(list(encoding.ids), spans[:, 0], spans[:, 1], borders)


def _encode_apart(segments: Sequence[Segment], tokenizer) -> Encoded:
    """Encodes segment by segment with a tokenizer that has no spans; ids at the borders may differ
    a little.
    """
    pieces = [_ids_apart(segment.text, tokenizer) for segment in segments]
    ids = [index for piece in pieces for index in piece]
    places = np.arange(len(ids))  # spans in tokens
    return Encoded(ids, places, places + 1, np.cumsum([0, *map(len, pieces)]))


def _ids_apart(text: str, tokenizer) -> list[int]:
    def ids(piece: str, **options) -> list[int]:
        return list(tokenizer(piece, add_special_tokens=False, verbose=False, **options).input_ids)

    if GUARD not in text:
        return ids(text)
    pattern = control_pattern(tokenizer)
    found, at = [], 0
    for match in [*pattern.finditer(text), re.search(r"\Z", text)]:
        ordinary = unguard(text[at : match.start()])
        found += ids(ordinary, split_special_tokens=True) if ordinary else []
        found += [tokenizer.convert_tokens_to_ids(match[0])] if match[0] else []
        at = match.end()
    return found
