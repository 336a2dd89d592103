"""Decodes the text of an answer token by token, and finds its end.

The text of an answer is what its tokens add to the text of the prompt: a decoder drops the leading
space of a text, so the tokens of an answer are never decoded alone. `AnswerText` keeps a window of
tokens, so that a long answer costs no more per token than a short one.
"""

import re
from collections.abc import Callable, Sequence
from typing import Literal

from drlora_jax.data.decoding import decode_after, prompt_tail

WINDOW = 64  # tokens that are decoded again for each new one
HALF = "\ufffd"  # stands for bytes that do not form a character yet
_BYTE = re.compile("<0x[0-9A-F]{2}>")

Finish = Literal["stop", "eos", "length"]


def shown_tokens(stop: Sequence[str], tokenizer) -> dict[int, str]:
    """Returns the special tokens that occur in stop strings, which decoded text does not show."""
    if not stop:
        return {}
    added = tokenizer.added_tokens_decoder
    texts = {token: added[token].content for token in added if added[token].special}
    return {token: text for token, text in texts.items() if any(text in each for each in stop)}


class AnswerText:
    """Decodes what the tokens of an answer add to the text of the prompt."""

    def __init__(self, tokenizer, prompt: Sequence[int]):
        self._tokenizer = tokenizer
        self._tail = prompt_tail(tokenizer, prompt)
        self._before, self._window = "", []  # text of the tokens before the window
        self.text = ""
        self.certain = 0  # characters that no later token can change

    def add(self, token: int) -> None:
        if len(self._window) >= WINDOW and self.certain == len(self.text):
            self._tail = prompt_tail(self._tokenizer, self._tail + self._window)
            self._before, self._window = self.text, []
        self._window.append(token)
        text = self._before + decode_after(self._tokenizer, self._tail, self._window)
        # One invalid byte in a run of bytes makes all of them undecodable.
        is_byte = _BYTE.fullmatch(self._tokenizer.convert_ids_to_tokens(token) or "")
        if text != self.text and not is_byte:
            self.certain = len(text.rstrip(HALF))
        self.text = text


class Answer:
    """Collects the tokens of one answer, and decides when it ends.

    Args:
      ends: Tokens that end the answer.
      stop: Strings that end the answer; they may contain special tokens.
      shown: From `shown_tokens`.
      tell: Called with new text as it becomes certain.
    """

    def __init__(
        self,
        text: AnswerText,
        *,
        limit: int,
        ends: Sequence[int] = (),
        stop: Sequence[str] = (),
        shown: dict[int, str],
        tell: Callable[[str], None] = lambda text: None,
    ):
        self.limit, self.finish = limit, None
        self.tokens: list[int] = []
        self.text = ""
        self._decoded, self._ends, self._tell = text, frozenset(ends), tell
        self._stop, self._shown = tuple(stop), shown
        self._marks: list[tuple[int, str]] = []  # special tokens of stop strings: position, text
        self._told = 0

    def take(self, token: int) -> None:
        if self.finish:
            return
        self.tokens.append(token)
        if token in self._ends:
            self.finish = "eos"
        else:
            self._decoded.add(token)
            if token in self._shown:
                self._marks.append((len(self._decoded.text), self._shown[token]))
            if len(self.tokens) == self.limit:
                self.finish = "length"
        self._cut()

    def _cut(self) -> None:
        """Ends the text at the first stop string, and passes on the part that is certain."""
        self.text = text = self._decoded.text
        with_marks = self._with_marks()
        cuts = [at for stop in self._stop if (at := with_marks.find(stop)) >= 0]
        if cuts:
            self.text, self.finish = text[: self._place(min(cuts))], "stop"
        certain = len(self.text)
        if not self.finish:
            begun = max((_overlap(with_marks, stop) for stop in self._stop), default=0)
            certain = min(self._decoded.certain, self._place(len(with_marks) - begun))
        if certain > self._told:
            self._tell(self.text[self._told : certain])
            self._told = certain

    def _with_marks(self) -> str:
        """Returns the text including the special tokens of stop strings."""
        text, parts, start = self._decoded.text, [], 0
        for at, mark in self._marks:
            parts += [text[start:at], mark]
            start = at
        return "".join([*parts, text[start:]])

    def _place(self, at: int) -> int:
        """Returns the position in the text of a position in `_with_marks()`."""
        for start, mark in self._marks:
            if at <= start:
                break
            at -= min(len(mark), at - start)
        return at


def _overlap(text: str, stop: str) -> int:
    """Returns how many characters at the end of a text may be the start of a stop string."""
    sizes = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
