"""The directory that `--out` names: checked before any work, filled only when the work is done.

`--out` may be a new name, an empty directory, a link to one, a mount point or the current
directory. A directory that exists cannot be replaced by a rename (a mount and the current directory
not at all, a link becomes something else), so the draft is created inside it and its files move up
at the end. For a new name, a draft beside it is renamed. Either way both are on one file system.
"""

import contextlib
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator

from safetensors import SafetensorError

from drlora_jax.errors import RunError, UserError
from drlora_jax.system import early
from drlora_jax.system.paths import ABSENT, DIRECTORY, kind_of, local_path

DRAFT = ".partial-"  # followed by the process number
# Files that file systems and desktops leave in directories that a user considers empty.
LEFTOVERS = re.compile(
    r"\.DS_Store|\._.*|\.nfs.*|\.Trash.*|\.Spotlight-V100|\.fseventsd|\.localized|lost\+found"
    rf"|Thumbs\.db|desktop\.ini|{re.escape(DRAFT)}\d+"
)
LAST = ("adapter_config.json", "config.json")  # moved last: nothing loads the rest without them
SHOWN = 3
HEADROOM = 1 << 20  # bytes, for the small files


def check_out(path: str) -> pathlib.Path:
    """Returns the directory to write, links resolved; refuses one that cannot be written."""
    if not path.strip():
        raise UserError("--out is empty; give a new directory.")
    out = local_path(path, "--out")
    kind = kind_of(out)
    if kind not in (DIRECTORY, ABSENT):
        raise UserError(f"--out {path} is {kind}; give a new directory.")
    out = out.resolve()
    found = _contents(out, path) if kind == DIRECTORY else []
    if found:
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise UserError(
            f"--out {path} is not empty: it has {', '.join(found[:SHOWN])}{more}. "
            "Give a new or empty directory."
        )
    _try_to_write(out, path)
    return out


def check_space(out: pathlib.Path, size: int) -> None:
    """Refuses `out` where its file system has no room for `size` bytes."""
    place = existing_part(out)
    free = shutil.disk_usage(place).free
    if size + HEADROOM > free:
        raise UserError(
            f"--out {out} needs {size / 2**30:.2f} GiB, but {place} has {free / 2**30:.2f} GiB "
            "free. Make room, or give a directory on another disk."
        )


def existing_part(path: pathlib.Path) -> pathlib.Path:
    """Returns the path itself or the nearest directory above it that exists."""
    return next(part for part in (path, *path.parents) if kind_of(part) != ABSENT)


def _contents(out: pathlib.Path, path: str) -> list[str]:
    try:
        names = sorted(entry.name for entry in out.iterdir())
    except OSError as error:
        raise UserError(f"--out {path} cannot be read: {error.strerror}.") from error
    return [name for name in names if not LEFTOVERS.fullmatch(name)]


def _try_to_write(out: pathlib.Path, path: str) -> None:
    """Creates and removes what is missing: permissions alone do not tell what works."""
    place = existing_part(out)
    if kind_of(place) != DIRECTORY:
        raise UserError(f"--out {path} cannot be written: {place} is {kind_of(place)}.")
    made: list[pathlib.Path] = []
    try:
        _make_parents(out / DRAFT, made)
        os.rmdir(tempfile.mkdtemp(prefix=DRAFT, dir=out))
    except OSError as error:
        raise UserError(
            f"--out {path} cannot be written: {place}: {error.strerror}. Give another directory."
        ) from error
    finally:
        _remove_empty(made)


# ---------------------------------------------------------------------------------------- the draft


@contextlib.contextmanager
def new_directory(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a draft directory whose content is in `out` at the end; if anything fails, `out` is
    unchanged.
    """
    is_inside = kind_of(out) == DIRECTORY
    name = f"{DRAFT}{os.getpid()}" if is_inside else f".{out.name[:40]}.{os.getpid()}.partial"
    draft = (out if is_inside else out.parent) / name
    made: list[pathlib.Path] = []

    def remove():
        shutil.rmtree(draft, ignore_errors=True)
        _remove_empty(made)

    try:
        _make_parents(draft, made)
        # A killed process with the same number may have left one: containers reuse numbers.
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
    except OSError as error:
        remove()
        raise UserError(f"--out {out} cannot be written: {error.strerror}.") from error
    try:
        with early.undoing(remove):
            yield draft
        _let_others_read(draft)
        if is_inside:
            _move_up(draft, out)
        else:
            os.replace(draft, out)
    except (OSError, SafetensorError) as error:
        raise RunError(f"the export to {out} could not be written: {error}") from error
    finally:
        remove()
        if is_inside:
            _remove_old_drafts(out)


def _make_parents(path: pathlib.Path, made: list[pathlib.Path]) -> None:
    """Makes the directories above `path`; appends those that were missing to `made`, outermost
    first.
    """
    for part in [part for part in path.parents if kind_of(part) == ABSENT][::-1]:
        part.mkdir(exist_ok=True)
        made.append(part)


def _remove_empty(made: list[pathlib.Path]) -> None:
    for part in reversed(made):
        with contextlib.suppress(OSError):  # it holds the export
            part.rmdir()


def _let_others_read(draft: pathlib.Path) -> None:
    """Gives files the umask's mode: safetensors writes files that only their owner may read."""
    mode = draft.stat().st_mode & 0o666
    for file in draft.rglob("*"):
        if file.is_file():
            with contextlib.suppress(OSError):  # some file systems have no modes
                file.chmod(mode)


def _move_up(draft: pathlib.Path, out: pathlib.Path) -> None:
    """Moves the draft's files to `out`, all or none."""
    moved = []
    try:
        for file in sorted(draft.iterdir(), key=lambda file: (file.name in LAST, file.name)):
            target = out / file.name
            if target.exists():
                raise RunError(f"Another process has created {target}; nothing is kept.")
            os.rename(file, target)
            moved.append(target)
    except BaseException:
        for target in moved:
            os.rename(target, draft / target.name)  # the draft is removed as a whole
        raise


def _remove_old_drafts(out: pathlib.Path) -> None:
    """Removes drafts that killed processes left in `out`."""
    for entry in out.iterdir():
        number = entry.name.removeprefix(DRAFT)
        if entry.name.startswith(DRAFT) and number.isdigit() and not _is_running(int(number)):
            shutil.rmtree(entry, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
