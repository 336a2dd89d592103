"""Applies a policy to layers with different numbers of experts (MoLA's patterns, AlphaLoRA).

Arrays have room for the layer with the most experts; in a layer with n experts the first n are
available and the others always have rank 0. Policies need not know that: one is built for every
distinct number of experts, for the layers that have it, so that the budget and quota of a layer
follow its own number of experts.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from drlora_jax.allocation.base import CapacityShapes, CapacityState, Event, Policy


def for_counts(
    counts_L: tuple[int, ...], shapes: CapacityShapes, make: Callable[[CapacityShapes], Policy]
) -> Policy:
    """Returns the policy that `make` gives, for layers of `counts_L` experts.

    Args:
      shapes: Shapes of the arrays; `experts` is the largest count.
      make: Builds a policy for layers with equal numbers of experts. The policy may treat its
        statistics only layer by layer and expert by expert, and declares their axes.
    """
    whole, counts = make(shapes), np.asarray(counts_L)
    parts = []
    for count in sorted(set(counts_L)):
        rows = np.flatnonzero(counts == count)
        parts.append(Part(make(shapes._replace(layers=rows.size, experts=count)), rows, count))

    def init() -> CapacityState:
        ranks_LE = np.zeros((shapes.layers, shapes.experts), np.int32)
        for part in parts:
            ranks_LE[part.rows, : part.count] = part.policy.init().ranks_LE
        return CapacityState(ranks_LE)

    budgets = {part.count: part.policy.budget for part in parts}
    return whole._replace(
        init=init,
        update=functools.partial(_update, parts, whole.stat_axes, shapes.max_rank),
        budget=tuple(budgets[count] for count in counts_L),
        describe=(
            f"{whole.describe}; {counts.min()} to {counts.max()} experts per layer, "
            f"{counts.sum()} in total"
        ),
    )


class Part(NamedTuple):
    """Groups the layers with the same number of experts."""

    policy: Policy
    rows: np.ndarray  # indices of the layers
    count: int  # experts per layer

    def place(self, letters: str) -> tuple:
        """Returns the index of this part in an array with the axes `letters`, L first."""
        return (self.rows, *(slice(None),) * (letters.index("E") - 1), slice(self.count))


def _update(parts: list[Part], axes: Any, max_rank: int, state: CapacityState, stats, step: int):
    """Applies an event: every part's policy updates its own layers."""
    ranks_LE, (leaves, tree) = state.ranks_LE.copy(), jax.tree.flatten(stats)
    leaves, letters = [np.array(leaf) for leaf in leaves], jax.tree.leaves(axes)
    saliency_LE = np.zeros(ranks_LE.shape, np.float32)
    order_LER = np.tile(np.arange(max_rank, dtype=np.int32), (*ranks_LE.shape, 1))
    is_reordered = False
    for part in parts:
        at, places = part.place("LE"), [part.place(each) for each in letters]
        own_stats = [leaf[place] for leaf, place in zip(leaves, places, strict=True)]
        own, own_stats, event = part.policy.update(
            CapacityState(ranks_LE[at]), jax.tree.unflatten(tree, own_stats), step
        )
        ranks_LE[at], saliency_LE[at] = own.ranks_LE, event.saliency_LE
        if event.order_LER is not None:
            order_LER[at], is_reordered = event.order_LER, True
        for leaf, place, new in zip(leaves, places, jax.tree.leaves(own_stats), strict=True):
            leaf[place] = new
    event = Event(saliency_LE, order_LER if is_reordered else None)
    return CapacityState(ranks_LE), jax.tree.unflatten(tree, leaves), event
