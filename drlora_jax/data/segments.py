"""Represents the text of a document between its row and its token ids; guards the user's text.

A rendering is a list of segments; their concatenation is the document's text. Inside a segment,
control tokens (`<|endoftext|>`, `<|im_end|>`, ...) in the *user's* text are guarded: a noncharacter
behind their first character keeps them from being matched, so whatever still matches was written by
the template. `encode_document` removes the guards and tokenises guarded literals as ordinary text.
"""

import re
import weakref
from typing import NamedTuple

GUARD = "\ufdd0"  # a Unicode noncharacter: never part of interchanged text
_patterns: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


class Segment(NamedTuple):
    text: str
    is_response: bool  # whether it is learned


class Written(NamedTuple):
    """One document as text."""

    segments: list[Segment]
    is_ended: bool  # whether the template ended the last answer with its own control token


class BadRow(ValueError):
    """A row that cannot be used: a short reason for counting, and a message for the user."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def control_tokens(tokenizer) -> dict:
    """Returns added tokens by id: those marked special, and those that end, begin or pad a text
    although their file does not mark them.
    """
    roles = set(tokenizer.all_special_tokens)
    added = tokenizer.added_tokens_decoder.items()
    return {index: token for index, token in added if token.special or token.content in roles}


def control_pattern(tokenizer) -> re.Pattern:
    """Matches the tokenizer's control tokens, the longest first, unless they are guarded."""
    if tokenizer not in _patterns:
        tokens = {token.content for token in control_tokens(tokenizer).values()}
        texts = sorted(filter(None, tokens), key=len, reverse=True)
        one_of = "|".join(map(re.escape, texts)) or "(?!)"
        _patterns[tokenizer] = re.compile(f"(?:{one_of})(?!{GUARD})")
    return _patterns[tokenizer]


def guard(text: str, tokenizer) -> str:
    """Returns the user's text with every control token in it guarded.

    Raises:
      BadRow: if the text contains the guard character itself.
    """
    if GUARD in text:
        raise BadRow("invalid text", f"the text has the noncharacter U+{ord(GUARD):04X}; remove it")
    pattern = control_pattern(tokenizer)
    while pattern.search(text):  # repeated: a control token may contain another one
        text = pattern.sub(lambda match: match[0][0] + GUARD + match[0][1:], text)
    return text


def unguard(text: str) -> str:
    return text.replace(GUARD, "")


def plain_text(segments: list[Segment]) -> str:
    """Returns the document's readable text, without guards."""
    return unguard("".join(segment.text for segment in segments))
