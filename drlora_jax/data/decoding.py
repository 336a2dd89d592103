"""Decodes the text that new tokens add behind a prompt.

Decoders treat the start of a text specially (a first blank is stripped, `##` stays), and a
character may end in a later token, so new tokens are decoded together with the prompt's last ones.
"""

import os
from collections.abc import Sequence

from drlora_jax.data.tokenizer_probe import decoded

_SHORTEST_TAIL = 8  # tokens
_HALF = "\ufffd"  # written by decoders for bytes that are no character (yet)


def decode_after(tokenizer, prompt_ids: Sequence[int], new_ids: Sequence[int]) -> str:
    """Decodes `new_ids` behind a prompt, without special tokens; U+FFFD stands for incomplete
    characters.

    Args:
      prompt_ids: the whole prompt, or its `prompt_tail`, which saves searching for it.
    """
    tail = prompt_tail(tokenizer, prompt_ids)
    before = decoded(tokenizer, tail, skip=True)
    both = decoded(tokenizer, [*tail, *map(int, new_ids)], skip=True)
    if both.startswith(before):
        return both[len(before) :]
    common = len(os.path.commonprefix([before, both]))
    # A byte-fallback decoder gives up a whole run of bytes if the character at its end is
    # incomplete: the prompt's characters in that run have become one U+FFFD per byte.
    given_up = _HALF * len(before[common:].encode())
    return both[common:].removeprefix(given_up)


def prompt_tail(tokenizer, prompt_ids: Sequence[int]) -> list[int]:
    """Returns the last tokens of a prompt, enough for `decode_after`.

    They begin with a token that is visible in the text, and neither inside a character nor inside
    a run of byte tokens, which decoders read as one unit.
    """
    ids, size = [int(index) for index in prompt_ids], _SHORTEST_TAIL
    special = set(tokenizer.all_special_ids) if size < len(ids) else set()
    while size < len(ids):
        tail = ids[-size:]
        first = tokenizer.convert_ids_to_tokens(tail[0])
        is_byte = isinstance(first, str) and first.startswith("<0x") and len(first) == 6
        text = decoded(tokenizer, tail, skip=True)
        if text and not (is_byte or tail[0] in special or text.startswith(_HALF)):
            return tail
        size = size + 1 if size < 4 * _SHORTEST_TAIL else 2 * size
    return ids
