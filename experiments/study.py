"""Defines experiments: tasks x arms x seeds of one base config, and their cells.

An arm is what is compared: a few config overrides. Its learning rate is chosen per task on one
extra seed, with held-out rows (`tune_rows`) that the comparison (`test_rows`) does not use. A cell
is one training run. It may need others first: the tuning cells of its arm, or the run whose final
ranks it starts with.
"""

import importlib.util
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

from drlora_jax.config import TrainConfig


class Task(NamedTuple):
    name: str
    train_rows: str  # files
    tune_rows: str
    test_rows: str
    learning_rates: tuple[float, ...]  # of the tuning cells of every arm
    overrides: tuple[str, ...] = ()


class Arm(NamedTuple):
    name: str
    about: str  # one line for tables
    overrides: tuple[str, ...]
    ranks_of: str | None = None  # an arm whose final ranks, same task and seed, are the pattern
    rate_of: str | None = None  # an arm whose tuned learning rate it takes; None: tuned itself


class Study(NamedTuple):
    name: str
    base: TrainConfig
    tasks: tuple[Task, ...]
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    tuning_seed: int
    reference: str  # the arm that the others are compared with

    def task(self, name: str) -> Task:
        return next(task for task in self.tasks if task.name == name)

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)


class Cell(NamedTuple):
    task: str
    arm: str
    learning_rate: float
    seed: int
    is_tuning: bool

    @property
    def key(self) -> str:
        """Where it lies below the output directory."""
        kind = "tune" if self.is_tuning else "test"
        return f"{self.task}/{self.arm}/{kind}-lr{self.learning_rate:g}-seed{self.seed}"


Losses = Mapping[Cell, float]  # final held-out loss of the cells that are done


def load_study(path: pathlib.Path) -> Study:
    spec = importlib.util.spec_from_file_location("study_file", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_study()


def tuning_cells(study: Study, task: str, arm: str) -> list[Cell]:
    rates = study.task(task).learning_rates
    return [Cell(task, arm, rate, study.tuning_seed, True) for rate in rates]


def tuned_rate(study: Study, task: str, arm: str, done: Losses) -> float | None:
    """Returns the learning rate with the smallest tuning loss; None until all are measured."""
    arm = study.arm(arm).rate_of or arm
    cells = tuning_cells(study, task, arm)
    if any(cell not in done for cell in cells):
        return None
    return min(cells, key=lambda cell: done[cell]).learning_rate


def source_of_ranks(study: Study, cell: Cell, done: Losses) -> Cell | None:
    """Returns the run whose final ranks a cell uses: same task and seed, at its arm's own rate."""
    source = study.arm(cell.arm).ranks_of
    if source is None:
        return None
    rate = tuned_rate(study, cell.task, source, done)
    return None if rate is None else Cell(cell.task, source, rate, cell.seed, cell.is_tuning)


def known_cells(study: Study, done: Losses) -> list[Cell]:
    """Returns all cells that can be named so far: every tuning cell, and the test cells of tuned
    arms.
    """
    cells = []
    for task in study.tasks:
        for arm in study.arms:
            if arm.rate_of is None:
                cells += tuning_cells(study, task.name, arm.name)
    for seed in study.seeds:  # seed by seed, so that an early look compares all arms
        for task in study.tasks:
            for arm in study.arms:
                rate = tuned_rate(study, task.name, arm.name, done)
                if rate is not None:
                    cells.append(Cell(task.name, arm.name, rate, seed, False))
    return cells


def ready_cells(study: Study, done: Losses) -> list[Cell]:
    """Returns the unfinished cells whose requirements are finished, in the order to run them."""
    ready = []
    for cell in known_cells(study, done):
        if cell in done:
            continue
        needs_ranks = study.arm(cell.arm).ranks_of is not None
        if not needs_ranks or source_of_ranks(study, cell, done) in done:
            ready.append(cell)
    return ready


def count_cells(study: Study) -> int:
    tuned = sum(arm.rate_of is None for arm in study.arms)
    tuning = tuned * sum(len(task.learning_rates) for task in study.tasks)
    return tuning + len(study.tasks) * len(study.arms) * len(study.seeds)


def overrides_of(study: Study, cell: Cell, out: pathlib.Path, done: Losses) -> list[str]:
    """Returns the overrides that turn the base config into the cell's, as on the command line."""
    task, arm = study.task(cell.task), study.arm(cell.arm)
    changes = [
        f"run.dir={out / 'cells' / cell.key}",
        f"run.seed={cell.seed}",
        f"train.learning_rate={cell.learning_rate:g}",
        f"data.path={task.train_rows}",
        f"data.eval_path={task.tune_rows if cell.is_tuning else task.test_rows}",
        *task.overrides,
        *arm.overrides,
    ]
    source = source_of_ranks(study, cell, done)
    if source is not None:
        changes.append(f"allocation.pattern={out / 'cells' / source.key / 'ranks.jsonl'}")
    return changes
