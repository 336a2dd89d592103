"""Estimates mean, standard error, 95 % interval and paired difference from samples.

Values are averaged with weights (a loss weighs documents by their target tokens), as a ratio
estimate: m = sum w x / sum w, and stderr^2 = n / (n - 1) * sum w^2 (x - m)^2 / (sum w)^2, which is
s / sqrt(n) for equal weights. Proportions have Wilson's interval, which stays inside [0, 1] and
does not shrink to a point at 0 of n.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from drlora_jax.errors import UserError

Z95 = 1.959963984540054  # the 97.5 % quantile of the standard normal distribution
DRAWS = 20_000  # permutations of the randomisation test
SIGNIFICANT = 0.05


class Estimate(NamedTuple):
    value: float
    stderr: float | None  # None for a single sample
    ci95: tuple[float, float] | None
    n: int


class Comparison(NamedTuple):
    """Holds the second evaluation minus the first, item by item."""

    n: int
    difference: float
    stderr: float | None
    ci95: tuple[float, float] | None
    p_value: float
    is_shown: bool  # the difference exceeds noise


def estimate(values: Sequence[float], weights: Sequence[float] | None = None) -> Estimate:
    """Estimates the weighted mean of at least one sample."""
    x = np.asarray(values, np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, np.float64)
    if x.size == 0 or not w.sum() > 0:
        raise ValueError("A mean needs at least one sample of positive weight.")
    mean, n = float(np.average(x, weights=w)), x.size
    if n == 1:
        return Estimate(mean, None, None, 1)
    stderr = math.sqrt(n / (n - 1) * float(np.sum((w * (x - mean)) ** 2))) / float(w.sum())
    is_share = bool(np.isin(x, (0.0, 1.0)).all() and (w == w[0]).all())
    ends = wilson(int(x.sum()), n) if is_share else (mean - Z95 * stderr, mean + Z95 * stderr)
    return Estimate(mean, stderr, ends, n)


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Returns Wilson's 95 % interval of a proportion."""
    share, z2 = successes / n, Z95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # Exact ends, where rounding would leave them slightly inside or outside.
    low = 0.0 if successes == 0 else middle - half
    return low, 1.0 if successes == n else middle + half


def exponential(loss: Estimate) -> Estimate:
    """Returns the perplexity of a loss: the interval is transformed, the error is first order."""
    value = math.exp(loss.value) if loss.value < 700 else math.inf
    if loss.stderr is None or not math.isfinite(value):
        return Estimate(value, None, None, loss.n)
    low, high = (math.exp(min(end, 700.0)) for end in loss.ci95)
    return Estimate(value, value * loss.stderr, (low, high), loss.n)


def mutual_information(shares_DE: np.ndarray) -> float:
    """Returns the mutual information of domain and expert in nats, with equally likely domains;
    rows are shares of routing choices.
    """
    joint_DE = shares_DE / shares_DE.sum()
    expected_DE = joint_DE.sum(axis=1, keepdims=True) * joint_DE.sum(axis=0, keepdims=True)
    filled = joint_DE > 0
    return float((joint_DE[filled] * np.log(joint_DE[filled] / expected_DE[filled])).sum())


def compare(
    first: Mapping[str, tuple[float, float]], second: Mapping[str, tuple[float, float]]
) -> Comparison:
    """Compares two evaluations of the same items, pair by pair.

    The p value is that of a randomisation test that swaps the two results of an item at random; for
    binary results it is McNemar's exact test up to sampling error.

    Args:
      first: Item id -> (value, weight).
      second: Likewise.
    """
    if first.keys() != second.keys() or not first:
        missing = sorted(first.keys() ^ second.keys())[:3]
        raise UserError(
            f"The two evaluations have different items ({len(first)} and {len(second)}; for "
            f"example {', '.join(missing) or 'none at all'}); compare the same task, file, limit "
            "and seed."
        )
    weights = np.array([first[key][1] for key in first])
    steps = np.array([second[key][0] - first[key][0] for key in first])
    estimated = estimate(steps, weights)
    # Not the interval of a proportion, even if all differences are 0 or 1.
    half = Z95 * estimated.stderr if estimated.stderr is not None else None
    ends = None if half is None else (estimated.value - half, estimated.value + half)
    p_value = _randomisation(steps * weights)
    return Comparison(
        len(steps), estimated.value, estimated.stderr, ends, p_value, p_value < SIGNIFICANT
    )


def _randomisation(steps: np.ndarray) -> float:
    """Returns the two-sided p value of sum(steps) under random signs, with a fixed seed."""
    moved = steps[steps != 0]
    if moved.size == 0:
        return 1.0
    draw, observed, extreme = np.random.default_rng(0), abs(moved.sum()), 0
    part = max(1, min(DRAWS, 4_000_000 // moved.size))  # bounds the memory
    done = 0
    while done < DRAWS:
        count = min(part, DRAWS - done)
        signs = draw.integers(0, 2, size=(count, moved.size), dtype=np.int8) * 2 - 1
        # With a tolerance: sums of the same numbers with other signs differ in the last digit.
        extreme += int(np.sum(np.abs(signs @ moved) >= observed * (1 - 1e-9)))
        done += count
    return (extreme + 1) / (DRAWS + 1)
