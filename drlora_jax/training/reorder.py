"""Reorders the rank rows of LoRA matrices and moments when ranks are pruned.

The active ranks of an expert are always the first ones. When a policy prunes a rank in the middle,
the kept rows are therefore moved to the front by the same permutation in A, in B and in the
optimizer's state. Rows that become inactive are reset to their state before step 1: A as
initialised, B and moments zero. Values are only copied, so rows stay bit-identical.
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
    """Returns (lora, opt_state) after an event.

    Args:
      initial: The `lora` collection before step 1.
      order_LER: i32, a permutation of every expert's ranks: new row k is old row order[k].
      mask_LER: f32, the mask after the event; inactive rows are reset to `initial`.
    """
    orders = over_experts(model, lora, order_LER[..., None], rest=lambda names: None)
    active = over_experts(model, lora, mask_LER[..., None] > 0, rest=lambda names: None)

    def move(value, order, is_active, first):
        if order is None:  # not a LoRA matrix of an expert
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
