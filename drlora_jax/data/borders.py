"""Gives the tokens before an answer the ids that the prompt has when it is tokenised alone.

A document is tokenised as one text. The answer can change the prompt's last tokens: a token may
contain characters of both (a line break that ends the prompt and one that begins the answer), and
splitters look ahead (two line breaks are one piece at the end of a text and two before a letter).
At generation time the model would then see ids different from those of training. So the ids before
an answer are those of the prompt alone, and the rest of a token across the border is tokenised by
the tokenizer's own model. All other tokens are those of the whole text.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from drlora_jax.data.backends import Encoded, encode_texts
from drlora_jax.data.segments import Segment, control_pattern


class _Border(NamedTuple):
    """The start of an answer, and the prompt's text that determines the tokens before it."""

    document: int
    segment: int  # the answer's number
    section: str  # from the last control token on, since these split texts; else the whole prompt
    control: str  # that token, or ""
    has_answers: bool  # whether the section contains earlier answers


def cut_at_borders(
    encoded: Sequence[Encoded], documents: Sequence[Sequence[Segment]], tokenizer
) -> list[Encoded]:
    """Returns the documents with the prompts' ids as they are when tokenised alone, wherever that
    is possible: the words of the vocabulary must join to the same text in both, and decode to the
    same.
    """
    encoded = list(encoded)
    if not getattr(tokenizer, "is_fast", False):
        return encoded
    borders = [
        border
        for number, segments in enumerate(documents)
        for border in _borders(number, segments, tokenizer)
        # Without a control token behind the last answer the section is the whole text: it is
        # tokenised only if a token is cut, to stay linear in the number of turns.
        if not border.has_answers or _is_cut(encoded[number], border)
    ]
    sections = encode_texts([[Segment(each.section, False)] for each in borders], tokenizer)
    for border, section in zip(borders, sections, strict=True):
        whole = encoded[border.document]
        encoded[border.document] = _cut(whole, section, border, tokenizer) or whole
    return encoded


def _borders(document: int, segments: Sequence[Segment], tokenizer):
    pattern, text, last_answer = control_pattern(tokenizer), "", 0
    for number, segment in enumerate(segments):
        if segment.is_response and segment.text and text and not segments[number - 1].is_response:
            found = list(pattern.finditer(text))
            start = found[-1].start() if found else 0
            control = found[-1][0] if found else ""
            yield _Border(document, number, text[start:], control, start < last_answer)
        text += segment.text
        last_answer = len(text) if segment.is_response else last_answer


def _cut(encoded: Encoded, section: Encoded, border: _Border, tokenizer) -> Encoded | None:
    """Returns the document with the section's own tokens; None if it has them already, or cannot
    have them.
    """
    inside = _tokens_before(encoded, border)
    first = 0
    if border.control:
        index = tokenizer.convert_tokens_to_ids(border.control)
        first = max((i for i in range(inside) if encoded.ids[i] == index), default=0)
    if encoded.ids[first:inside] == section.ids and not _is_cut(encoded, border):
        return None
    words, own = (
        tokenizer.convert_ids_to_tokens(ids) for ids in (encoded.ids[first:], section.ids)
    )
    ends, own_ends = _ends(words), _ends(own)
    text, size = "".join(words), own_ends[-1]
    behind = int(np.searchsorted(ends, size))  # the token in which the section ends
    if behind >= len(words) or not text.startswith("".join(own)):
        return None
    left = text[size : ends[behind]]
    rest = [token.id for token in tokenizer.backend_tokenizer.model.tokenize(left)] if left else []
    if "".join(tokenizer.convert_ids_to_tokens(rest)) != left:
        return None
    if not _is_same_text(tokenizer, encoded.ids[first : first + behind + 1], section.ids + rest):
        return None
    # Earlier answers stay as they are: only tokens behind the last common end are replaced.
    shared = max(set(ends[:behind]) & set(own_ends), default=0) if border.has_answers else 0
    kept = first + (ends.index(shared) + 1 if shared else 0)
    taken = own_ends.index(shared) + 1 if shared else 0
    return _spliced(encoded, border.segment, kept, section.ids[taken:], rest, first + behind)


def _tokens_before(encoded: Encoded, border: _Border) -> int:
    """Returns how many tokens end before the answer or where it starts."""
    return int(np.searchsorted(encoded.ends, encoded.borders[border.segment], side="right"))


def _is_cut(encoded: Encoded, border: _Border) -> bool:
    """Returns whether a token crosses the start of the answer."""
    token = _tokens_before(encoded, border)
    is_there = token < len(encoded.ids)
    return is_there and encoded.starts[token] < encoded.borders[border.segment]


def _is_same_text(tokenizer, before: list[int], after: list[int]) -> bool:
    """Returns whether both ids decode to the same text: some tokenizers spell the start of a word
    differently (WordPiece).
    """
    decode = tokenizer.backend_tokenizer.decode
    texts = [decode(ids, skip_special_tokens=False) for ids in (before, after)]
    return texts[0] == texts[1]


def _ends(words: Sequence[str]) -> list[int]:
    return np.cumsum([len(word) for word in words]).tolist()


def _spliced(
    encoded: Encoded, segment: int, kept: int, prompt: list[int], rest: list[int], behind: int
) -> Encoded:
    """Joins the first tokens, those of the prompt, those of the answer's start, and all that
    follow.
    """
    start, place = int(encoded.borders[segment - 1]), int(encoded.borders[segment])
    stop = int(encoded.ends[behind])
    spans = [(start, place)] * len(prompt) + [(place, stop)] * len(rest)
    starts, ends = np.array(spans, int).reshape(-1, 2).T
    return encoded._replace(
        ids=[*encoded.ids[:kept], *prompt, *rest, *encoded.ids[behind + 1 :]],
        starts=np.concatenate([encoded.starts[:kept], starts, encoded.starts[behind + 1 :]]),
        ends=np.concatenate([encoded.ends[:kept], ends, encoded.ends[behind + 1 :]]),
    )
