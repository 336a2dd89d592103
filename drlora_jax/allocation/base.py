"""Defines an allocation policy, which decides which ranks are active, and when.

A policy is one file. It declares its own config fields as a `PolicyFields`, whose `make` returns a
`Policy`: functions over plain values. `accumulate` runs inside the jitted step (jnp); everything
else runs on the host, in NumPy. Letters: L MoE layers, P adapted projections, E experts, R
allocated ranks, M micro-batches.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from drlora_jax.allocation.spectra import Exponents
from drlora_jax.system.fields import positive

if TYPE_CHECKING:
    from drlora_jax.allocation.measurements import Measurement

LARGEST_RANK = 65536


class CapacityShapes(NamedTuple):
    layers: int
    projections: int
    experts: int
    max_rank: int


class CapacityState(NamedTuple):
    """Holds the active ranks of all experts, on the host; masks are derived from it."""

    ranks_LE: np.ndarray  # i32, active ranks; the active set is the prefix [0, rank)


class StepStats(NamedTuple):
    """Holds the measurements of one optimizer step, summed over all devices."""

    # f32, d loss / d gate of every rank, per micro-batch; 0 where inactive.
    gate_grad_MLPER: jax.Array
    count_MLE: jax.Array  # f32, number of valid tokens that chose each expert
    weight_MLE: jax.Array  # f32, sum of the combine weights of each expert
    tokens_M: jax.Array  # f32, valid tokens
    # Values of the policy's `measures`, by their names.
    measured: dict[str, jax.Array] = {}


class Event(NamedTuple):
    """Records the decision of an update."""

    saliency_LE: np.ndarray  # f32
    # i32, for a policy that prunes: new rank k of an expert is its old rank order[k], so that the
    # active ranks stay a prefix. LoRA matrices and optimizer moments are reordered with them; the
    # policy reorders its own statistics.
    order_LER: np.ndarray | None = None


class Profile(NamedTuple):
    """Declares what a policy measures before step 1, on the first rows of the training data."""

    rows: int
    # Names of `PROFILE_PASSES` in training/growth.py: each is a pass over the rows that yields an
    # array, summed over the rows.
    measures: tuple[str, ...]
    # Maps the sums, by name, to the initial capacity, which is recorded as an event.
    decide: Callable[[dict[str, np.ndarray]], tuple[CapacityState, Event]]


class Policy(NamedTuple):
    name: str
    init: Callable[[], CapacityState]
    init_stats: Callable[[], Any]  # pytree of f32 arrays that is part of the train state
    accumulate: Callable[[Any, StepStats], Any]  # runs inside the jitted step
    is_event: Callable[[int], bool]  # whether `update` is due after this many optimizer steps
    update: Callable[[CapacityState, Any, int], tuple[CapacityState, Any, Event]]
    # Active ranks per layer at the end; one number per layer where layers differ.
    budget: int | tuple[int, ...]
    # The axes of the statistics: a pytree of the same structure, with letters such as "LE" or
    # "LPER" as leaves. An axis E is sharded with the experts; without axes statistics are
    # replicated.
    stat_axes: Any = None
    last_event: int = 0  # the fewest optimizer steps that a run needs
    # Measurements of every step for `accumulate`, besides gates and routing.
    measures: tuple["Measurement", ...] = ()
    profile: Profile | None = None
    describe: str = ""  # one line for the start of a run


class Context(NamedTuple):
    """Describes what a policy is built for: a model, a run, and the fields that all policies
    share.
    """

    shapes: CapacityShapes
    r_target: int
    total_steps: int = 0  # length of the schedule
    warmup_ratio: float = 0.0  # warm-up of the learning rate
    seed: int = 0
    # Experts of every layer where they differ; () where all layers have the same number.
    counts_L: tuple[int, ...] = ()
    # The adapter brings its own experts, instead of adapting those of the base model.
    has_new_experts: bool = False
    # Reads or computes the exponents of the base model's weights.
    exponents: Callable[[], Exponents] | None = None


class PolicyFields:
    """Base class of the frozen dataclasses that hold a policy's own config fields.

    `section` is the config section `allocation`, of which `r_target` and `r_max` are shared by all
    policies; `adapter` is the section `adapter`.
    """

    name: ClassVar[str]
    text: ClassVar[str]  # one line for the reference
    # The policy distributes ranks among the experts of a layer.
    needs_experts: ClassVar[bool] = True
    # The policy distributes ranks among layers, which must have the same number of experts.
    shares_among_layers: ClassVar[bool] = False
    # False: `make` receives layers with different numbers of experts as they are, in `counts_L`.
    wants_equal_layers: ClassVar[bool] = True

    def check(self, section: Any) -> None:
        """Refuses invalid values."""
        positive("allocation", {"r_target": section.r_target, "r_max": section.r_max})

    def refuses(self, section: Any, adapter: Any) -> str | None:
        """Returns why the policy cannot allocate for a placement; None if it can."""
        return None

    def allocated_rank(self, section: Any, adapter: Any) -> int:
        """Returns the number of ranks that are allocated for every expert."""
        return section.r_max

    def wants_exponents(self) -> bool:
        """Returns whether `make` needs the exponents of the base model's weights."""
        return False

    def first_ranks_show_files(self) -> bool:
        """Returns whether two input files that give the same initial ranks give the same run."""
        return True

    def make(self, context: Context) -> Policy:
        raise NotImplementedError


def static_policy(
    name: str, ranks_LE: np.ndarray, *, budget: int | tuple[int, ...], describe: str
) -> Policy:
    """Returns a policy whose ranks stay constant from the first step to the last."""

    def update(state, stats, step):
        raise AssertionError(f"{name} has no events, asked at step {step}")

    return Policy(
        name=name,
        init=lambda: CapacityState(ranks_LE.astype(np.int32)),  # a copy
        init_stats=lambda: (),
        accumulate=lambda stats, step_stats: stats,
        is_event=lambda step: False,
        update=update,
        budget=budget,
        stat_axes=(),
        describe=describe,
    )


def zero_stats(axes: Any, shapes: CapacityShapes) -> Any:
    """Returns f32 zeros, of the shape that the letters of each leaf of `axes` name."""
    sizes = dict(zip("LPER", shapes, strict=True))
    return jax.tree.map(
        lambda letters: jnp.zeros([sizes[letter] for letter in letters], jnp.float32), axes
    )


def masks_from_ranks(ranks_LE: np.ndarray, max_rank: int) -> np.ndarray:
    """Returns the masks f32 [L, E, R]: 1 for the first `rank` ranks of each expert, else 0."""
    return (np.arange(max_rank) < ranks_LE[..., None]).astype(np.float32)
