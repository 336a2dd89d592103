"""Reads the rows of one file: JSON lines, JSON, CSV, Parquet, Arrow; text also compressed."""

import bz2
import contextlib
import csv
import gzip
import io
import json
import lzma
import pathlib
import zlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from drlora_jax.errors import UserError
from drlora_jax.system.imports import load_package
from drlora_jax.system.paths import check_downloaded

MAX_LINE_BYTES = 64 << 20  # per row; a long book has 3 MiB
MAX_LIST_BYTES = 1 << 30  # for a .json list, which is read as a whole
_LINES, _JSON = (".jsonl", ".ndjson"), (".json",)
_TABLES = {".csv": ",", ".tsv": "\t"}
_ARROW = (".arrow", ".feather")
_PACKED = (".gz", ".zst", ".bz2", ".xz")
_TEXT = (*_LINES, *_JSON, *_TABLES)
SUFFIXES = (*_TEXT, ".parquet", *_ARROW, *(text + packed for text in _TEXT for packed in _PACKED))
KNOWN = f"{', '.join(_TEXT)} (also with {', '.join(_PACKED)}), .parquet, {', '.join(_ARROW)}"


class Row(NamedTuple):
    where: str  # "file:line", or "file row 12" for files without lines
    fields: dict


def ending_of(name: str) -> str:
    """Returns the suffix that tells what a file is, in lower case; "" for files that are not
    read.
    """
    return max((each for each in SUFFIXES if name.lower().endswith(each)), key=len, default="")


def read_file(name: str, file: pathlib.Path) -> Iterator[Row]:
    """Reads the rows of a file whose suffix is known.

    Args:
      name: its name in messages.
    """
    check_downloaded(file)
    ending = ending_of(file.name)
    if ending == ".parquet":
        return _read_parquet(name, file)
    if ending in _ARROW:
        return read_arrow(name, file)
    kind = "." + ending.split(".")[1]  # without .gz
    if kind in _TABLES:
        return _read_table(name, file, _TABLES[kind])
    return _read_json(name, file) if kind in _JSON else _read_lines(name, file)


def rows_of(where: str, rows: Iterable, *, first: int = 0) -> Iterator[Row]:
    """Yields rows of a source without lines, numbered on from `first`."""
    for number, fields in enumerate(rows, start=first + 1):
        yield _row(f"{where} row {number}", fields)


# --------------------------------------------------------------------------------------------- text


@contextlib.contextmanager
def _reading(name: str, file: pathlib.Path):
    """Opens a file, decompressed, and turns disk errors into one message."""
    try:
        with _open(name, file) as stream:
            yield stream
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{name} cannot be read: {error}. Is the file complete?") from error


def _open(name: str, file: pathlib.Path):
    packed = ending_of(file.name).rpartition(".")[2]
    if packed == "zst":
        arrow = load_package("pyarrow", f"Reading {name}")
        return io.BufferedReader(arrow.CompressedInputStream(arrow.OSFile(str(file)), "zstd"))
    return {"gz": gzip.open, "bz2": bz2.open, "xz": lzma.open}.get(packed, open)(file, "rb")


def _read_lines(name: str, file: pathlib.Path) -> Iterator[Row]:
    with _reading(name, file) as stream:
        yield from read_stream(name, stream)


def read_stream(name: str, stream: io.BufferedIOBase) -> Iterator[Row]:
    """Yields the rows of JSON lines from any stream, such as standard input."""
    # Bytes are split at \n only: str.splitlines would also cut at U+2028 inside a string.
    # Not enumerate(stream): a line without an end would be read into memory as a whole.
    lines = iter(lambda: stream.readline(MAX_LINE_BYTES + 1), b"")
    for number, line in enumerate(lines, start=1):
        where = f"{name}:{number}"
        if len(line) > MAX_LINE_BYTES:
            raise UserError(
                f"{where}: the row has more than {MAX_LINE_BYTES >> 20} MiB; split the document "
                "into several rows."
            )
        text = _decode(line, name, first_line=number)
        if text.strip() in ("{", "["):
            raise UserError(
                f"{where}: the line is only {text.strip()!r}, so the file is one JSON value over "
                "several lines; write one object per line, or a list of objects [ ] in a .json "
                "file."
            )
        if text.strip():
            fields = _parse(text, name, first_line=number)
            if number == 1 and isinstance(fields, list):
                raise UserError(
                    f"{where}: each line must be an object, got a list; name the file .json if it "
                    "is one list of objects."
                )
            yield _row(where, fields)


def _read_json(name: str, file: pathlib.Path) -> Iterator[Row]:
    """Yields the rows of a list of objects, alone or as the only list in an object; or of JSON
    lines with this suffix.
    """
    with _reading(name, file) as stream:
        content = stream.read(MAX_LIST_BYTES + 1)
    if len(content) > MAX_LIST_BYTES:
        raise UserError(
            f"{name} has more than {MAX_LIST_BYTES >> 20} MiB in one list; write it as .jsonl, one "
            "object per line."
        )
    start = content.removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"["):
        yield from rows_of(name, _parse(_decode(content, name, first_line=1), name, first_line=1))
        return
    whole = _one_object(start)
    keys = lists_of_rows(whole) if whole else []
    if len(keys) == 1:
        yield from rows_of(f"{name} {keys[0]}", whole[keys[0]])
    elif len(keys) > 1 and not _is_row(whole):
        raise UserError(f"{name}: the file is one JSON object; {several_lists(keys)}.")
    elif whole is not None and b"\n" in start.strip():
        raise UserError(
            f"{name} is one JSON object over several lines, with {_named(whole)}; wrap it in [ ] "
            "if it is a row, or write one object per line."
        )
    else:
        yield from _read_lines(name, file)


def _one_object(content: bytes) -> dict | None:
    """Returns the object that makes up the whole file, if there is one."""
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError):
        return None  # lines, or broken: reading the lines reports where
    return value if isinstance(value, dict) else None


def lists_of_rows(whole: dict) -> list[str]:
    """Returns the keys of all lists of objects; none if one of them holds the messages of a single
    row.
    """
    lists = [
        key
        for key, value in whole.items()
        if isinstance(value, list) and value and all(isinstance(each, dict) for each in value)
    ]
    has_messages = any(_is_message(each) for key in lists for each in whole[key])
    return [] if has_messages else lists


def one_list(key: str) -> str:
    return f"{key!r} is a list of rows: write one of its objects per line, or name the file .json"


def several_lists(keys: list[str]) -> str:
    names = ", ".join(map(repr, keys))
    return f"{names} are lists of rows: write the one that you want into its own file"


def _is_row(whole: dict) -> bool:
    """Returns whether an object has the texts of a row, beside lists such as its tools."""
    return any(isinstance(value, str) and value.strip() for value in whole.values())


def _is_message(value: dict) -> bool:
    return "role" in value or {"from", "value"} <= value.keys()


def _named(whole: dict) -> str:
    names = [f"{key} ({type(value).__name__})" for key, value in whole.items()]
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _read_table(name: str, file: pathlib.Path, delimiter: str) -> Iterator[Row]:
    """Yields the rows of a CSV or TSV file with a header line; every value is text, unchanged."""
    csv.field_size_limit(MAX_LINE_BYTES)
    with _reading(name, file) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        names, line = None, 1
        try:
            for values in reader:
                where, line = f"{name}:{line}", reader.line_num + 1
                if not values:  # a blank line
                    continue
                if names is None:
                    names = _header(where, values)
                    continue
                if len(values) != len(names):
                    raise UserError(
                        f"{where}: {len(values)} values, but the first line names {len(names)}: "
                        f"{', '.join(names)}."
                    )
                yield Row(where, dict(zip(names, values, strict=True)))
        except csv.Error as error:
            raise UserError(f"{name}:{reader.line_num}: not a valid table: {error}.") from error
        except UnicodeDecodeError as error:
            raise UserError(
                f"{name}: not UTF-8 after line {reader.line_num}, got byte "
                f"0x{error.object[error.start]:02x}; save the file as UTF-8."
            ) from error


def _header(where: str, names: list[str]) -> list[str]:
    if len(names) == 1 and any(mark in names[0] for mark in ";,|\t"):
        raise UserError(
            f"{where}: the names {names[0]!r} are not separated as the file name says (.csv: "
            "commas, .tsv: tabs); save the table with that separator."
        )
    twice = next((each for each in names if names.count(each) > 1 or not each.strip()), None)
    if twice is not None:
        what = f"the name {twice!r} twice" if twice.strip() else "a column without a name"
        raise UserError(f"{where}: the first line has {what}; every column needs its own.")
    return names


# -------------------------------------------------------------------------------------------- Arrow


def _read_parquet(name: str, file: pathlib.Path) -> Iterator[Row]:
    parquet = load_package("pyarrow.parquet", f"Reading {name}")
    with _arrow_errors(name, "Parquet"), parquet.ParquetFile(file) as table:
        yield from _rows_of_batches(name, table.iter_batches(), 0)


def read_arrow(name: str, file: pathlib.Path, *, first: int = 0) -> Iterator[Row]:
    """Yields the rows of an Arrow file, in the file format (Feather) or the stream format
    (`datasets`).

    Args:
      first: rows of the same data set in earlier files.
    """
    arrow = load_package("pyarrow", f"Reading {name}")
    check_downloaded(file)
    with _arrow_errors(name, "Arrow"), arrow.memory_map(str(file)) as source:
        if source.read(6) == b"ARROW1":
            table = arrow.ipc.open_file(source)
            batches = (table.get_batch(index) for index in range(table.num_record_batches))
        else:
            source.seek(0)
            batches = arrow.ipc.open_stream(source)
        yield from _rows_of_batches(name, batches, first)


@contextlib.contextmanager
def _arrow_errors(name: str, kind: str):
    arrow = load_package("pyarrow", f"Reading {name}")
    try:
        yield
    except UserError:
        raise
    # ValueError: a text column that is not UTF-8.
    except (OSError, ValueError, arrow.ArrowException) as error:
        raise UserError(f"{name} cannot be read as {kind}: {error}") from error


def _rows_of_batches(name: str, batches: Iterable, first: int) -> Iterator[Row]:
    for batch in batches:
        rows = batch.to_pylist()
        if any("binary" in str(kind) for kind in batch.schema.types):
            rows = map(_with_text, rows)
        yield from rows_of(name, rows, first=first)
        first += batch.num_rows


def _with_text(value):
    """Decodes bytes that are UTF-8 text; other values stay, and are refused where they are read."""
    if isinstance(value, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            return value.decode("utf-8")
    if isinstance(value, dict):
        return {key: _with_text(each) for key, each in value.items()}
    return [_with_text(each) for each in value] if isinstance(value, list) else value


# --------------------------------------------------------------------------------------------- rows


def _decode(content: bytes, name: str, *, first_line: int) -> str:
    try:
        # Editors on Windows write a byte order mark first, which json refuses.
        return content.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        raise UserError(
            f"{name}:{line}: not UTF-8, got byte 0x{content[error.start]:02x}; save the file as "
            "UTF-8."
        ) from error


def _parse(text: str, name: str, *, first_line: int):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(
            f"{name}:{line}: not JSON at column {error.colno} ({error.msg}); write one object per "
            "line, or one list of objects in a .json file."
        ) from error
    except (RecursionError, ValueError) as error:  # nested too deep, an integer of 5000 digits
        raise UserError(f"{name}:{first_line}: this JSON cannot be read: {error}") from error


def _row(where: str, fields) -> Row:
    if not isinstance(fields, dict):
        raise UserError(f"{where}: a row must be an object, got {type(fields).__name__}.")
    return Row(where, {name: _as_messages(value) for name, value in fields.items()})


def _as_messages(value):
    """Converts messages stored as one list per key, as in tables, to a list of objects."""
    if not isinstance(value, dict) or not _is_message(value):
        return value
    columns = list(value.values())
    if not all(isinstance(each, list) for each in columns) or len({*map(len, columns)}) != 1:
        return value
    return [dict(zip(value, each, strict=True)) for each in zip(*columns, strict=True)]
