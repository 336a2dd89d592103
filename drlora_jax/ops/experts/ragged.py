"""Computes gated expert MLPs over ragged groups of tokens with `lax.ragged_dot`, for TPU, where
that is a grouped matrix product and not a dense expansion; or with another product of the same
signature.

Operation, arguments and results are those of `ops.experts.api.expert_mlp`: assignments sorted by
expert, the combine weight folded into h, a LoRA delta s * (gate * (drop(x) A^T)) B on every role.
Gradients are jax's own: a frozen base model requests no weight gradient, so none is built. Three
things differ from a naive implementation:

  * gate and scale multiply B, not z: [E, R, F] numbers instead of a gather of gates for every
    assignment, and the gate's cotangent sum_i B_i dB'_i is the same importance.
  * sorting and unsorting are gathers in both directions; autodiff would scatter rows.
  * assignments of other devices and padding are sorted after all groups. A kernel leaves those rows
    undefined, so every product's result is masked, and thereby its cotangents.

`moe_gu` and `moe_z` are the names of arrays that a rematerialisation policy may save.

Letters as in `ops.experts.api`.
"""

import contextlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.xla_metadata import set_xla_metadata

from drlora_jax.ops.experts.shared import ACTIVATIONS, drop

THIN, WIDEST_TILE, TILE_ROWS = 512, 4096, 128


def ragged_dot(rows, weights_EIO, size_E, is_transposed: bool = False):
    """Multiplies every group's rows with its expert's matrix; rows of no group are undefined.

    The result has the dtype of the rows. Transposed weights are [E, O, I].
    """
    weights_EIO = weights_EIO.swapaxes(1, 2) if is_transposed else weights_EIO
    with _tiling(rows.shape[0], *weights_EIO.shape[1:]):
        return lax.ragged_dot(rows, weights_EIO, size_E, preferred_element_type=rows.dtype)


def expert_mlp(
    spec, x_TD, expert_TK, weight_TK, weights, lora, dropout, keeps_hidden, product=ragged_dot
):
    """Computes the same as `ops.experts.api.expert_mlp`; `product` is called like `ragged_dot`."""
    w_gate_up_EDF, w_down_EFD = weights
    plan = _sort_slots(expert_TK, w_gate_up_EDF.shape[0])
    slots_P = dropout.slots(plan.order_P, expert_TK.shape[1])
    p_P = weight_TK.reshape(-1)
    p_P = jnp.where(plan.is_here_P, p_P.at[plan.order_P].get(unique_indices=True), 0)

    def dot(rows, weights, is_transposed=False):
        out = product(rows, weights, plan.size_E, is_transposed)
        return jnp.where(plan.is_here_P[:, None], out, 0)

    def delta(rows, role):
        rows = drop(rows, slots_P, role, spec, dropout)
        z_PR = dot(rows, lora[role].a_ERD.astype(rows.dtype), is_transposed=True)
        z_PR = checkpoint_name(z_PR, "moe_z") if keeps_hidden else z_PR
        gated_ERF = lora[role].b_ERF * (spec.scale * lora[role].gate_ER)[:, :, None]
        return dot(z_PR, gated_ERF.astype(rows.dtype))

    x_PD = _dispatch(x_TD, plan)
    gate_up_PF = dot(x_PD, w_gate_up_EDF)
    if keeps_hidden:
        gate_up_PF = checkpoint_name(gate_up_PF, "moe_gu")
    gate_PF, up_PF = jnp.split(gate_up_PF, 2, axis=-1)
    if "gate_up" in lora:
        delta_gate, delta_up = jnp.split(delta(x_PD, "gate_up"), 2, axis=-1)
        gate_PF, up_PF = gate_PF + delta_gate, up_PF + delta_up
    if "gate" in lora:
        gate_PF = gate_PF + delta(x_PD, "gate")
    if "up" in lora:
        up_PF = up_PF + delta(x_PD, "up")
    h_PF = (ACTIVATIONS[spec.activation](gate_PF) * up_PF * p_P[:, None]).astype(x_TD.dtype)
    y_PD = dot(h_PF, w_down_EFD)
    if "down" in lora:
        y_PD = y_PD + delta(h_PF, "down")
    return _combine(y_PD, plan)


class _Plan(NamedTuple):
    """Holds assignments sorted by expert; those of experts on other devices come last."""

    order_P: jax.Array  # sorted position -> slot
    place_TK: jax.Array  # token, k -> sorted position
    token_P: jax.Array  # sorted position -> token
    size_E: jax.Array  # assignments per expert
    is_here_P: jax.Array  # by sorted position: the expert is on this device
    is_here_TK: jax.Array


def _sort_slots(expert_TK: jax.Array, num_experts: int) -> _Plan:
    is_here_TK = (expert_TK >= 0) & (expert_TK < num_experts)
    expert_P = jnp.where(is_here_TK, expert_TK, num_experts).reshape(-1)
    order_P = jnp.argsort(expert_P, stable=True).astype(jnp.int32)
    experts = jnp.arange(num_experts, dtype=expert_P.dtype)
    # A comparison is one fused reduction; bincount would scatter.
    size_E = jnp.sum(expert_P[None] == experts[:, None], axis=1, dtype=jnp.int32)
    return _Plan(
        order_P=order_P,
        place_TK=jnp.argsort(order_P).astype(jnp.int32).reshape(expert_TK.shape),
        token_P=order_P // expert_TK.shape[1],
        size_E=size_E,
        is_here_P=jnp.arange(expert_P.size) < jnp.sum(size_E),
        is_here_TK=is_here_TK,
    )


def _tiling(num_rows: int, width_in: int, width_out: int):
    """Sets the tile (rows, in, out) for a thin product of wide rows, in both directions, on TPU.

    The compiler's own choice for the gradient of LoRA matrices exceeds the 16 MiB of fast memory
    when one side is wide (14,336 x 32 on v5p); other products are left to the compiler.
    """
    narrow, wide = sorted((width_in, width_out))
    tiles = [size for size in range(128, WIDEST_TILE + 1, 128) if wide % size == 0]
    if narrow > THIN or wide <= WIDEST_TILE or num_rows % TILE_ROWS or not tiles:
        return contextlib.nullcontext()
    tile_in, tile_out = min(width_in, tiles[-1]), min(width_out, tiles[-1])
    return set_xla_metadata(ragged_dot_tiling=f"{TILE_ROWS},{tile_in},{tile_out}")


def _sum_slots(rows_PD, plan: _Plan):
    """Sums the rows of each token's assignments, [T, D]."""
    return jnp.sum(jnp.where(plan.is_here_TK[:, :, None], rows_PD[plan.place_TK], 0), axis=1)


@jax.custom_vjp
def _dispatch(x_TD, plan: _Plan):
    """Gathers the token of every sorted assignment, [P, D]."""
    return x_TD[plan.token_P]


@jax.custom_vjp
def _combine(y_PD, plan: _Plan):
    """Sums over assignments: the transpose of `_dispatch`."""
    return _sum_slots(y_PD, plan)


_dispatch.defvjp(
    lambda x_TD, plan: (x_TD[plan.token_P], plan),
    lambda plan, dx_PD: (_sum_slots(dx_PD, plan), None),
)
_combine.defvjp(
    lambda y_PD, plan: (_sum_slots(y_PD, plan), plan),
    lambda plan, dy_TD: (jnp.where(plan.is_here_P[:, None], dy_TD[plan.token_P], 0), None),
)
