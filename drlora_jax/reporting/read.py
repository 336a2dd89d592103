"""Reads the files of a run directory for a report, whatever state they are in.

A run may still be going, may have been killed in the middle of a line, or may have been written by
an older version that logged less. Everything readable is used; unreadable lines are skipped and
counted. Only directories that are no run are refused.
"""

import datetime
import json
import math
import pathlib
from typing import Any, NamedTuple

from drlora_jax.config.flat import flat
from drlora_jax.errors import UserError
from drlora_jax.interop.directories import why_no_run
from drlora_jax.system.paths import ABSENT, FILE, check_downloaded, kind_of

Matrix = list[list[float]]  # by layer and expert; layers may differ in experts


class Frame(NamedTuple):
    """A layers x experts map that holds from `step` on."""

    step: int
    values: Matrix


class RunLog(NamedTuple):
    directory: pathlib.Path
    name: str
    config: dict[str, Any]  # by section.field
    facts: dict[str, Any]  # the rest of config.json: versions, devices, fingerprints
    metrics: list[dict]
    events: list[dict]
    evaluations: list[dict]
    skipped_lines: int
    last_logged: str  # time of the newest row


def read_run(directory: pathlib.Path) -> RunLog:
    """Reads everything that a report shows; raises UserError if the directory is no run."""
    stored = _read_config(directory)
    metrics, bad_metrics = _read_rows(directory / "metrics.jsonl")
    events, bad_events = _read_rows(directory / "ranks.jsonl")
    return RunLog(
        directory=directory,
        name=directory.absolute().name,
        config=flat(stored.pop("config")),
        facts=stored,
        metrics=metrics,
        events=[row for row in events if is_matrix(row.get("ranks"))],
        evaluations=_read_evaluations(directory / "eval.json"),
        skipped_lines=bad_metrics + bad_events,
        last_logged=_modified(directory / "metrics.jsonl"),
    )


def _read_config(directory: pathlib.Path) -> dict:
    file = directory / "config.json"
    if not directory.is_dir():
        what = "is a file" if directory.exists() else "no such directory"
        raise UserError(f"{directory}: {what}; give the run.dir of a training run.")
    check_downloaded(file)
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{directory} {why_no_run(directory)}.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}.") from error
    sections = stored.get("config") if isinstance(stored, dict) else None
    if not isinstance(sections, dict) or not all(isinstance(s, dict) for s in sections.values()):
        raise UserError(f"{directory} {why_no_run(directory)}.")
    return stored


def _read_rows(file: pathlib.Path) -> tuple[list[dict], int]:
    """Returns the objects of a JSONL file that have a step, and the number of lines left out."""
    kind = kind_of(file)
    if kind == ABSENT:
        return [], 0
    if kind != FILE:  # reading a pipe or a device might never end
        raise UserError(f"{file} is {kind}; a run's log is a regular file.")
    check_downloaded(file)
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}.") from error
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:  # a line that a kill cut short
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows, len(lines) - len(rows)


def _read_evaluations(file: pathlib.Path) -> list[dict]:
    """Returns rows of task, metric and value; an object may hold them under any key, or be one."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [row for row in _rows_in(found) if is_number(row.get("value"))]


def _rows_in(found) -> list[dict]:
    if isinstance(found, list):
        return [row for row in found if isinstance(row, dict)]
    if not isinstance(found, dict):
        return []
    if "value" in found:
        return [found]
    rows = []
    for name, value in found.items():
        named = isinstance(value, dict) and "value" in value
        rows += [{"task": name} | value] if named else _rows_in(value)
    return rows


def _modified(file: pathlib.Path) -> str:
    try:
        seconds = file.stat().st_mtime
    except OSError:
        return ""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_matrix(value) -> bool:
    """Returns whether a value is a list of one or more lists of finite numbers."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(row, list) and all(map(is_number, row)) for row in value)
    )


def curve(run: RunLog, name: str) -> list[tuple[int, float]]:
    """Returns (step, value) of a figure of metrics.jsonl, where it was measured."""
    return [(row["step"], row[name]) for row in run.metrics if is_number(row.get(name))]


def frames(run: RunLog, name: str) -> list[Frame]:
    """Returns the maps of that name in the logs, by step. Ranks begin with the initial ones."""
    by_step = {row["step"]: row[name] for row in run.metrics if is_matrix(row.get(name))}
    by_step |= {row["step"]: row[name] for row in run.events if is_matrix(row.get(name))}
    if name == "ranks" and is_matrix(run.facts.get("initial_ranks")):
        by_step.setdefault(0, run.facts["initial_ranks"])
    return [Frame(step, by_step[step]) for step in sorted(by_step)]


def layer_indices(run: RunLog, count: int) -> list[int]:
    """Returns the model's layer index of every row of a map; 0, 1, ... if it was not logged."""
    for found in (run.events[-1].get("layers") if run.events else None, run.facts.get("layers")):
        if isinstance(found, list) and len(found) == count and all(map(is_number, found)):
            return found
    return list(range(count))


def budgets(run: RunLog, layers: int) -> list[int] | None:
    """Returns the active ranks that each layer has at the end; logged as one number if all are
    equal.
    """
    found = run.events[-1].get("budget") if run.events else run.facts.get("budget")
    if is_number(found):
        return [found] * layers
    is_whole = isinstance(found, list) and len(found) == layers and all(map(is_number, found))
    return found if is_whole else None


def total_steps(run: RunLog) -> int | None:
    found = run.config.get("train.steps") or run.facts.get("schedule_steps")
    return found if is_number(found) else None


def last_step(run: RunLog) -> int:
    return max((row["step"] for row in (*run.metrics, *run.events)), default=0)
