"""Looking at paths that a user names, before they are opened.

A path may be anything: absent, a directory where a file is wanted, a named pipe that would block
for ever, a name too long for the file system. `kind_of` says which in words, without raising.
JSON that decides what a run is (`config.json`, a weight index) is read by `read_json`.
"""

import json
import os
import pathlib
import stat

from drlora_jax.errors import UserError

FILE, DIRECTORY, ABSENT = "a file", "a directory", "absent"
MAX_JSON_BYTES = 256 << 20  # an index of a million tensors takes about 100 MiB
_POINTERS = (
    b"version https://git-lfs.github.com/spec/",
    b"version https://hawser.github.com/spec/",
)
_OTHER = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def kind_of(path: str | os.PathLike) -> str:
    """FILE, DIRECTORY, ABSENT, or in words what else is there or why it can not be looked at."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "a link to nothing" if os.path.islink(path) else ABSENT
    except OSError as error:
        return f"out of reach ({error.strerror})"
    except ValueError:  # a NUL character
        return "no possible name of a file"
    if stat.S_ISREG(mode):
        return FILE
    if stat.S_ISDIR(mode):
        return DIRECTORY
    return next((words for is_kind, words in _OTHER if is_kind(mode)), "no regular file")


def expand_user(path: str) -> pathlib.Path:
    """The path with ~ replaced; one with the name of no user stays as it is, and will be absent."""
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError:
        return pathlib.Path(path)


def check_not_pointer(file: pathlib.Path) -> None:
    """Refuses the few lines that git leaves in the place of a file kept in git-lfs."""
    if kind_of(file) != FILE:
        return  # a named pipe would block
    try:
        with open(file, "rb") as stream:
            head = stream.read(max(map(len, _POINTERS)))
    except OSError:
        return  # whoever reads it says why
    if head.startswith(_POINTERS):
        raise UserError(
            f"{file} is a git-lfs pointer, not the file itself: run `git lfs pull` in "
            f"{file.parent}, or download the file again."
        )


def read_json(file: pathlib.Path) -> dict:
    """The JSON object in a file; refuses everything else, and names given twice."""
    kind = kind_of(file)
    if kind != FILE:
        raise UserError(f"{file} must be a file with a JSON object, but it is {kind}.")
    check_not_pointer(file)
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{file} has more than {MAX_JSON_BYTES >> 20} MiB: not such a file.")
        text = file.read_bytes().decode("utf-8-sig")  # Windows editors write a byte order mark
        values = json.loads(text, object_pairs_hook=_unique)
    except OSError as error:
        raise UserError(f"{file} can not be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} is not JSON: byte {error.start} is not UTF-8; is it damaged?"
        ) from error
    except RecursionError as error:
        raise UserError(f"{file} is not JSON that can be read: nested too deep.") from error
    except _TwiceError as error:
        raise UserError(f"{file} has the name {error} twice; remove one.") from error
    except ValueError as error:  # a syntax error, a number of thousands of digits
        raise UserError(f"{file} is not JSON: {error}; is it cut off?") from error
    if not isinstance(values, dict):
        raise UserError(f"{file} must hold a JSON object, got {type(values).__name__}.")
    return values


class _TwiceError(ValueError):
    pass


def _unique(pairs: list) -> dict:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(repr(next(name for name in names if names.count(name) > 1)))
    return values
