"""Reads the rows that `data.path` names: files, folders of shards, globs, saved data sets, files of
the package, `datasets` names.

Every row carries its origin, so that messages can name it. A file that is not what its name says
(not UTF-8, not JSON, truncated) stops the run regardless of `data.bad_rows`: that is a broken file,
not a bad row.
"""

import functools
import glob
import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from drlora_jax.data.file_readers import KNOWN, Row, ending_of, read_arrow, read_file, rows_of
from drlora_jax.data.folders import (
    SAVED_SET,
    SAVED_SETS,
    choose_shards,
    data_files,
    is_data,
    way_to_split,
)
from drlora_jax.errors import UserError
from drlora_jax.system.imports import load_package
from drlora_jax.system.paths import ABSENT, DIRECTORY, FILE, kind_of, local_path, read_json
from drlora_jax.system.text import did_you_mean

BUNDLED = pathlib.Path(__file__).parent.parent / "bundled"
_PATTERN = frozenset("*?[")


class Source(NamedTuple):
    """One file, saved data set or `datasets` name."""

    name: str  # as messages show it
    read: Callable[[], Iterator[Row]]


def read_rows(path: str | Sequence[str], *, split: str = "train") -> Iterator[Row]:
    """Yields the rows of a path, or of several paths one after the other.

    Args:
      path: a file of a KNOWN kind, a folder of such files or one that `save_to_disk` wrote, a
        glob, `bundled:FILE`, or a `datasets` name.
      split: the split of a `datasets` name, or of a folder whose files are named by splits.
    """
    for _, rows in read_paths(path, split=split):
        yield from rows


def read_paths(
    paths: str | Sequence[str], *, split: str = "train", setting: str = ""
) -> Iterator[tuple[str, Iterator[Row]]]:
    """Yields (name, rows) for each file that the paths mean; all are found before the first is
    read.

    A file without rows is skipped if it is one of several that a path means.
    """
    names = [paths] if isinstance(paths, str) else paths
    found = [(name, find_sources(name, split=split, setting=setting)) for name in names]
    for name, sources in found:
        is_empty = True
        for source in sources:
            rows = source.read()
            first = next(rows, None)
            if first is not None:
                is_empty = False
                yield source.name, itertools.chain([first], rows)
        if is_empty:
            raise UserError(f"{name} has no rows; give a file with at least one row.")


def find_sources(name: str, *, split: str = "train", setting: str = "") -> list[Source]:
    """Returns the sources that a path means, at least one, without reading them.

    Args:
      split: see `read_rows`.
      setting: the field that chooses the split, for a message; "" if there is none.
    """
    if name.startswith("bundled:"):
        return [_file_source(name, _bundled_file(name))]
    path = local_path(name)
    kind = kind_of(path)
    if kind == ABSENT and _PATTERN & set(name):
        return _in_glob(name, path, split, setting)
    if kind == ABSENT and not _is_missing_file(name):
        return [Source(name, functools.partial(_read_dataset, name, split))]
    return _at_path(name, path, split, setting)


def _at_path(name: str, path: pathlib.Path, split: str, setting: str) -> list[Source]:
    kind = kind_of(path)
    if kind == DIRECTORY:
        return _in_folder(name, path, split, setting)
    if kind == ABSENT:
        raise UserError(_missing_message(path))
    if kind != FILE:
        raise UserError(f"{name} must be a file, but it is {kind}.")
    return [_file_source(name, path)]


def _file_source(name: str, file: pathlib.Path) -> Source:
    if not ending_of(file.name):
        raise UserError(f"{name}: {_unknown_kind(file)}")
    return Source(name, functools.partial(read_file, name, file))


def _unknown_kind(file: pathlib.Path) -> str:
    if file.suffix.lower() in (".txt", ".md"):
        return (
            "a text file does not tell where rows begin; write a .jsonl file with one "
            '{"text": ...} per document (data.format=text).'
        )
    return f"unknown file type; known are {KNOWN}."


def _in_folder(name: str, folder: pathlib.Path, split: str, setting: str) -> list[Source]:
    """Returns the shards of a folder, or the one data set that `save_to_disk` wrote there."""
    if kind_of(folder / SAVED_SETS) == FILE:
        splits = list(map(str, read_json(folder / SAVED_SETS).get("splits") or []))
        if split not in splits:
            other = min(splits, default="SPLIT")
            raise UserError(
                f"{name} has no split {split}, only {', '.join(splits) or 'none'}; "
                f"{way_to_split(setting, other)}give {name.rstrip('/')}/{other}."
            )
        name, folder = f"{name.rstrip('/')}/{split}", folder / split
    if kind_of(folder / SAVED_SET) == FILE:
        return [Source(name, functools.partial(_read_saved, name, folder))]
    shards = choose_shards(name, folder, split, setting)
    base = name.rstrip("/") or "/"
    return [_file_source(f"{base}/{shard.relative_to(folder)}", shard) for shard in shards]


def _read_saved(name: str, folder: pathlib.Path) -> Iterator[Row]:
    """Yields the rows of a data set that `datasets` saved: its Arrow files in order, as one."""
    state = read_json(folder / SAVED_SET)
    listed = state.get("_data_files") or []
    files = [entry.get("filename") if isinstance(entry, dict) else None for entry in listed]
    is_plain = all(isinstance(each, str) and each == pathlib.Path(each).name for each in files)
    if not files or not is_plain or state.get("_indices_files"):
        raise UserError(
            f"{folder / SAVED_SET} does not list the .arrow files of a saved data set; save it "
            "again with save_to_disk."
        )
    number = 0
    for file in files:
        if kind_of(folder / file) != FILE:
            raise UserError(
                f"{name}: {file}, which {SAVED_SET} lists, is {kind_of(folder / file)}."
            )
        for row in read_arrow(name, folder / file, first=number):
            number += 1
            yield row


def _in_glob(name: str, pattern: pathlib.Path, split: str, setting: str) -> list[Source]:
    found = [pathlib.Path(each) for each in sorted(glob.glob(str(pattern), recursive=True))]
    is_deep = "**" in name  # which matches the folders as well as what is in them
    kept = [each for each in found if kind_of(each) == FILE and is_data(each)]
    folders = [] if is_deep else [each for each in found if kind_of(each) == DIRECTORY]
    others = [each for each in found if kind_of(each) == FILE and not _is_known(each)]
    if others:
        raise UserError(
            f"{name} also matches {others[0]}, which is not a data file; narrow the glob, for "
            f"example to *{ending_of(kept[0].name) if kept else '.jsonl'}."
        )
    if not kept and not folders:
        raise UserError(f"{name} matches no data file; known types are {KNOWN}.")
    return [
        source
        for each in sorted(kept + folders)
        for source in _at_path(str(each), each, split, setting)
    ]


def _is_known(file: pathlib.Path) -> bool:
    """Returns whether a file is data, or a known companion of data such as a README."""
    return bool(ending_of(file.name)) or file.suffix.lower() in (".md", "")


def _bundled_file(name: str) -> pathlib.Path:
    known = {file.relative_to(BUNDLED).as_posix(): file for file in data_files(BUNDLED)}
    wanted = name.removeprefix("bundled:")
    if wanted not in known:  # looked up, not joined: `..` cannot leave the folder
        names = ", ".join(f"bundled:{each}" for each in known) or "none"
        raise UserError(f"{name}: the package has no such file; it has {names}.")
    return known[wanted]


# -------------------------------------------------------------------------------- what is not there


def _is_missing_file(name: str) -> bool:
    """Returns whether a name must be a missing file, because no `datasets` name (NAME or
    OWNER/NAME) looks like it.
    """
    return (
        bool(ending_of(name))
        or name.startswith((".", "/", "~"))
        or name.lower().startswith("file:/")
        or name.count("/") > 1
    )


def _missing_message(file: pathlib.Path) -> str:
    if not file.parent.is_dir():
        return f"{file}: no such file; its folder {file.parent} does not exist either."
    names = _names_in(file.parent)
    hint = did_you_mean(file.name, names, show=lambda name: file.parent / name)
    if hint:
        return f"{file}: no such file; {hint}"
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    listing = (", ".join(names[:5]) or "no data files") + more
    return f"{file}: no such file; the folder {file.parent} has {listing}."


def _names_in(folder: pathlib.Path) -> list[str]:
    try:
        return sorted(each.name for each in folder.iterdir() if is_data(each))
    except OSError:
        return []


# ------------------------------------------------------------------------------------------ the hub


def _read_dataset(name: str, split: str) -> Iterator[Row]:
    """Yields the rows of a `datasets` name, NAME or NAME:CONFIG where there are several
    configurations.
    """
    datasets = load_package("datasets", f"{name} is not a file; reading it as a `datasets` name")
    repository, separator, configuration = name.partition(":")
    if not repository or bool(separator) != bool(configuration):
        raise UserError(f"{name!r} is not a `datasets` name; write NAME, or NAME:CONFIG.")
    chosen = (repository, configuration) if configuration else (repository,)
    try:
        yield from rows_of(f"{name}[{split}]", datasets.load_dataset(*chosen, split=split))
    except UserError:
        raise
    except Exception as error:  # network, name, split: the library raises dozens of unrelated types
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise UserError(
            f"{name} is not a local file, and does not load as a `datasets` name (split {split}): "
            f"{type(error).__name__}: {reason}. Give a local file, or check name (NAME or "
            "NAME:CONFIG), split and network."
        ) from error
