"""What the processes of a run or of an evaluation must have in common, compared by digests.

jax takes the values of each process for those of all, so a difference would not show by itself.
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

# Settings that say where something is, fields of a config and options of commands. They may differ
# by host; what is found there is compared instead. An adapter's files are read before: what they
# say is in their place.
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
    """Returns the digest of `expected` with the parts that this process's devices hold in place."""
    held = np.array(expected)
    for shard in array.addressable_shards:
        part = np.asarray(shard.data)
        if not np.array_equal(held[shard.index], part):
            held[shard.index] = part
            break  # a second copy on another device, if right, must not hide it
    return digest(held)


def check_agreement(
    when: str, fields: Mapping[str, str], truths: Mapping[str, str] | None = None
) -> None:
    """Raises RunError, on all processes, when their digests of a field differ.

    Args:
      fields: name to digest, the same names in the same order everywhere.
      truths: of some fields what the digest must be; of the others it is what most processes have,
        process 0 in doubt.
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
            f"The processes of this run do not agree {when}. Not as it must be: "
            f"{', '.join(wrong)}. Look for a broken host, or other files or versions there, and "
            "start the same command again; it goes on from the last checkpoint, which is good."
        )


def disagreements(by_process: list[dict[str, str]], truths: Mapping[str, str]) -> list[str]:
    """Lists which field of which processes is not what it must be; see `check_agreement`."""
    found = []
    for name in by_process[0]:
        values = [fields[name] for fields in by_process]
        most = max(values, key=values.count)  # the first of several
        truth = truths.get(name, most)
        wrong = [str(process) for process, value in enumerate(values) if value != truth]
        if wrong:
            who = "process" if len(wrong) == 1 else "processes"
            found.append(f"{name} of {who} {' and '.join(wrong)}")
    return found


def check_is_shared(file: pathlib.Path) -> None:
    """Raises RunError when a process does not find the file of run.dir that process 0 wrote: its
    part of a checkpoint would be where nobody reads it.
    """
    if jax.process_count() == 1:
        return
    limit = time.monotonic() + SHARED_WITHIN
    written = processes.from_main(_file_digest(file))
    while not np.array_equal(_file_digest(file), written) and time.monotonic() < limit:
        time.sleep(1)  # network file systems show a new file late
    check_agreement(
        "on run.dir, which must be one directory that all share",
        {"run.dir": digest(_file_digest(file))},
        {"run.dir": digest(written)},
    )


def _file_digest(file: pathlib.Path) -> np.ndarray:
    """sha256 of a file, u8 [32]; of nothing if it is not there."""
    content = file.read_bytes() if file.is_file() else b""
    return np.frombuffer(hashlib.sha256(content).digest(), np.uint8)
