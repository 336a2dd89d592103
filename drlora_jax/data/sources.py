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

BUNDLED = pathlib.Path(__file__).parent.parent / "bundled"
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
    file = pathlib.Path(name)
    if file.is_dir():
        raise UserError(f"{name} is a directory; give one of its files: {_listing(file)}")
    if file.exists():
        return _read_file(name, file)
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
    names = [each.name for each in file.parent.iterdir() if each.name.endswith(SUFFIXES)]
    near = difflib.get_close_matches(file.name, names, n=1)
    if near:
        return f"{file}: no such file; did you mean {file.parent / near[0]}?"
    return f"{file}: no such file; the folder {file.parent} has {_listing(file.parent)}"


def _listing(folder: pathlib.Path) -> str:
    names = sorted(each.name for each in folder.iterdir() if each.name.endswith(SUFFIXES))
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
        for number, line in enumerate(stream, start=1):
            where = f"{name}:{number}"
            text = _decode(line, name, first_line=number)
            if text.strip():
                yield _row(where, _parse(text, name, first_line=number))


def _read_json(name: str, file: pathlib.Path) -> Iterator[Row]:
    """A list of objects; a .json file that holds JSON lines is read as such."""
    with _reading(name, file) as stream:
        content = stream.read()
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
    except (OSError, arrow.ArrowException) as error:
        raise UserError(f"{name} cannot be read as Parquet: {error}") from error


def _read_dataset(name: str, split: str) -> Iterator[Row]:
    datasets = load_package("datasets", f"{name} is not a file; reading it as a `datasets` name")
    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # network, name, split: the library raises dozens of unrelated types
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{name} is no file here, and as a `datasets` name (split {split}) it does not load: "
            f"{type(error).__name__}: {reason} Give a local file, or check name, split and network."
        ) from error
    for number, fields in enumerate(rows, start=1):
        yield _row(f"{name}[{split}] row {number}", fields)


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
