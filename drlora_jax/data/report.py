"""Reports on the rows of a data set, path by path: counts, and everything that was skipped, cut or
changed.
"""

import dataclasses
from collections import Counter

from drlora_jax.data.layouts import Conversation
from drlora_jax.data.wording import Wording
from drlora_jax.system.text import counted

WARN_FRACTION = 0.01  # of rows skipped
_OWN_TOKENS = (
    "row has control tokens in its own text",
    "rows have control tokens in their own text",
)
_INSIDE = ("answer begins inside a token of its prompt", "answers begin inside a token of theirs")


@dataclasses.dataclass
class PathReport:
    """The report on one file."""

    path: str
    wording: Wording | None = None  # None until its first row is read
    is_detected: bool = False  # whether the format was detected from that row's fields
    has_own_template: bool = False  # whether the tokenizer has a chat template
    rows_read: int = 0
    rows_kept: int = 0
    system_rows: int = 0
    system_texts: set[str] = dataclasses.field(default_factory=set)  # at most about two
    skipped: Counter = dataclasses.field(default_factory=Counter)  # by reason
    examples: dict[str, str] = dataclasses.field(default_factory=dict)  # first message by reason
    unread: Counter = dataclasses.field(default_factory=Counter)  # by field: rows

    def skip(self, reason: str, message: str) -> None:
        """Counts a row that was left out."""
        self.skipped[reason] += 1
        self.examples.setdefault(reason, message)

    def saw(self, conversation: Conversation) -> None:
        """Counts what a conversation holds beside its questions and answers."""
        self.unread.update(conversation.unread)
        texts = [m["content"] for m in conversation.messages if m["role"] in SYSTEM_ROLES]
        self.system_rows += bool(texts)
        if len(self.system_texts) < 2:
            self.system_texts.update(map(str, texts))

    def nothing_left(self) -> str:
        """Explains why no row is left."""
        reasons = "; ".join(
            f"{count} {reason} (first: {self.examples[reason]})"
            for reason, count in self.skipped.most_common()
        )
        return f"{self.path}: no row is left of {self.rows_read}: {reasons}."

    def wording_text(self) -> str:
        if self.wording is None:
            return "no row was read"
        found = " (detected from the first row)" if self.is_detected else ""
        text = f"format {self.wording.format}{found}, template {self.wording.template}"
        if self.has_own_template and self.wording.template in ("chatml", "tulu"):
            # A config file may have set it, while the model knows another format.
            text += " (the tokenizer has its own chat template: data.template=tokenizer)"
        if self.wording.date:
            text += f", date {self.wording.date} (the template reads the clock)"
        return text


SYSTEM_ROLES = ("system", "developer")


@dataclasses.dataclass
class Report:
    """The report on one data set."""

    parts: list[PathReport] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)  # paths beyond data.max_rows
    truncated: int = 0
    split: int = 0  # rows cut into windows
    unended: int = 0  # rows with several answers of which only the last one learns to end
    several: int = 0  # rows that became one document per answer
    guarded: int = 0  # rows with control tokens in their own text
    straddled: int = 0  # learned texts whose first characters share a token with the prompt
    ended_thinking: str | None = None  # text that answers without reasoning begin with
    added_start: str | None = None  # token before documents that their chat template does not write
    max_rows: int | None = None
    special_tokens: str = "keep"
    documents: int = 0
    tokens: int = 0
    target_tokens: int = 0

    def total(self, name: str) -> int:
        return sum(getattr(part, name) for part in self.parts)

    @property
    def rows_read(self) -> int:
        return self.total("rows_read")

    @property
    def rows_kept(self) -> int:
        return self.total("rows_kept")

    @property
    def skipped(self) -> Counter:
        return sum((part.skipped for part in self.parts), Counter())

    @property
    def wordings(self) -> dict[str, Wording]:
        """By path, in the order of reading."""
        return {part.path: part.wording for part in self.parts if part.wording is not None}

    def lines(self, title: str = "data") -> list[str]:
        """Returns the report as text, warnings last."""
        lines = [f"{title}: {', '.join(part.path for part in self.parts)}", *self._wording_lines()]
        lines.append(
            f"{counted(self.rows_read, 'row')} read, {self.rows_kept} kept, "
            f"{counted(self.documents, 'document')}, {counted(self.tokens, 'token')}, "
            f"{counted(self.target_tokens, 'target token')}"
        )
        return [*lines, *self.remarks()]

    def remarks(self) -> list[str]:
        """Lists everything that was changed, cut or left out; warnings come last."""
        lines = self._counted_lines()
        skipped, examples = self.skipped, {}
        for part in reversed(self.parts):
            examples |= part.examples
        for reason, count in skipped.most_common():
            lines.append(f"skipped {count}: {reason} (first: {examples[reason]})")
        if skipped.total() > WARN_FRACTION * self.rows_read:
            share = 100 * skipped.total() / self.rows_read
            lines.append(
                f"warning: {skipped.total()} of {counted(self.rows_read, 'row')} ({share:.1f} %) "
                f"{'was' if skipped.total() == 1 else 'were'} skipped"
            )
        return lines

    def _wording_lines(self) -> list[str]:
        """Returns one line if all paths are read alike, else one line per path with its counts."""
        texts = {part.wording_text() for part in self.parts}
        if len(texts) == 1:
            return list(texts)
        return [
            f"  {part.path}: {part.wording_text()}; {counted(part.rows_read, 'row')} read, "
            f"{part.rows_kept} kept"
            for part in self.parts
        ]

    def _system_line(self) -> str:
        texts = set().union(*(part.system_texts for part in self.parts))
        what = f"the same: {shortened(next(iter(texts)))}" if len(texts) == 1 else "they differ"
        of = counted(self.rows_read, "row")
        return f"system messages in {self.total('system_rows')} of {of} ({what})"

    def _counted_lines(self) -> list[str]:
        return [*self._field_lines(), *self._template_lines(), *self._length_lines()]

    def _field_lines(self) -> list[str]:
        """Lists remarks on the content of the rows."""
        lines = []
        unread = sum((part.unread for part in self.parts), Counter())
        if unread:
            lines.append(f"fields that are not read: {by_rows(unread)}")
        if self.total("system_rows"):
            lines.append(self._system_line())
        if self.guarded:
            is_split = self.special_tokens == "split"
            how = "tokenized as ordinary text" if is_split else "kept as control tokens"
            setting = f"data.special_tokens={self.special_tokens}"
            lines.append(f"{counted(self.guarded, *_OWN_TOKENS)}: {how} ({setting})")
        return lines

    def _template_lines(self) -> list[str]:
        """Lists remarks on how the chat template wrote the rows."""
        lines = []
        if self.several:
            lines.append(
                f"{counted(self.several, 'row')} became one document per answer: the chat template "
                "rewrites earlier turns"
            )
        if self.unended:
            lines.append(
                f"{counted(self.unended, 'row')} with several answers: the template ends none with "
                "a control token, so only the last answer of a row learns to end"
            )
        if self.ended_thinking is not None:
            lines.append(
                f"answers without reasoning learn to begin with {self.ended_thinking!r}: the chat "
                "template writes it before them, but not in its generation prompt"
            )
        if self.added_start is not None:
            lines.append(
                f"documents begin with {self.added_start}, which the tokenizer adds; the chat "
                "template does not write it, so apply_chat_template gives ids without it"
            )
        return lines

    def _length_lines(self) -> list[str]:
        """Lists what was cut or left out."""
        lines = []
        if self.straddled:
            lines.append(f"{counted(self.straddled, *_INSIDE)}; that token is not learned")
        if self.truncated:
            lines.append(f"truncated {counted(self.truncated, 'row')} to train.sequence_length")
        if self.split:
            lines.append(
                f"split {counted(self.split, 'row')} into windows of train.sequence_length"
            )
        if self.left_out:
            lines.append(
                f"not read: {', '.join(self.left_out)} (data.max_rows={self.max_rows} was reached)"
            )
        return lines


def by_rows(fields: Counter) -> str:
    """Lists fields with the number of rows that have them."""
    return ", ".join(f"{name} ({counted(rows, 'row')})" for name, rows in fields.most_common())


def shortened(text: str, length: int = 60) -> str:
    """Returns the text in quotes, cut if it is long."""
    return repr(text if len(text) <= length else f"{text[:length]}...")
