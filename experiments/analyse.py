"""Computes the figures of a study: pure functions from its results to numbers.

Losses are nats per target token on held-out rows after the last step. Differences are paired by
seed (same data order, same initial LoRA matrices up to the rank, same dropout) and have Student's
95 % interval.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Paired(NamedTuple):
    mean: float
    low: float
    high: float
    n: int

    @property
    def is_shown(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


class Relation(NamedTuple):
    """The correlation of two values over the experts of a layer, over runs and layers."""

    correlation: float  # mean of Pearson's r within a layer
    layers: list[float]


def select(results: dict, *, task: str, arm: str, is_tuning: bool = False) -> dict[int, dict]:
    """Selects cells of an arm by seed (test cells) or by learning rate (tuning cells)."""
    cells = [
        cell
        for cell in results["cells"]
        if (cell["task"], cell["arm"], cell["is_tuning"]) == (task, arm, is_tuning)
    ]
    return {cell["learning_rate" if is_tuning else "seed"]: cell for cell in cells}


def paired(first: Sequence[float], second: Sequence[float]) -> Paired:
    """Returns second - first, pair by pair: mean and Student's 95 % interval (n - 1 degrees)."""
    steps = np.asarray(second, np.float64) - np.asarray(first, np.float64)
    mean, n = float(steps.mean()), steps.size
    if n < 2:
        return Paired(mean, -math.inf, math.inf, n)
    half = float(stats.t.ppf(0.975, n - 1)) * float(steps.std(ddof=1)) / math.sqrt(n)
    return Paired(mean, mean - half, mean + half, n)


def compare(results: dict, task: str, reference: str, arm: str, value="test_loss") -> Paired | None:
    """Returns `arm` minus `reference` over the seeds that both have; None if there are none."""
    one, other = (select(results, task=task, arm=name) for name in (reference, arm))
    seeds = sorted(one.keys() & other.keys())
    if not seeds:
        return None
    return paired([one[seed][value] for seed in seeds], [other[seed][value] for seed in seeds])


def relation(ranks_RLE: np.ndarray, value_RLE: np.ndarray) -> Relation:
    """Returns Pearson's r of ranks and another value over the experts of a layer, averaged over
    runs R.
    """
    by_layer = []
    for layer in range(ranks_RLE.shape[1]):
        pairs = zip(ranks_RLE[:, layer], value_RLE[:, layer], strict=True)
        by_layer.append(float(np.mean([_pearson(*pair) for pair in pairs])))
    return Relation(float(np.mean(by_layer)), by_layer)


def _pearson(one: np.ndarray, other: np.ndarray) -> float:
    one, other = one - one.mean(), other - other.mean()
    size = math.sqrt(float((one**2).sum() * (other**2).sum()))
    return float((one * other).sum()) / size if size else 0.0


def effective_rank(ranks_LE: np.ndarray, load_LE: np.ndarray) -> float:
    """Returns the mean active rank over a token's choices: sum of load * rank, averaged over
    layers.
    """
    load_LE = load_LE / load_LE.sum(axis=1, keepdims=True)
    return float((ranks_LE * load_LE).sum(axis=1).mean())


def base_shares(results: dict, task: str) -> np.ndarray | None:
    """Returns the share of choices per expert, [L, E], of the base model on the task's training
    rows.
    """
    profiles = [
        cell["profile"] for cell in results["cells"] if cell["task"] == task and cell["profile"]
    ]
    return np.mean(profiles, axis=0) if profiles else None
