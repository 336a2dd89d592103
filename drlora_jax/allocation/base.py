"""What an allocation policy is: who decides the active ranks, and when.

A policy is four functions over plain values; a new method is one file with a factory that checks
its arguments and returns a `Policy`. `accumulate` runs inside the jitted step (jnp); everything
else runs on the host, in NumPy. Letters: L MoE layers, P adapted projections, E experts, R
allocated ranks, M micro-batches.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np


class CapacityShapes(NamedTuple):
    layers: int
    projections: int
    experts: int
    max_rank: int


class CapacityState(NamedTuple):
    """The truth about capacity, on the host."""

    ranks_LE: np.ndarray  # i32, active ranks; the active set is the prefix [0, rank)


class StepStats(NamedTuple):
    """What one optimizer step measured, summed over all devices."""

    gate_grad_MLPER: (
        jax.Array
    )  # f32, d loss / d gate of every rank, by micro-batch; 0 where inactive
    elementwise_LPER: jax.Array | None  # f32, sum|A dA| * sum|B dB|; only if the policy asks for it
    count_MLE: jax.Array  # f32, times each expert was chosen by valid tokens
    weight_MLE: jax.Array  # f32, combine weight each expert got
    tokens_M: jax.Array  # f32, valid tokens
    # f32, |d loss / d B|^2 of every expert's next inactive rank, 0 elsewhere; only if asked for
    probe_LPER: jax.Array | None = None


class Event(NamedTuple):
    """What an update decided, for the record."""

    saliency_LE: np.ndarray  # f32


class Policy(NamedTuple):
    name: str
    init: Callable[[], CapacityState]
    init_stats: Callable[[], Any]  # pytree of f32 arrays that lives in the train state
    accumulate: Callable[[Any, StepStats], Any]  # in the step
    is_event: Callable[[int], bool]  # is there an update after this many optimizer steps?
    update: Callable[[CapacityState, Any, int], tuple[CapacityState, Any, Event]]
    budget: int | list[int]  # active ranks of a layer at the end; [L] where layers differ
    last_event: int = 0  # optimizer steps a run needs at least
    needs_elementwise: bool = False
    needs_probe: bool = False  # the step lets every expert's next inactive rank have a gradient
    # A policy that wants to see how the base routes the task: rows of training data to read before
    # step 1, and from the counts f32 [L, E] the capacity to start with, recorded as an event.
    profile_rows: int = 0
    start: Callable[[np.ndarray], tuple[CapacityState, Event]] | None = None
    describe: str = ""  # one line for the start of a run


def masks_from_ranks(ranks_LE: np.ndarray, max_rank: int) -> np.ndarray:
    """f32 [L, E, R]: 1 for the first `rank` ranks of each expert."""
    return (np.arange(max_rank) < ranks_LE[..., None]).astype(np.float32)
