"""Times functions for benchmarks: after a warm-up, waiting for results, in turns, ratios per round.

A call of less than a few milliseconds is repeated within one measurement: a device that reads
programs from a queue receives as many as fill `MEASUREMENT` seconds, and only the last result is
waited for. A CPU may run such programs side by side, so there every call is waited for.
"""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

NORMAL_95 = 1.96
MEASUREMENT = 0.05  # seconds that one is to take
MOST_CALLS = 10_000


class Ratio(NamedTuple):
    """Of times of the same rounds: their mean with a 95 % interval, and their median."""

    mean: float
    low: float
    high: float
    median: float
    rounds: int


def seconds_of(function: Callable, *args, calls: int = 1) -> float:
    """Returns the seconds per call, averaged over consecutive calls."""
    is_queue = jax.default_backend() != "cpu"
    start = time.perf_counter()
    for _ in range(calls):
        out = function(*args)
        if not is_queue:
            jax.block_until_ready(out)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / calls


def calls_that_fill(function: Callable, *args, seconds: float = MEASUREMENT) -> int:
    """Returns how many calls take about `seconds`; a single timed call also includes its launch."""
    alone = seconds_of(function, *args)
    calls = _bounded(seconds / alone)
    return _bounded(seconds / seconds_of(function, *args, calls=calls)) if calls > 1 else 1


def _bounded(calls: float) -> int:
    return int(min(max(calls, 1), MOST_CALLS))


def median_seconds(function: Callable, *args, repeats: int = 20, warmup: int = 3) -> float:
    """Returns the seconds per call: the median of measurements of about `MEASUREMENT` seconds or
    one call each.
    """
    for _ in range(warmup):
        seconds_of(function, *args)
    calls = calls_that_fill(function, *args)
    return statistics.median(seconds_of(function, *args, calls=calls) for _ in range(repeats))


def in_turns(functions: dict, rounds: int, warmup: int = 3) -> dict:
    """Returns the seconds of each function, called once per round in changing order, so that none
    always runs after the same one.
    """
    draw, names = np.random.default_rng(1), list(functions)
    seconds: dict = {name: [] for name in names}
    for index in range(warmup + rounds):
        for place in draw.permutation(len(names)):
            name = names[place]
            taken = seconds_of(functions[name])
            if index >= warmup:
                seconds[name].append(taken)
    return {name: np.array(taken) for name, taken in seconds.items()}


def ratio(seconds_N: np.ndarray, base_N: np.ndarray) -> Ratio:
    ratios_N = seconds_N / base_N
    spread = ratios_N.std(ddof=1) if len(ratios_N) > 1 else float("nan")
    half = NORMAL_95 * spread / len(ratios_N) ** 0.5
    mean = ratios_N.mean()
    return Ratio(mean, mean - half, mean + half, float(np.median(ratios_N)), len(ratios_N))


def matmul_bound(side: int, dtype) -> tuple[Callable, int]:
    """Returns a product of square matrices to time, and its floating-point operations."""
    keys = jax.random.split(jax.random.key(0))
    left, right = (jax.random.normal(key, (side, side), dtype) for key in keys)
    product = jax.jit(jnp.matmul)
    return lambda: product(left, right), 2 * side**3


def copy_bound(side: int, dtype) -> tuple[Callable, int]:
    """Returns a pass over an array of side^2 to time, and the bytes that it reads and writes."""
    array = jax.random.normal(jax.random.key(0), (side, side), dtype)
    add = jax.jit(lambda array: array + 1)
    return lambda: add(array), 2 * array.nbytes


def first_line(error: Exception) -> str:
    """Returns the first line of a failed measurement's error."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"
