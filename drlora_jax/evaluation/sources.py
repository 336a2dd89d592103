"""Finds the rows of a task: in a named file, in a folder of data, or on the hub.

A folder is searched for a task's file by the relative names in `Source.stems`, with any supported
ending (`file_readers.KNOWN`).
"""

import json
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from drlora_jax.data.file_readers import KNOWN, SUFFIXES
from drlora_jax.data.sources import Row, read_rows
from drlora_jax.errors import UserError
from drlora_jax.evaluation.records import text_hash
from drlora_jax.system.paths import local_path

BUNDLED = "bundled:"  # a file of the package


class Source(NamedTuple):
    """Names the locations of one file of a data set."""

    stems: tuple[str, ...]  # below --data-dir, without endings; the first existing one is used
    elsewhere: str | None = None  # on the hub, NAME or NAME:CONFIG; or bundled:FILE
    split: str = "test"


class Data(NamedTuple):
    """Holds the rows of a file, with its name and fingerprint."""

    name: str
    rows: list[Row]
    fingerprint: str


def read_source(task: str, source: Source, file: str | None, data_dir: str | None) -> Data:
    """Reads the named file, or else the task's file in the folder, or else from `elsewhere`."""
    name = file or _in_folder(source, data_dir)
    if name is not None:
        rows = list(read_rows(name, split=source.split))
        return Data(name, rows, fingerprint(rows))
    if source.elsewhere is None:
        raise UserError(_nowhere(task, source, data_dir, "it is not on the hub."))
    is_on_hub = not source.elsewhere.startswith(BUNDLED)
    if is_on_hub and _is_offline():
        hub = f"the hub ({source.elsewhere}) is switched off."
        raise UserError(_nowhere(task, source, data_dir, hub))
    try:
        rows = list(read_rows(source.elsewhere, split=source.split))
    except UserError as error:
        raise UserError(_nowhere(task, source, data_dir, str(error))) from error
    return Data(source.elsewhere, rows, fingerprint(rows))


def fingerprint(rows: Sequence[Row]) -> str:
    """Returns a fingerprint of the contents of rows, independent of the file format."""
    return text_hash(json.dumps(row.fields, sort_keys=True, default=str) for row in rows)


def _in_folder(source: Source, data_dir: str | None) -> str | None:
    if data_dir is None:
        return None
    folder = local_path(data_dir, "--data-dir")
    if not folder.is_dir():
        raise UserError(f"--data-dir {data_dir} is not a directory; give the folder of the data.")
    files = (_with_ending(folder / stem) for stem in source.stems)
    return next((str(file) for file in files if file is not None), None)


def _with_ending(place: pathlib.Path) -> pathlib.Path | None:
    """Finds the file of that name with a supported ending, ignoring case."""
    if not place.parent.is_dir():
        return None
    beside = (each for each in place.parent.iterdir() if each.name.startswith(place.name))
    found = {each.name.removeprefix(place.name).lower(): each for each in beside if each.is_file()}
    return next((found[suffix] for suffix in SUFFIXES if suffix in found), None)


def _nowhere(task: str, source: Source, data_dir: str | None, elsewhere: str) -> str:
    places = ", ".join(f"{stem}{SUFFIXES[0]}" for stem in source.stems)
    looked = f"--data-dir {data_dir} has none of {places}" if data_dir else "there is no --data-dir"
    return (
        f"No data for {task}: {looked} (or with another ending of {KNOWN}), and "
        f"{elsewhere} Give a file with --tasks {task}=FILE, or a folder with --data-dir."
    )


def _is_offline() -> bool:
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in names)
