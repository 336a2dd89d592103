"""Identifies the run of a checkpoint by the run's id and a digest of its stored config.

The digest covers config.json as it is in the run directory, without the fields that may change on
a resume. The names of those are stored with it, because versions differ in what may change.
"""

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import xxhash

from drlora_jax.config.flat import flat
from drlora_jax.runs.resume import free_names
from drlora_jax.system.paths import ABSENT, kind_of, read_json


def identity_of(run_dir: pathlib.Path) -> dict[str, Any]:
    """Returns the identity that a checkpoint stores; empty without a config.json."""
    stored = _stored(run_dir)
    if stored is None:
        return {}
    names = free_names()
    config = {"digest": _digest(stored["config"], names), "without": names}
    return {"run_id": stored.get("run_id"), "config": config}


def find_difference(run_dir: pathlib.Path, found: Mapping[str, Any]) -> str | None:
    """Returns why a checkpoint with the identity `found` belongs to another run; None if it does
    not.
    """
    stored = _stored(run_dir)
    if stored is None or "config" not in found:
        return None
    if found["run_id"] != stored.get("run_id"):
        return "it belongs to another run"
    if found["config"]["digest"] != _digest(stored["config"], found["config"]["without"]):
        return f"it was saved with a config different from {run_dir / 'config.json'}"
    return None


def _stored(run_dir: pathlib.Path) -> dict | None:
    file = run_dir / "config.json"
    return None if kind_of(file) == ABSENT else read_json(file)


def _digest(config: Mapping[str, Mapping[str, Any]], without: Iterable[str]) -> str:
    kept = {name: value for name, value in flat(config).items() if name not in without}
    return xxhash.xxh3_128_hexdigest(json.dumps(kept, sort_keys=True).encode())
