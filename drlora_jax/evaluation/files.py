"""Where the rows of a task come from: a named file, a folder of data, or the hub.

A folder is searched for a task's file by the names that `Source.stems` lists, relative to it, with
any ending that rows are read from (.jsonl, .jsonl.gz, .json, .json.gz, .parquet).
"""

import json
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from drlora_jax.data.sources import SUFFIXES, Row, read_rows
from drlora_jax.errors import UserError
from drlora_jax.evaluation.records import text_hash


class Source(NamedTuple):
    """The places of one file of a data set."""

    stems: tuple[str, ...]  # below --data-dir, without endings; the first that exists is taken
    hub: str | None = None  # NAME or NAME:CONFIG
    split: str = "test"


class Data(NamedTuple):
    """The rows of a file, and what they were."""

    name: str
    rows: list[Row]
    fingerprint: str


def read_source(task: str, source: Source, file: str | None, data_dir: str | None) -> Data:
    """Reads the named file, else the task's file in the folder, else the hub's data set."""
    name = file or _in_folder(source, data_dir)
    if name is None:
        name = _from_hub(task, source, data_dir)
    rows = list(read_rows(name, split=source.split))
    return Data(name, rows, fingerprint(rows))


def fingerprint(rows: Sequence[Row]) -> str:
    """Of what the rows say, not of how their file is packed."""
    return text_hash(json.dumps(row.fields, sort_keys=True, default=str) for row in rows)


def _in_folder(source: Source, data_dir: str | None) -> str | None:
    if data_dir is None:
        return None
    folder = pathlib.Path(data_dir).expanduser()
    if not folder.is_dir():
        raise UserError(f"--data-dir {data_dir} is no directory; give the folder of the data.")
    for stem in source.stems:
        for suffix in SUFFIXES:
            if (file := folder / f"{stem}{suffix}").is_file():
                return str(file)
    return None


def _from_hub(task: str, source: Source, data_dir: str | None) -> str:
    if source.hub and not _is_offline():
        return source.hub
    places = ", ".join(f"{stem}{SUFFIXES[0]}" for stem in source.stems)
    looked = f"--data-dir {data_dir} has none of {places}" if data_dir else "there is no --data-dir"
    hub = f"the hub ({source.hub}) is switched off" if source.hub else "it is not on the hub"
    raise UserError(
        f"No data for {task}: {looked} (or the same with {', '.join(SUFFIXES[1:])}), and {hub}. "
        f"Give a file with --tasks {task}=FILE, or a folder with --data-dir."
    )


def _is_offline() -> bool:
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in names)
