"""Rows of data files: JSON lines, JSON lists, Parquet, files of the package, `datasets` names.

Every row carries the place it came from, so that a message about it can be acted on. A file that
is not what its name says (not UTF-8, not JSON, cut off) stops the run whatever `data.bad_rows` is:
that is a broken file, not a bad row.
"""

import contextlib
import difflib
import gzip
import json
import pathlib
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from drlora_jax.data.packages import load_package
from drlora_jax.errors import UserError
from drlora_jax.files import ABSENT, DIRECTORY, FILE, expand_user, kind_of

BUNDLED = pathlib.Path(__file__).parent.parent / "bundled"
MAX_LINE_BYTES = 64 << 20  # of a row; a long book is 3 MiB
MAX_LIST_BYTES = 1 << 30  # of a .json list, which is read as a whole
SUFFIXES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")


class Row(NamedTuple):
    where: str  # "file:line", or "file row 12" where lines mean nothing
    fields: dict


def read_rows(path: str | Sequence[str], *, split: str = "train") -> Iterator[Row]:
    """Yields the rows of a path, or of several paths one after the other.

    Args:
      path: a .jsonl, .json or .parquet file (text also .gz), `bundled:FILE`, or a `datasets` name.
      split: of a `datasets` name; files have none.
    """
    for name in [path] if isinstance(path, str) else path:
        is_empty = True
        for row in _read_one(name, split):
            is_empty = False
            yield row
        if is_empty:
            raise UserError(f"{name} has no rows: it is empty. Give a file with at least one row.")


def _read_one(name: str, split: str) -> Iterator[Row]:
    if name.startswith("bundled:"):
        return _read_file(name, _bundled_file(name))
    file = expand_user(name)
    kind = kind_of(file)
    if kind == DIRECTORY:
        raise UserError(f"{name} is a directory; give one of its files: {_listing(file)}")
    if kind == FILE:
        return _read_file(name, file)
    if kind != ABSENT:
        raise UserError(f"{name} must be a file, but it is {kind}.")
    # A `datasets` name is NAME or OWNER/NAME; what cannot be one is a file that is not there.
    if name.endswith(SUFFIXES) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(_missing_message(file))
    return _read_dataset(name, split)


def _read_file(name: str, file: pathlib.Path) -> Iterator[Row]:
    if not file.name.endswith(SUFFIXES):
        raise UserError(f"{name}: unknown kind of file; known are {', '.join(SUFFIXES)}.")
    if file.name.endswith(".parquet"):
        return _read_parquet(name, file)
    if file.name.removesuffix(".gz").endswith(".json"):
        return _read_json(name, file)
    return _read_lines(name, file)


def _bundled_file(name: str) -> pathlib.Path:
    known = {
        file.relative_to(BUNDLED).as_posix(): file
        for file in sorted(BUNDLED.rglob("*"))
        if file.is_file() and file.name.endswith(SUFFIXES)
    }
    wanted = name.removeprefix("bundled:")
    if wanted not in known:  # looked up, not joined: `..` cannot leave the folder
        names = ", ".join(f"bundled:{each}" for each in known) or "none"
        raise UserError(f"{name}: the package has no such file; it has {names}.")
    return known[wanted]


def _missing_message(file: pathlib.Path) -> str:
    if not file.parent.is_dir():
        return f"{file}: no such file; its folder {file.parent} does not exist either."
    names = _names_in(file.parent)
    near = difflib.get_close_matches(file.name, names, n=1)
    if near:
        return f"{file}: no such file; did you mean {file.parent / near[0]}?"
    return f"{file}: no such file; the folder {file.parent} has {_listing(file.parent)}"


def _names_in(folder: pathlib.Path) -> list[str]:
    try:
        return sorted(each.name for each in folder.iterdir() if each.name.endswith(SUFFIXES))
    except OSError:
        return []


def _listing(folder: pathlib.Path) -> str:
    names = _names_in(folder)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (", ".join(names[:5]) or "no data files") + more + "."


@contextlib.contextmanager
def _reading(name: str, file: pathlib.Path):
    """Opens a file, plain or gzip, and turns what goes wrong on disk into one message."""
    try:
        with gzip.open(file, "rb") if file.name.endswith(".gz") else open(file, "rb") as stream:
            yield stream
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{name} cannot be read: {error}. Is the file whole?") from error


def _read_lines(name: str, file: pathlib.Path) -> Iterator[Row]:
    with _reading(name, file) as stream:
        # Bytes are split at \n only: str.splitlines would also cut at U+2028 inside a string.
        # Not enumerate(stream): a line without an end would be read into memory as a whole.
        lines = iter(lambda: stream.readline(MAX_LINE_BYTES + 1), b"")
        for number, line in enumerate(lines, start=1):
            where = f"{name}:{number}"
            if len(line) > MAX_LINE_BYTES:
                raise UserError(
                    f"{where}: a row of more than {MAX_LINE_BYTES >> 20} MiB; split the document "
                    "into several rows."
                )
            text = _decode(line, name, first_line=number)
            if text.strip():
                yield _row(where, _parse(text, name, first_line=number))


def _read_json(name: str, file: pathlib.Path) -> Iterator[Row]:
    """A list of objects; a .json file that holds JSON lines is read as such."""
    with _reading(name, file) as stream:
        content = stream.read(MAX_LIST_BYTES + 1)
    if len(content) > MAX_LIST_BYTES:
        raise UserError(
            f"{name} has more than {MAX_LIST_BYTES >> 20} MiB in one list; write it as .jsonl, one "
            "object a line."
        )
    if not content.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        yield from _read_lines(name, file)
        return
    rows = _parse(_decode(content, name, first_line=1), name, first_line=1)
    for number, fields in enumerate(rows, start=1):
        yield _row(f"{name} row {number}", fields)


def _read_parquet(name: str, file: pathlib.Path) -> Iterator[Row]:
    parquet = load_package("pyarrow.parquet", f"Reading {name}")
    arrow = load_package("pyarrow", f"Reading {name}")
    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            for part in table.iter_batches():
                for fields in part.to_pylist():
                    number += 1
                    yield Row(f"{name} row {number}", fields)
    # ValueError: a text column that is not UTF-8.
    except (OSError, ValueError, arrow.ArrowException) as error:
        raise UserError(f"{name} cannot be read as Parquet: {error}") from error


def _read_dataset(name: str, split: str) -> Iterator[Row]:
    """A `datasets` name, with the name of a configuration where there are several: NAME:CONFIG."""
    datasets = load_package("datasets", f"{name} is not a file; reading it as a `datasets` name")
    repository, separator, configuration = name.partition(":")
    if not repository or bool(separator) != bool(configuration):
        raise UserError(f"{name!r} is no `datasets` name; write NAME, or NAME:CONFIG.")
    chosen = (repository, configuration) if configuration else (repository,)
    where = f"{name}[{split}]"
    try:
        rows = datasets.load_dataset(*chosen, split=split)
        for number, fields in enumerate(rows, start=1):
            yield _row(f"{where} row {number}", fields)
    except UserError:
        raise
    except Exception as error:  # network, name, split: the library raises dozens of unrelated types
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise UserError(
            f"{name} is no file here, and as a `datasets` name (split {split}) it does not load: "
            f"{type(error).__name__}: {reason}. Give a local file, or check name (NAME or "
            "NAME:CONFIG), split and network."
        ) from error


def _decode(content: bytes, name: str, *, first_line: int) -> str:
    try:
        # Editors on Windows put a byte order mark in front; json would choke on it.
        return content.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        raise UserError(
            f"{name}:{line}: not UTF-8, got byte 0x{content[error.start]:02x}; "
            "save the file as UTF-8."
        ) from error


def _parse(text: str, name: str, *, first_line: int):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(
            f"{name}:{line}: not JSON at column {error.colno} ({error.msg}); "
            "one object a line, or in a .json file one list of objects."
        ) from error
    except (RecursionError, ValueError) as error:  # nested too deep, an integer of 5000 digits
        raise UserError(f"{name}:{first_line}: not JSON that can be read: {error}") from error


def _row(where: str, fields) -> Row:
    if not isinstance(fields, dict):
        raise UserError(f"{where}: a row must be an object, got {type(fields).__name__}.")
    return Row(where, fields)
