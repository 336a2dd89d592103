"""Rank rows in another order: what pruning does to factors and moments.

The active ranks of an expert are always the first ones, so a policy that prunes a rank in the
middle has the kept rows moved to the front, in A, B and everything the optimizer keeps of them, by
the same permutation. A row that is inactive afterwards is as before step 1: A as it was drawn, B
and moments zero. Nothing is computed with the values, so rows are moved bit for bit.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from drlora_jax.adapters.rank_trees import over_experts
from drlora_jax.models.transformer import Decoder


def reorder_ranks(
    model: Decoder,
    tx: optax.GradientTransformation,
    lora: Any,
    opt_state: Any,
    initial: Any,
    order_LER: jax.Array,
    mask_LER: jax.Array,
) -> tuple[Any, Any]:
    """(lora, opt_state) after an event.

    Args:
      initial: the `lora` collection before step 1.
      order_LER: i32, a permutation of every expert's ranks: new row k is old row order[k].
      mask_LER: f32, the mask after the event; inactive rows become initial.
    """
    orders = over_experts(model, lora, order_LER[..., None], rest=lambda names: None)
    active = over_experts(model, lora, mask_LER[..., None] > 0, rest=lambda names: None)

    def move(value, order, is_active, first):
        if order is None:  # no factor of an expert
            return value
        return jnp.where(is_active, jnp.take_along_axis(value, order, axis=-2), first)

    moved = jax.tree.map(move, lora, orders, active, initial)
    opt_state = optax.tree.map_params(
        tx,
        lambda value, order, is_active: move(value, order, is_active, jnp.zeros((), value.dtype)),
        opt_state,
        orders,
        active,
    )
    return moved, opt_state
