"""Compares, by digests, what all processes of a run or of an evaluation must agree on.

jax assumes that all processes pass the same values, so a difference would go unnoticed.
"""

import hashlib
import json
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from drlora_jax import config as config_lib
from drlora_jax.errors import RunError
from drlora_jax.parallel import processes

# Settings that name locations: fields of a config and options of commands. They may differ between
# hosts; the contents are compared instead. An adapter's files have been read already, so their
# contents stand in place of their paths.
PLACES = frozenset(
    [
        *(name for name in config_lib.PLACES if not name.startswith("adapter.")),
        *"run model model_path tasks loss data_dir task_path out".split(),
    ]
)
SHARED_WITHIN = 60  # seconds


def digest(*values: Any) -> str:
    """Returns the sha256 of arrays and texts."""
    hashed = hashlib.sha256()
    for value in values:
        part = value if isinstance(value, str) else np.ascontiguousarray(value).tobytes()
        hashed.update(part.encode() if isinstance(part, str) else part)
    return hashed.hexdigest()


def digest_settings(settings: Mapping[str, Any], *more: Any) -> str:
    """Returns the digest of settings by name, except those in PLACES, and of more JSON values."""
    compared = {name: value for name, value in settings.items() if name not in PLACES}
    return digest(json.dumps([compared, *more], sort_keys=True))


def digest_on_devices(array: jax.Array, expected: np.ndarray) -> str:
    """Returns the digest of `expected`, overwritten with what this process's devices hold."""
    held = np.array(expected)
    for shard in array.addressable_shards:
        part = np.asarray(shard.data)
        if not np.array_equal(held[shard.index], part):
            held[shard.index] = part
            break  # an intact copy on another device must not hide the difference
    return digest(held)


def check_agreement(
    when: str, fields: Mapping[str, str], truths: Mapping[str, str] | None = None
) -> None:
    """Raises RunError, on all processes, when their digests of a field differ.

    Args:
      fields: Name to digest, the same names in the same order on every process.
      truths: The correct digests of some fields; for the others it is the digest that most
        processes have, or that of process 0 in case of a tie.
    """
    own = np.array([list(bytes.fromhex(each)) for each in fields.values()], np.uint8)
    all_PFB = own[None]
    if jax.process_count() > 1:
        all_PFB = np.asarray(multihost_utils.process_allgather(own))
    by_process = [
        {name: bytes(row).hex() for name, row in zip(fields, rows_FB, strict=True)}
        for rows_FB in all_PFB
    ]
    wrong = disagreements(by_process, truths or {})
    if wrong:
        raise RunError(
            f"The processes of this run disagree {when}: {', '.join(wrong)}. Check that host for "
            "hardware faults and for different files or versions, then start the same command "
            "again; it resumes from the last checkpoint, which is intact."
        )


def disagreements(by_process: list[dict[str, str]], truths: Mapping[str, str]) -> list[str]:
    """Lists which fields differ on which processes; see `check_agreement`."""
    found = []
    for name in by_process[0]:
        values = [fields[name] for fields in by_process]
        most = max(values, key=values.count)  # the first in case of a tie
        truth = truths.get(name, most)
        wrong = [str(process) for process, value in enumerate(values) if value != truth]
        if wrong:
            who = "process" if len(wrong) == 1 else "processes"
            found.append(f"{name} differs on {who} {' and '.join(wrong)}")
    return found


def check_is_shared(file: pathlib.Path) -> None:
    """Raises RunError when a process does not find the file that process 0 wrote to run.dir: its
    part of a checkpoint would be written where no other process reads it.
    """
    if jax.process_count() == 1:
        return
    limit = time.monotonic() + SHARED_WITHIN
    written = processes.from_main(_file_digest(file))
    while not np.array_equal(_file_digest(file), written) and time.monotonic() < limit:
        time.sleep(1)  # network file systems show new files with a delay
    check_agreement(
        "on run.dir, which must be one directory shared by all",
        {"run.dir": digest(_file_digest(file))},
        {"run.dir": digest(written)},
    )


def _file_digest(file: pathlib.Path) -> np.ndarray:
    """Returns the sha256 of a file, u8 [32]; that of no bytes if the file does not exist."""
    content = file.read_bytes() if file.is_file() else b""
    return np.frombuffer(hashlib.sha256(content).digest(), np.uint8)
