"""Builds documents from a data config, and counts everything that was skipped, cut or changed.

Format and template are decided per file, by its first row. Rows are written one by one and
tokenised in batches.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

from drlora_jax.config import DataSection
from drlora_jax.data.layouts import Conversation, detect_format, other_settings
from drlora_jax.data.multiple_choice import FORMAT as CHOICE
from drlora_jax.data.multiple_choice import render_choice, split_task
from drlora_jax.data.report import PathReport, Report
from drlora_jax.data.segments import GUARD, BadRow, Written, control_pattern, plain_text
from drlora_jax.data.sources import Row, find_sources, read_paths
from drlora_jax.data.templates import opens_thinking
from drlora_jax.data.tokenize import (
    CUT_STARTS,
    Document,
    check_row_tokens,
    check_tokenizer,
    encode_documents,
)
from drlora_jax.data.wording import Writer, field_names, resolve_wording
from drlora_jax.errors import UserError

BATCH_ROWS, BATCH_CHARACTERS = 512, 1 << 22  # tokenised in one call
SAY_AFTER = 5.0  # seconds between progress messages


class Documents(NamedTuple):
    documents: list[Document]
    report: Report


def load_documents(
    config: DataSection,
    tokenizer,
    sequence_length: int,
    *,
    evaluation: bool = False,
    date: str | None = None,
    vocab_size: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Documents:
    """Reads, renders and tokenises a data set.

    Args:
      config: the section `data`.
      tokenizer: the model's tokenizer.
      sequence_length: the longest document that fits into a row.
      evaluation: whether to read `eval_path` instead of `path`.
      date: the date for templates that read the clock; None: as `data.date` says.
      vocab_size: embedding rows of the model; a row with a token beyond them is a bad row.
      say: receives a progress message every few seconds.
    """
    paths = config.eval_path if evaluation else config.path
    if not paths:
        raise UserError(f"data.{'eval_path' if evaluation else 'path'} is empty; name a data file.")
    if sequence_length < 2:
        raise UserError(
            f"train.sequence_length must be at least 2, got {sequence_length}: the first token of "
            "a row is never predicted."
        )
    check_tokenizer(tokenizer)
    split = _splits(config)[evaluation]
    reader = _Reader(config, tokenizer, sequence_length, date, vocab_size, say)
    limit = None if evaluation else config.max_rows
    return reader.read(_files(config, paths, split), limit)


def check_paths(config: DataSection) -> None:
    """Finds everything that `path` and `eval_path` name, before any of it is read."""
    for paths, split in zip((config.path, config.eval_path), _splits(config), strict=True):
        for path in paths:
            find_sources(split_task(path)[1] if config.format == CHOICE else path, **split)


def _splits(config: DataSection) -> tuple[dict[str, str], dict[str, str]]:
    """Returns the splits of `path` and `eval_path`, each with the field that sets it."""
    return (
        {"split": config.split, "setting": "data.split"},
        {"split": config.eval_split, "setting": "data.eval_split"},
    )


def digest(documents: list[Document]) -> str:
    """Returns the sha256 of all tokens and target masks: it covers rows, tokenizer and how rows are
    read.
    """
    found = hashlib.sha256()
    for document in documents:
        found.update(document.tokens.tobytes())
        found.update(document.is_target.tobytes())
    return found.hexdigest()


def _files(config: DataSection, paths, split: dict) -> Iterator[tuple[str, str, Iterator[Row]]]:
    """Yields (multiple-choice task or "", file, rows) for every file."""
    if config.format != CHOICE:
        yield from (("", *each) for each in read_paths(paths, **split))
        return
    for task, path in [split_task(path) for path in paths]:  # all are checked before one is read
        yield from ((task, *each) for each in read_paths((path,), **split))


class _Reader:
    """Collects documents, and the report on them."""

    def __init__(self, config, tokenizer, sequence_length: int, date, vocab_size, say):
        self._vocab_size = vocab_size
        self._config, self._tokenizer, self._length = config, tokenizer, sequence_length
        self._date, self._say, self._said = date, say, time.monotonic()
        self._report, self._documents = Report(max_rows=config.max_rows), []
        self._waiting: list[tuple[Row, PathReport, list[Written]]] = []
        self._characters = 0

    def read(self, files, limit: int | None) -> Documents:
        report = self._report
        for task, path, rows in files:
            if limit is not None and report.rows_read >= limit:
                report.left_out.append(path)
                continue
            part = PathReport(path)
            report.parts.append(part)
            for row in rows:
                self._take(task, row, part)
                # Checked after the row: a bad row beyond the limit must not stop the run.
                if report.rows_read == limit:
                    break
            self._flush()
            if not part.rows_kept:
                raise UserError(part.nothing_left())
        report.documents = len(self._documents)
        report.tokens = sum(len(document.tokens) for document in self._documents)
        report.target_tokens = sum(int(each.is_target.sum()) for each in self._documents)
        return Documents(self._documents, report)

    def _take(self, task: str, row: Row, part: PathReport) -> None:
        """Writes a row as text; it is tokenised with the next batch."""
        part.rows_read += 1
        if part.wording is None:
            self._settle(row, part)
        try:
            written = self._written(task, row, part)
        except BadRow as error:
            self._flush()  # errors of earlier rows are reported first
            self._skip(row, part, self._explained(error, row, part))
            return
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from error
        self._waiting.append((row, part, written))
        self._characters += sum(len(s.text) for each in written for s in each.segments)
        if len(self._waiting) >= BATCH_ROWS or self._characters >= BATCH_CHARACTERS:
            self._flush()

    def _settle(self, row: Row, part: PathReport) -> None:
        try:
            part.wording = resolve_wording(
                row.fields, self._config, self._tokenizer, date=self._date
            )
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from error
        part.is_detected = self._config.format == "auto"
        part.has_own_template = bool(getattr(self._tokenizer, "chat_template", None))
        self._writer = Writer(part.wording, self._tokenizer)
        self._report.special_tokens = part.wording.special_tokens
        if not part.wording.is_as_is:
            closing = opens_thinking(self._writer.style, self._tokenizer)
            self._report.ended_thinking = closing or self._report.ended_thinking

    def _written(self, task: str, row: Row, part: PathReport) -> list[Written]:
        conversation = None
        if task:
            segments = [
                self._writer.as_is(segment.text, segment.is_response)
                for segment in render_choice(task, row)
            ]
            written = [Written(segments, False)]
        else:
            written, conversation = self._writer.documents(row.fields)
            part.saw(conversation)
            if conversation.unread and self._config.unread == "stop":
                names = ", ".join(conversation.unread)
                raise UserError(f"nothing reads the fields {names} (data.unread=stop)")
        self._report.several += len(written) > 1
        self._report.unended += any(map(_has_open_answers, written))
        self._report.guarded += self._has_control_tokens(written, conversation)
        return written

    def _explained(self, error: BadRow, row: Row, part: PathReport) -> BadRow:
        """Returns the error, or a clearer one: the row has another layout than the first one of its
        file, or the settings are for other rows than this file has.
        """
        if error.reason != "missing field":
            return error
        if not part.is_detected:
            names, is_first = part.wording.fields, part.rows_read == 1
            way = other_settings(row.fields, names, part.wording.format) if is_first else ""
            return BadRow(error.reason, f"{error}, or {way}") if way else error
        try:
            found, _ = detect_format(row.fields, field_names(self._config))
        except UserError:
            return error
        if found == part.wording.format:
            return error
        return BadRow(
            "another format",
            f"this row has the format {found}, but the file's first row {part.wording.format}; put "
            "each format into its own file",
        )

    def _has_control_tokens(
        self, written: list[Written], conversation: Conversation | None
    ) -> bool:
        """Returns whether the row's own text has control tokens; the template's do not count."""
        wording = self._writer.wording
        texts = [segment.text for each in written for segment in each.segments]
        if wording.special_tokens == "split":
            return any(GUARD in text for text in texts)
        if wording.is_as_is:
            return any(map(control_pattern(self._tokenizer).search, texts))
        return self._writer.would_split(conversation)

    def _flush(self) -> None:
        """Tokenises the waiting rows and keeps their documents."""
        waiting, self._waiting, self._characters = self._waiting, [], 0
        everything = [each for _, _, written in waiting for each in written]
        counts = Counter()
        loss_on = self._config.loss_on
        encoded = iter(encode_documents(everything, self._tokenizer, loss_on, counts))
        self._report.straddled += counts[CUT_STARTS]
        for row, part, written in waiting:
            whole = [next(encoded) for _ in written]
            if part.wording.template == "tokenizer" and self._report.added_start is None:
                if any(map(self._starts_apart, written, whole)):
                    self._report.added_start = self._tokenizer.bos_token
            self._keep(row, part, whole)
        if time.monotonic() > self._said + SAY_AFTER:
            self._said = time.monotonic()
            self._say(f"tokenizing: {self._report.rows_read:,} rows")

    def _starts_apart(self, written: Written, document: Document) -> bool:
        """Returns whether a document begins with a BOS token that the tokenizer adds and the
        template did not write.
        """
        bos = self._tokenizer.bos_token
        is_there = bos is not None and document.tokens[0] == self._tokenizer.bos_token_id
        return is_there and not plain_text(written.segments).startswith(bos)

    def _keep(self, row: Row, part: PathReport, whole: list[Document]) -> None:
        try:
            if self._vocab_size is not None:
                is_split = part.wording.special_tokens == "split" and not part.wording.is_as_is
                template = part.wording.template if is_split else ""
                for each in whole:
                    check_row_tokens(each.tokens, self._tokenizer, self._vocab_size, template)
            fitted = [piece for each in whole for piece in _fit(each, self._config, self._length)]
            _check_targets(whole, fitted, self._length)
        except BadRow as error:
            self._skip(row, part, error)
            return
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from error
        part.rows_kept += 1
        is_split = len(fitted) > len(whole)
        self._report.split += is_split
        self._report.truncated += not is_split and _size(fitted) < _size(whole)
        # Of several documents one may have lost its answer to the length of a row.
        self._documents += [each for each in fitted if len(whole) == 1 or each.is_target.any()]

    def _skip(self, row: Row, part: PathReport, error: BadRow) -> None:
        message = f"{row.where}: {error}"
        if self._config.bad_rows == "stop" and error.reason != "too long":
            raise UserError(f"{message} (or set data.bad_rows=skip).") from error
        part.skip(error.reason, message)


def _has_open_answers(written: Written) -> bool:
    """Returns whether a document has several answers and the template ends none of them."""
    return not written.is_ended and sum(segment.is_response for segment in written.segments) > 1


def _size(documents: list[Document]) -> int:
    return sum(len(document.tokens) for document in documents)


def _fit(document: Document, config: DataSection, sequence_length: int) -> list[Document]:
    """Fits a document to the length of a row, as `data.too_long` says."""
    length = len(document.tokens)
    if length <= sequence_length:
        return [document]
    if config.too_long == "truncate":
        cut = slice(0, sequence_length)
        return [Document(document.tokens[cut], document.is_target[cut])]
    if config.too_long == "split":
        return windows(document, sequence_length)
    message = f"{length} tokens, but train.sequence_length is {sequence_length}"
    if config.too_long == "skip":
        raise BadRow("too long", message)
    raise UserError(f"{message}; raise it, or set data.too_long=truncate or skip.")


def windows(document: Document, sequence_length: int) -> list[Document]:
    """Splits a document into windows that overlap by one token, so that every token but the first
    is predicted exactly once: the last token of a window is only context in the next.
    """
    found = []
    for start in range(0, len(document.tokens) - 1, sequence_length - 1):
        cut = slice(start, start + sequence_length)
        is_target = document.is_target[cut].copy()
        is_target[0] = False
        found.append(Document(document.tokens[cut], is_target))
    return found


def _check_targets(whole: list[Document], fitted: list[Document], sequence_length: int) -> None:
    """Refuses a row that teaches nothing, such as a prompt that fills the whole row."""
    if any(each.is_target.any() for each in fitted):
        return
    raise BadRow(
        "no target token left",
        f"no target token left in the first {sequence_length} of {_size(whole)} tokens; raise "
        "train.sequence_length or shorten the prompt",
    )
