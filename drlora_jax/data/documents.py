"""From a data config to documents, with a count of everything that did not go in as it was."""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from drlora_jax.config import DataSection
from drlora_jax.data.choices import FORMAT as CHOICE
from drlora_jax.data.choices import read_choices, render_choice
from drlora_jax.data.sources import Row, read_rows
from drlora_jax.data.templates import BadRow, FieldNames, choose_template, detect_format, render
from drlora_jax.data.tokenize import Document, check_tokenizer, encode_document
from drlora_jax.errors import UserError

WARN_FRACTION = 0.01  # of rows skipped


@dataclasses.dataclass
class Report:
    """What came of the rows of one data set."""

    paths: tuple[str, ...]
    format: str = ""
    template: str = ""
    is_detected: bool = False  # the format, from the first row's fields
    rows_read: int = 0
    rows_kept: int = 0
    truncated: int = 0
    split: int = 0  # rows cut into windows
    documents: int = 0
    tokens: int = 0
    target_tokens: int = 0
    skipped: Counter = dataclasses.field(default_factory=Counter)  # by reason
    examples: dict[str, str] = dataclasses.field(default_factory=dict)  # first message by reason

    def skip(self, reason: str, message: str) -> None:
        """Counts a row that was left out."""
        self.skipped[reason] += 1
        self.examples.setdefault(reason, message)

    def lines(self) -> list[str]:
        """The report as text, warnings last."""
        found = " (found from the first row)" if self.is_detected else ""
        lines = [
            f"data: {', '.join(self.paths)}",
            f"format {self.format}{found}, template {self.template}",
            f"{self.rows_read} rows read, {self.rows_kept} kept, {self.documents} documents, "
            f"{self.tokens} tokens, {self.target_tokens} target tokens",
        ]
        for reason, count in self.skipped.most_common():
            lines.append(f"skipped {count}: {reason} (first: {self.examples[reason]})")
        if self.truncated:
            lines.append(f"truncated {self.truncated} rows to train.sequence_length")
        if self.split:
            lines.append(f"split {self.split} rows into windows of train.sequence_length")
        skipped = self.skipped.total()
        if skipped > WARN_FRACTION * self.rows_read:
            share = 100 * skipped / self.rows_read
            lines.append(
                f"warning: {skipped} of {self.rows_read} rows ({share:.1f} %) were skipped"
            )
        return lines


class Documents(NamedTuple):
    documents: list[Document]
    report: Report


def load_documents(
    config: DataSection, tokenizer, sequence_length: int, *, evaluation: bool = False
) -> Documents:
    """Reads, renders and tokenises a data set.

    Args:
      config: the section `data`.
      tokenizer: of the model.
      sequence_length: the longest document that fits into a row.
      evaluation: read `eval_path` instead of `path`.
    """
    paths = config.eval_path if evaluation else config.path
    if not paths:
        raise UserError(f"data.{'eval_path' if evaluation else 'path'} is empty; name a data file.")
    if sequence_length < 2:
        raise UserError(
            f"train.sequence_length must be at least 2, got {sequence_length}: "
            "the first token of a row is never predicted."
        )
    check_tokenizer(tokenizer)
    split = config.eval_split if evaluation else config.split
    limit = None if evaluation else config.max_rows
    report = Report(paths)
    documents = []
    for task, row in _first(_rows(config, paths, split), limit):
        documents += _documents_of(task, row, config, tokenizer, sequence_length, report)
    if not documents:
        raise UserError(_nothing_left(report))
    report.documents = len(documents)
    report.tokens = sum(len(document.tokens) for document in documents)
    report.target_tokens = sum(int(document.is_target.sum()) for document in documents)
    return Documents(documents, report)


def _rows(config: DataSection, paths: tuple[str, ...], split: str) -> Iterator[tuple[str, Row]]:
    """Rows, each with its multiple-choice task; no task ("") where rows need none."""
    if config.format == CHOICE:
        return read_choices(paths, split=split)
    return (("", row) for row in read_rows(paths, split=split))


def _first(rows: Iterator, limit: int | None) -> Iterator:
    # Not itertools.islice: past the limit it would ask for a row more, and a bad one would stop us.
    for number, row in enumerate(rows, start=1):
        yield row
        if number == limit:
            return


def _documents_of(
    task: str, row: Row, config: DataSection, tokenizer, sequence_length: int, report: Report
) -> list[Document]:
    """The documents of one row; none if it is skipped."""
    report.rows_read += 1
    if not report.format:
        _decide(row, config, tokenizer, report)
    try:
        document = _encode_row(task, row, config, tokenizer, report)
        documents = _fit(document, config, sequence_length)
        _check_targets(document, documents, sequence_length)
    except BadRow as error:
        message = f"{row.where}: {error}"
        if config.bad_rows == "stop" and error.reason != "too long":
            raise UserError(f"{message} (or set data.bad_rows=skip).") from error
        report.skip(error.reason, message)
        return []
    except UserError as error:
        raise UserError(f"{row.where}: {error}") from error
    report.rows_kept += 1
    report.split += len(documents) > 1
    report.truncated += len(documents) == 1 and len(documents[0].tokens) < len(document.tokens)
    return documents


def _decide(row: Row, config: DataSection, tokenizer, report: Report) -> None:
    """Settles format and template, once, by the first row."""
    report.is_detected = config.format == "auto"
    row_format = config.format
    if report.is_detected:
        try:
            row_format = detect_format(row.fields, _names(config))
        except UserError as error:
            raise UserError(f"{row.where}: {error}") from error
    report.template = choose_template(config.template, row_format, tokenizer)
    report.format = row_format


def _names(config: DataSection) -> FieldNames:
    return FieldNames(
        config.prompt_field, config.response_field, config.messages_field, config.text_field
    )


def _encode_row(task: str, row: Row, config: DataSection, tokenizer, report: Report) -> Document:
    if task:
        return encode_document(render_choice(task, row), tokenizer, config.loss_on)
    segments = render(
        row.fields,
        row_format=report.format,
        template=report.template,
        tokenizer=tokenizer,
        names=_names(config),
    )
    return encode_document(segments, tokenizer, config.loss_on)


def _fit(document: Document, config: DataSection, sequence_length: int) -> list[Document]:
    """Brings a document to the length of a row, as `data.too_long` says."""
    length = len(document.tokens)
    if length <= sequence_length:
        return [document]
    if config.too_long == "truncate":
        cut = slice(0, sequence_length)
        return [Document(document.tokens[cut], document.is_target[cut])]
    if config.too_long == "split":
        return _windows(document, sequence_length)
    message = f"{length} tokens, but train.sequence_length is {sequence_length}"
    if config.too_long == "skip":
        raise BadRow("too long", message)
    raise UserError(f"{message}; raise it, or set data.too_long=truncate or skip.")


def _windows(document: Document, sequence_length: int) -> list[Document]:
    """Windows that share one token, so that every token but the first is predicted exactly once."""
    windows = []
    for start in range(0, len(document.tokens) - 1, sequence_length - 1):
        cut = slice(start, start + sequence_length)
        is_target = document.is_target[cut].copy()
        is_target[0] = False
        windows.append(Document(document.tokens[cut], is_target))
    return windows


def _check_targets(document: Document, documents: list[Document], sequence_length: int) -> None:
    """Refuses a row that teaches nothing, such as a prompt that fills the whole row."""
    if any(each.is_target.any() for each in documents):
        return
    raise BadRow(
        "no target token left",
        f"no target token left in the first {sequence_length} of {len(document.tokens)} tokens; "
        "raise train.sequence_length or shorten the prompt",
    )


def _nothing_left(report: Report) -> str:
    reasons = "; ".join(
        f"{count} {reason} (first: {report.examples[reason]})"
        for reason, count in report.skipped.most_common()
    )
    return f"{', '.join(report.paths)}: no row is left of {report.rows_read}: {reasons}."
