"""Collects run directories into one JSON file, the only source of tables and plots."""

import dataclasses
import json
import pathlib
import statistics

from drlora_jax.config import TrainConfig, from_dict, own_fields
from experiments.study import Cell, Losses, Study, known_cells

RESULTS = pathlib.Path(__file__).parent / "results"
# Differ between any two cells by what a cell is, and say nothing about the method.
PLACES = ("run.dir", "run.seed", "data.path", "data.eval_path", "allocation.pattern")


def finished_losses(study: Study, out: pathlib.Path) -> dict[Cell, float]:
    """Returns the final held-out loss of every finished cell; tuning cells first, because they
    determine the others.
    """
    done: dict[Cell, float] = {}
    for _ in range(2):
        for cell in known_cells(study, done):
            values = read_cell(out / "cells" / cell.key)
            if values is not None:
                done[cell] = values["test_loss"]
    return done


def read_cell(run_dir: pathlib.Path) -> dict | None:
    """Returns the measurements of a finished run; None if it is not finished."""
    try:
        stored = json.loads((run_dir / "config.json").read_text())
        rows = _rows(run_dir / "metrics.jsonl")
    except FileNotFoundError:
        return None
    config = from_dict(stored["config"])
    if not rows or rows[-1]["step"] != config.train.steps or "eval_loss" not in rows[-1]:
        return None
    events = _rows(run_dir / "ranks.jsonl") if (run_dir / "ranks.jsonl").exists() else []
    rates = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    ranks = events[-1]["ranks"] if events else stored["initial_ranks"]
    evaluated = [row for row in rows if "eval_loss" in row]
    return {
        "test_loss": rows[-1]["eval_loss"],
        "curve": [[row.get("tokens", 0), row["eval_loss"]] for row in evaluated],
        "tokens_per_second": statistics.median(rates),
        "peak_memory": max(row.get("host_peak_bytes", 0) for row in rows),  # of the process
        "ranks": ranks,
        "profile": events[0]["saliency"] if events and events[0]["step"] == 0 else None,
        "routing": evaluated[-1].get("routing_load"),  # of the last step's tokens
        "config": stored["config"],
    }


def _rows(file: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def collect(study: Study, out: pathlib.Path) -> dict:
    done: Losses = finished_losses(study, out)
    cells = []
    for cell in done:
        values = read_cell(out / "cells" / cell.key)
        changes = differences(values.pop("config"), study.base)
        cells.append(cell._asdict() | values | {"changes": changes})
    return {"study": study.name, "base": dataclasses.asdict(study.base), "cells": cells}


def differences(stored: dict, base: TrainConfig) -> dict:
    """Returns the fields of a stored config that are not as in the base config, without places and
    what its kinds do not have.
    """
    before = json.loads(json.dumps(dataclasses.asdict(base)))  # as config.json has it
    stored = json.loads(json.dumps(stored))
    changes = {}
    for section, fields in stored.items():
        for name, value in own_fields(section, fields).items():
            if value != before[section][name] and f"{section}.{name}" not in PLACES:
                changes[f"{section}.{name}"] = value
    return changes


def write_results(study: Study, results: dict) -> pathlib.Path:
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{study.name}.json"
    lines = [json.dumps(cell, separators=(",", ":")) for cell in results["cells"]]
    head = json.dumps({"study": results["study"], "base": results["base"]})
    text = head[:-1] + ', "cells": [\n' + ",\n".join(lines) + "\n]}\n"
    file.write_text(text, encoding="utf-8")
    return file


def read_results(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
