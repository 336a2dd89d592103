"""Inspects paths that a user names, before they are opened.

A path may be anything: a URL, absent, a directory where a file is expected, a named pipe that would
block forever, a name too long for the file system. `local_path` refuses URLs for every option;
`kind_of` describes what is at a path, without raising. `read_json` reads the JSON that a run
depends on (`config.json`, a weight index). `check_downloaded` recognises what a failed download
left in the place of a file.
"""

import contextlib
import json
import os
import pathlib
import re
import stat
import urllib.parse

from drlora_jax.errors import RunError, UserError

FILE, DIRECTORY, ABSENT = "a file", "a directory", "absent"
MAX_JSON_BYTES = 256 << 20  # an index of a million tensors takes about 100 MiB
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+)://", re.IGNORECASE)
# With one slash, as a path library or a typo leaves it; only these schemes, as C:/x is a path.
_STORES = "gs|gcs|s3[an]?|hf|https?|ftps?|hdfs|abfss?|adl|az|wasbs?|oss|r2"
_ONE_SLASH = re.compile(rf"({_STORES}):/", re.IGNORECASE)
_FILE_ADDRESS = re.compile(r"file:(?://(?:localhost)?(?=/)|(?=/(?!/)))", re.IGNORECASE)
_POINTERS = (
    b"version https://git-lfs.github.com/spec/",
    b"version https://hawser.github.com/spec/",
)
# Answers of servers to requests for a file, which a download may have stored as the file.
_PAGE = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*>\s*|<!--(?:(?!-->).)*-->\s*)*<(?:!doctype html|html)\b",
    re.I | re.S,
)
_XML_ERROR = re.compile(rb"\s*(?:<\?xml[^>]*>\s*)?<Error>.*</Error>\s*", re.S)
_ERROR_WORDS = re.compile(
    rb"\s*(?:\d{3}:? ?)?(?:(?:entry |repository |file )?not found|access (?:denied|to model .*)|"
    rb"forbidden|unauthorized|invalid username or password)\.?\s*",
    re.I,
)
_ERROR_KEYS = frozenset(
    "error errors message msg status code detail details type success documentation_url path "
    "timestamp request_id requestId".split()
)
_ERROR_BYTES = 4096  # anything longer that is no web page is a file
_OTHER = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def kind_of(path: str | os.PathLike) -> str:
    """Returns FILE, DIRECTORY, ABSENT, or a description of what else is there or why it cannot be
    read.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "a link to nothing" if os.path.islink(path) else ABSENT
    except OSError as error:
        return f"out of reach ({error.strerror})"
    except ValueError:  # a NUL character
        return "not a valid file name"
    if stat.S_ISREG(mode):
        return FILE
    if stat.S_ISDIR(mode):
        return DIRECTORY
    return next((words for is_kind, words in _OTHER if is_kind(mode)), "not a regular file")


def expand_user(path: str) -> pathlib.Path:
    """Replaces ~ in a path; an unknown user's ~ stays as it is, and the path will be absent."""
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError:
        return pathlib.Path(path)


def local_path(text: str, option: str = "") -> pathlib.Path:
    """Returns the path that an option means: ~ replaced, `file://` decoded, other URLs refused.

    Args:
      option: names the option in the message, as in `--out` or `run.dir`.
    """
    check_local(text, option)
    found = _FILE_ADDRESS.match(text)
    return expand_user(urllib.parse.unquote(text[found.end() :]) if found else text)


def check_local(text: str, option: str = "") -> None:
    """Refuses a URL (`gs://`, `https://`, ...): only paths of this machine are opened."""
    found = _ADDRESS.match(text)
    if not found and kind_of(expand_user(text)) == ABSENT:  # a folder may have such a name
        found = _ONE_SLASH.match(text)
    if not found or _FILE_ADDRESS.match(text):
        return
    scheme, rest = found[1].lower(), text[found.end() :]
    what, way = "a URL, but only local paths are opened", "download it and give its local path"
    if scheme == "file":
        what = "not a URL of a local file"
        way = f"write three slashes: file:///{rest.lstrip('/')}"
    elif scheme == "hf" or "huggingface.co/" in rest:
        way = f"{way}, or for a model or data set of the hub give its name, OWNER/NAME"
    elif scheme not in ("http", "https", "ftp"):
        what = "a URL, but buckets are neither read nor written"
        way = "mount it (launch/README.md, Buckets) and give the path where it is mounted"
    raise UserError(f"{given(option, text)} is {what}; {way}.")


def given(option: str, text: str) -> str:
    """Returns an option's value as the user wrote it: `run.dir=X`, `--out X`, or X alone."""
    return f"{option}{'=' if '.' in option else ' '}{text}" if option else text


def check_downloaded(file: pathlib.Path, *, takes_pages: bool = False) -> None:
    """Refuses the remains of a failed download in the place of a file: a git-lfs pointer, or a
    server's web page or error.

    Args:
      takes_pages: whether the file may be a web page.
    """
    if kind_of(file) != FILE:
        return  # a named pipe would block
    try:
        with open(file, "rb") as stream:
            head = stream.read(_ERROR_BYTES + 1)
    except OSError:
        return  # whoever reads it says why
    if head.startswith(_POINTERS):
        raise UserError(
            f"{file} is a git-lfs pointer, not the file itself: run `git lfs pull` in "
            f"{file.parent}, or download the file again."
        )
    what = None if takes_pages else _answer_of_a_server(head)
    if what:
        raise UserError(
            f"{file} is {what}, not the file itself: download it again from the URL of the file "
            "(logged in, if that is needed)."
        )


def _answer_of_a_server(head: bytes) -> str | None:
    """Describes the web page or error that a file begins with, if it is one."""
    if _PAGE.match(head):
        return "a web page (HTML)"
    if len(head) > _ERROR_BYTES:
        return None
    is_error = _XML_ERROR.fullmatch(head) or _ERROR_WORDS.fullmatch(head) or _is_json_error(head)
    text = " ".join(head.decode("utf-8", "replace").split())
    return f"the error message of a server ({text[:100]!r})" if is_error else None


def _is_json_error(content: bytes) -> bool:
    """Returns whether the content is one JSON object that has only the keys of an error."""
    if not content.lstrip().startswith(b"{"):
        return False
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        return False
    # A message alone may be a row.
    told = (
        values.keys() & {"error", "errors", "documentation_url"}
        or len(values.keys() & {"message", "status"}) == 2
    )
    return bool(told) and values.keys() <= _ERROR_KEYS


def read_json(file: pathlib.Path) -> dict:
    """Reads the JSON object in a file; refuses everything else, and duplicate names."""
    kind = kind_of(file)
    if kind != FILE:
        raise UserError(f"{file} must be a file with a JSON object, but it is {kind}.")
    check_downloaded(file)
    try:
        if file.stat().st_size > MAX_JSON_BYTES:
            raise UserError(
                f"{file} must be JSON of at most {MAX_JSON_BYTES >> 20} MiB, but it is larger."
            )
        text = file.read_bytes().decode("utf-8-sig")  # Windows editors write a byte order mark
        values = json.loads(text, object_pairs_hook=_unique)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} is not JSON: byte {error.start} is not UTF-8. Is the file damaged?"
        ) from error
    except RecursionError as error:
        raise UserError(f"{file} cannot be read: its JSON is nested too deeply.") from error
    except _TwiceError as error:
        raise UserError(f"{file} has the name {error} twice; remove one.") from error
    except ValueError as error:  # a syntax error, a number of thousands of digits
        raise UserError(f"{file} is not JSON: {error}. Is the file truncated?") from error
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


# ------------------------------------------------------------------------------------------ writing


def replace_text(file: pathlib.Path, text: str, *, errors: str = "strict") -> None:
    """Writes a file whole or not at all, so that readers never see a part. Raises OSError.

    Args:
      errors: as for `open`, for characters that UTF-8 lacks.
    """
    draft = file.with_suffix(file.suffix + ".tmp")
    try:
        draft.write_text(text, encoding="utf-8", errors=errors)
        os.replace(draft, file)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink()  # half a file on a full disk helps nobody
        raise


def write_result(file: pathlib.Path, text: str) -> None:
    """Writes a file like `replace_text`, and creates its folder; raises RunError."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(file, text)
    except OSError as error:
        raise RunError(f"{file} cannot be written: {error.strerror}.") from error


# ------------------------------------------------------------------------------------------ folders


def cache_folder(name: str) -> pathlib.Path:
    """Returns the folder of one of this user's caches; a relative path if the user has no home."""
    home = os.environ.get("XDG_CACHE_HOME") or expand_user("~/.cache")
    return pathlib.Path(home, "drlora_jax", name)


def numbered_folders(folder: pathlib.Path) -> list[int]:
    """Returns, in order, the numbers that are names of subfolders."""
    entries = folder.glob("*")
    return sorted(int(entry.name) for entry in entries if entry.name.isdecimal() and entry.is_dir())
