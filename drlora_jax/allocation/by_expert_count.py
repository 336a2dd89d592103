"""Policies for layers with different numbers of experts (MoLA's patterns, AlphaLoRA).

Arrays have room for the layer with most experts; in a layer with n of them the first n are
available and the others have rank 0 for good. A policy knows nothing of that: one is made for every
number there is, for the layers that have it, so that budget and quota of a layer follow its own
experts.
"""

from collections.abc import Callable

import jax
import numpy as np

from drlora_jax.allocation.base import CapacityShapes, CapacityState, Event, Policy


def for_counts(
    counts_L: tuple[int, ...], shapes: CapacityShapes, make: Callable[[CapacityShapes], Policy]
) -> Policy:
    """The policy that `make` gives, for layers of `counts_L` experts.

    Args:
      shapes: of the arrays; `experts` is the largest count.
      make: a policy for layers alike. It may look at its statistics by layer and expert only, and
        declares their axes.
    """
    whole, counts = make(shapes), np.asarray(counts_L)
    parts = {}
    for count in sorted(set(counts_L)):
        rows = np.flatnonzero(counts == count)
        part = make(shapes._replace(layers=rows.size, experts=count))
        parts[count] = rows, part

    def init() -> CapacityState:
        ranks_LE = np.zeros((shapes.layers, shapes.experts), np.int32)
        for count, (rows, part) in parts.items():
            ranks_LE[rows, :count] = part.init().ranks_LE
        return CapacityState(ranks_LE)

    def update(state: CapacityState, stats, step: int):
        ranks_LE = state.ranks_LE.copy()
        stats = jax.tree.map(np.array, stats)
        leaves, axes = jax.tree.leaves(stats), jax.tree.leaves(whole.stat_axes)
        saliency_LE = np.zeros(ranks_LE.shape, np.float32)
        order_LER = np.tile(np.arange(shapes.max_rank, dtype=np.int32), (*ranks_LE.shape, 1))
        is_reordered = False
        for count, (rows, part) in parts.items():
            own = CapacityState(ranks_LE[rows, :count])
            places = [(rows, *_experts(letters, count)) for letters in axes]
            cut = [leaf[place] for leaf, place in zip(leaves, places, strict=True)]
            own_stats = jax.tree.unflatten(jax.tree.structure(stats), cut)
            own, own_stats, event = part.update(own, own_stats, step)
            ranks_LE[rows, :count] = own.ranks_LE
            saliency_LE[rows, :count] = event.saliency_LE
            if event.order_LER is not None:
                order_LER[rows, :count], is_reordered = event.order_LER, True
            for leaf, place, new in zip(leaves, places, jax.tree.leaves(own_stats), strict=True):
                leaf[place] = new
        order = order_LER if is_reordered else None
        return CapacityState(ranks_LE), stats, Event(saliency_LE, order)

    return whole._replace(
        init=init,
        update=update,
        budget=tuple(parts[count][1].budget for count in counts_L),
        describe=f"{whole.describe}; {counts.min()} to {counts.max()} experts a layer, "
        f"{counts.sum()} in all",
    )


def _experts(letters: str, count: int) -> tuple[slice, ...]:
    """The first experts of a statistic with the axes `letters`, behind its layers."""
    return (slice(None),) * (letters.index("E") - 1) + (slice(count),)
