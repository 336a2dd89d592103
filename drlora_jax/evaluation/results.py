"""Turns samples into scores and writes both: the printed table, eval.json and files of samples.

`<run>/eval.json` holds one object, `{"scores": [...]}`. A new score replaces the one with the same
task, metric, checkpoint step, base model and settings; all others are kept. `<run>/eval/` has one
file per task with one JSON line per sample.
"""

import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence

import numpy as np

from drlora_jax.errors import UserError
from drlora_jax.evaluation import statistics
from drlora_jax.evaluation.records import Sample, Score
from drlora_jax.system.paths import write_result

_SAME = ("task", "metric", "version", "step", "settings", "seed", "data_fingerprint")
_SAME += ("base_fingerprint",)


def scores_of(samples: Sequence[Sample], metrics: Sequence[str], common: Mapping) -> list[Score]:
    """Returns one score per metric, and after a loss its perplexity; `common` are other fields."""
    weights = [sample.weight for sample in samples]
    found = []
    for metric in metrics:
        value = statistics.estimate([sample.values[metric] for sample in samples], weights)
        found.append((metric, value))
        if metric == "loss":
            found.append(("perplexity", statistics.exponential(value)))
    return [Score(metric=metric, **value._asdict(), **common) for metric, value in found]


def table(scores: Sequence[Score]) -> str:
    """Formats scores as a table with aligned columns."""
    rows = [("task", "metric", "value", "stderr", "95 % interval", "n", "step")]
    for score in scores:
        decimals = _decimals(score)
        stderr = "" if score.stderr is None else f"{score.stderr:,.{decimals}f}"
        ends = ""
        if score.ci95 is not None:
            ends = " to ".join(f"{end:,.{decimals}f}" for end in score.ci95)
        step = "base" if score.step is None else str(score.step)
        value = f"{score.value:,.{decimals}f}"
        rows.append((score.task, score.metric, value, stderr, ends, str(score.n), step))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    left = {0, 1}
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def chance_lines(scores: Sequence[Score]) -> list[str]:
    """Returns a line for every accuracy whose interval is not above chance."""
    lines = []
    for score in scores:
        if score.chance is None or not score.ci95 or score.ci95[0] > score.chance:
            continue
        relation = "cannot be distinguished from chance ({}, inside its interval)"
        if score.ci95[1] < score.chance:
            relation = "is below chance ({}, above its interval)"
        what = f"{score.task} {score.metric}: {score.value:.4f}"
        lines.append(f"{what} {relation.format(f'{score.chance:.4f}')}")
    return lines


def _decimals(score: Score) -> int:
    """Returns 4, or for a perplexity what gives four significant digits: 3.207 or 2,267."""
    if not score.metric.endswith("perplexity") or not 1 <= score.value < 1e9:
        return 4
    return max(0, 4 - len(str(int(score.value))))


def about(loaded, seed: int, settings: Mapping, *, label: str) -> dict:
    """Returns the fields of a task's scores that follow from model and settings."""
    settings = {**settings, "dtype": np.dtype(loaded.model.options.dtype).name}
    return {
        "step": loaded.step,
        "seed": seed,
        "base_fingerprint": loaded.base_fingerprint,
        "settings": settings,
        "samples": samples_name(label, loaded.step, settings),
    }


def samples_name(task: str, step: int | None, settings: Mapping) -> str:
    """Returns the path of a task's file of samples, relative to the run directory."""
    parts = [re.sub(r"[^A-Za-z0-9_.@-]+", "-", task)]
    parts += [f"{name}{settings[name]}" for name in ("shots", "limit") if name in settings]
    if "chat" in settings:
        parts.append("chat" if settings["chat"] else "nochat")
    parts.append("base" if step is None else f"step{step}")
    return f"eval/{'-'.join(parts)}.jsonl"


def write_samples(folder: pathlib.Path, name: str, samples: Sequence[Sample]) -> None:
    lines = [
        {"id": sample.id, **sample.fields, "values": sample.values, "weight": sample.weight}
        for sample in samples
    ]
    write_result(folder / name, "".join(json.dumps(line) + "\n" for line in lines))


def write_scores(folder: pathlib.Path, scores: Sequence[Score]) -> None:
    """Adds scores to eval.json, keeping those that were not measured again."""
    file = folder / "eval.json"
    rows = {_key(row): row for row in _stored(file)}
    # A score that is measured again moves to the end: the file is in chronological order.
    for row in (json.loads(json.dumps(score.row())) for score in scores):
        rows.pop(_key(row), None)
        rows[_key(row)] = row
    write_result(file, json.dumps({"scores": list(rows.values())}, indent=1) + "\n")


def check_writable(folder: pathlib.Path) -> None:
    """Checks, before any work, that eval.json can be read and the folder is writable."""
    _stored(folder / "eval.json")
    try:
        (folder / "eval").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}.") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder} cannot be written; change its permissions or set --out DIR.")


def _key(row: Mapping) -> str:
    return json.dumps([row.get(name) for name in _SAME], sort_keys=True)


def _stored(file: pathlib.Path) -> list[dict]:
    if not file.exists():
        return []
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))["scores"]
        if all(isinstance(row, dict) for row in rows):
            return rows
        raise ValueError("scores is not a list of objects")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} cannot be read ({type(error).__name__}: {error}) and would be replaced; move "
            "it away."
        ) from error
