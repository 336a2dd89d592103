"""Defines an allocation policy: who decides the active ranks, and when.

A policy is one file. It declares its own config fields as a `PolicyFields`, whose `make` returns a
`Policy`: functions over plain values. `accumulate` runs inside the jitted step (jnp); everything
else runs on the host, in NumPy. Configs are read without jax, so files of policies import it where
the step is traced. Letters: L MoE layers, P adapted projections, E experts, R allocated ranks, M
micro-batches.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from drlora_jax.allocation.spectra import Exponents
from drlora_jax.system.fields import positive

if TYPE_CHECKING:
    import jax

    from drlora_jax.allocation.measurements import Measurement

LARGEST_RANK = 65536


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

    # f32, d loss / d gate of every rank, by micro-batch; 0 where inactive
    gate_grad_MLPER: "jax.Array"
    count_MLE: "jax.Array"  # f32, times each expert was chosen by valid tokens
    weight_MLE: "jax.Array"  # f32, combine weight each expert got
    tokens_M: "jax.Array"  # f32, valid tokens
    # by the names of the policy's `measures`
    measured: dict[str, "jax.Array"] = {}


class Event(NamedTuple):
    """What an update decided, for the record."""

    saliency_LE: np.ndarray  # f32
    # i32, for a policy that prunes: new rank k of an expert is its old rank order[k], so that the
    # active ranks stay a prefix. LoRA matrices and moments follow; the policy moves its own
    # statistics.
    order_LER: np.ndarray | None = None


class Profile(NamedTuple):
    """What a policy measures before step 1, on the first rows of the training data."""

    rows: int
    # Names of `PROFILE_PASSES` in training/growth.py: each is a pass over the rows, and an array
    # that is summed over them.
    measures: tuple[str, ...]
    # From the sums by name: the capacity to start with, recorded as an event.
    decide: Callable[[dict[str, np.ndarray]], tuple[CapacityState, Event]]


class Policy(NamedTuple):
    name: str
    init: Callable[[], CapacityState]
    init_stats: Callable[[], Any]  # pytree of f32 arrays that lives in the train state
    accumulate: Callable[[Any, StepStats], Any]  # in the step
    is_event: Callable[[int], bool]  # is there an update after this many optimizer steps?
    update: Callable[[CapacityState, Any, int], tuple[CapacityState, Any, Event]]
    # active ranks of a layer at the end; of each layer, where they differ
    budget: int | tuple[int, ...]
    # The statistics' axes: a tree like them of letters, "LE" or "LPER". What has an axis E is
    # sharded with the experts; without axes statistics are replicated.
    stat_axes: Any = None
    last_event: int = 0  # optimizer steps a run needs at least
    # what every step measures for `accumulate`, besides gates and routing
    measures: tuple["Measurement", ...] = ()
    profile: Profile | None = None
    describe: str = ""  # one line for the start of a run


class Context(NamedTuple):
    """What a policy is made for: a model, a run, and the fields that all policies share."""

    shapes: CapacityShapes
    r_target: int
    total_steps: int = 0  # that its schedule is made for
    warmup_ratio: float = 0.0  # of the learning rate
    seed: int = 0
    # experts of every layer where they differ; () where all layers are alike
    counts_L: tuple[int, ...] = ()
    # the adapter brings its experts, instead of adapting those of the base model
    has_new_experts: bool = False
    # reads or computes the exponents of the base model's weights
    exponents: Callable[[], Exponents] | None = None


class PolicyFields:
    """A policy as the config knows it: base of frozen dataclasses of a policy's own fields.

    `section` is the config section `allocation`, of which `r_target` and `r_max` are shared by all
    policies; `adapter` is the section `adapter`.
    """

    name: ClassVar[str]
    text: ClassVar[str]  # one line for the reference
    needs_experts: ClassVar[bool] = True  # among which ranks are shared
    shares_among_layers: ClassVar[bool] = False  # which must then have the same number of experts
    # False: `make` is given layers of different numbers of experts as they are, in `counts_L`
    wants_equal_layers: ClassVar[bool] = True

    def check(self, section: Any) -> None:
        """Refuses values that cannot be."""
        positive("allocation", {"r_target": section.r_target, "r_max": section.r_max})

    def refuses(self, section: Any, adapter: Any) -> str | None:
        """Returns why the policy cannot allocate for a placement; None if it can."""
        return None

    def allocated_rank(self, section: Any, adapter: Any) -> int:
        """Returns the ranks that every expert has memory for."""
        return section.r_max

    def wants_exponents(self) -> bool:
        """Returns whether `make` asks for the exponents of the base model's weights."""
        return False

    def first_ranks_show_files(self) -> bool:
        """Returns whether another file that gives the same first ranks makes the same run."""
        return True

    def make(self, context: Context) -> Policy:
        raise NotImplementedError


def static_policy(
    name: str, ranks_LE: np.ndarray, *, budget: int | tuple[int, ...], describe: str
) -> Policy:
    """Returns a policy whose ranks stay as they are from the first step to the last."""

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
    """Returns f32 zeros of the shape that each leaf of `axes` names by its letters."""
    import jax
    import jax.numpy as jnp

    sizes = dict(zip("LPER", shapes, strict=True))
    return jax.tree.map(
        lambda letters: jnp.zeros([sizes[letter] for letter in letters], jnp.float32), axes
    )


def masks_from_ranks(ranks_LE: np.ndarray, max_rank: int) -> np.ndarray:
    """f32 [L, E, R]: 1 for the first `rank` ranks of each expert."""
    return (np.arange(max_rank) < ranks_LE[..., None]).astype(np.float32)
