"""Gated expert MLPs over ragged groups of tokens, with LoRA, rank gates and dropout inside.

One call computes, for every token t and each of its K experts e with combine weight p,

    gu = x [W_gate | W_up] + s * (gate_r * (drop(x) A_r^T)) B_r      for each input role r
    h  = p * act(gu_gate) * gu_up
    y  = h W_down + s * (gate_down * (drop(h) A_down^T)) B_down      summed over the K experts

The combine weight is folded into h, so the sum over experts is a plain sum and the weight's
gradient needs no stored expert output. The base weights are frozen unless `base_grad`. The
cotangent of a rank gate is sum_rows z * dz: with a gate of one it is DR-LoRA's per-rank importance
before the absolute value (sum_j A_kj dA_kj = sum_i B_ik dB_ik).

Two backends with the same numbers:
  block  sorts the (token, expert) slots by expert and walks each group in blocks of rows with a
  dynamic trip count.
         Dropless, any group sizes, cost insensitive to skew; the backward pass recomputes a block
         and pulls back through it. `lax.ragged_dot` is not used: on CPU, and by default on NVIDIA,
         it is a dense expansion.
  dense  runs every expert on every token (E / K times the work). The reference of the tests, and
  the fall-back on
         platforms where the block loop has no fast path.

Letters: T tokens, K experts per token, P = T * K slots, E experts, D model, F expert hidden, R
  ranks.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

MIN_BLOCK_ROWS, MAX_BLOCK_ROWS = 64, 256

INPUT_ROLES = ("gate", "up", "gate_up")
ROLES = (*INPUT_ROLES, "down")
ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}


class RoleLora(NamedTuple):
    """Factors of one projection of all experts, as rank rows; `gate` multiplies each rank."""

    a_ERD: jax.Array  # f32 [E, R, D_in]
    b_ERF: jax.Array  # f32 [E, R, D_out]
    gate_ER: jax.Array  # f32 [E, R], mask times one


class ExpertSpec(NamedTuple):
    """What is static about the operation."""

    activation: str = "silu"
    scale: float = 1.0
    dropout: float = 0.0
    base_grad: bool = False


class Dropout(NamedTuple):
    """Randomness that does not depend on how tokens are sorted or sharded: one stream per (role,
    slot).
    """

    key: jax.Array
    first_slot: jax.Array | int = 0  # number of this shard's first slot in the whole batch


def expert_mlp(
    x_TD: jax.Array,
    expert_TK: jax.Array,
    weight_TK: jax.Array,
    w_gate_up_EDF: jax.Array,
    w_down_EFD: jax.Array,
    lora: dict[str, RoleLora],
    spec: ExpertSpec,
    *,
    dropout: Dropout | None = None,
    backend: str = "auto",
) -> jax.Array:
    """Sum over the K experts of each token of the LoRA-adapted gated MLP.

    Args:
      x_TD: tokens, f32 or bf16 [T, D].
      expert_TK: i32 [T, K]; an index outside [0, E) means: not computed here (padding, an expert of
        another device).
      weight_TK: combine weights, f32 [T, K].
      w_gate_up_EDF: [E, D, 2F], gate columns first. w_down_EFD: [E, F, D].
      lora: role -> factors; roles `gate`, `up` (or `gate_up`) and `down`; may be empty.
      spec: static options. dropout: needed when `spec.dropout` > 0 in training; None is evaluation.
      backend: block | dense | auto (block on CPU).

    Returns:
      y_TD in the dtype of x_TD.
    """
    if backend == "auto":
        backend = "block" if jax.default_backend() == "cpu" else "dense"
    if not spec.base_grad:
        w_gate_up_EDF, w_down_EFD = lax.stop_gradient((w_gate_up_EDF, w_down_EFD))
    if dropout is None:
        spec = spec._replace(dropout=0.0)
        dropout = Dropout(jax.random.key(0))
    run = {"block": _block_mlp, "dense": _dense_mlp}[backend]
    weights = (w_gate_up_EDF, w_down_EFD)
    return run(spec, x_TD, expert_TK, weight_TK.astype(jnp.float32), weights, lora, dropout)


def _matmul(left, right):
    """Products accumulate in f32 and return in the dtype of the tokens."""
    return jnp.matmul(left, right, preferred_element_type=jnp.float32).astype(left.dtype)


def _hash(x):
    """lowbias32: a bijection of uint32 in which every input bit flips every output bit half the
    time.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _drop(x_BD, slots_B, role: str, spec: ExpertSpec, dropout: Dropout):
    if spec.dropout == 0.0:
        return x_BD
    row_seed, column_seed = jax.random.bits(
        jax.random.fold_in(dropout.key, ROLES.index(role)), (2,), jnp.uint32
    )
    # A counter hash of (slot, column): jax.random inside the block loop takes twice as long to
    # compile, and a draw by block would depend on how the tokens are sorted.
    row_B = _hash(slots_B.astype(jnp.uint32) ^ row_seed)
    column_D = jnp.arange(x_BD.shape[1], dtype=jnp.uint32) * jnp.uint32(0x9E3779B9) + column_seed
    keep_BD = _hash(row_B[:, None] ^ column_D[None]) >= jnp.uint32(round(spec.dropout * 2**32))
    return jnp.where(keep_BD, x_BD / (1.0 - spec.dropout), 0).astype(x_BD.dtype)


def _low_rank(x_BD, slots_B, role, factors: RoleLora, spec, dropout):
    """s * (gate * (drop(x) A^T)) B for one expert."""
    a_RD, b_RF, gate_R = factors
    z_BR = _matmul(_drop(x_BD, slots_B, role, spec, dropout), a_RD.astype(x_BD.dtype).T)
    z_BR = (z_BR * (spec.scale * gate_R)[None]).astype(x_BD.dtype)
    return _matmul(z_BR, b_RF.astype(x_BD.dtype))


def _expert_rows(spec, slots_B, dropout, x_BD, p_B, weights, lora):
    """One expert on some rows; `p_B` = 0 makes a row's output exactly zero."""
    w_gate_up_DF, w_down_FD = weights
    gate_up_BF = _matmul(x_BD, w_gate_up_DF)
    gate_BF, up_BF = jnp.split(gate_up_BF, 2, axis=-1)
    for role, factors in lora.items():
        if role == "down":
            continue
        delta = _low_rank(x_BD, slots_B, role, factors, spec, dropout)
        if role == "gate_up":
            delta_gate, delta_up = jnp.split(delta, 2, axis=-1)
            gate_BF, up_BF = gate_BF + delta_gate, up_BF + delta_up
        elif role == "gate":
            gate_BF = gate_BF + delta
        else:
            up_BF = up_BF + delta
    h_BF = (ACTIVATIONS[spec.activation](gate_BF) * up_BF * p_B[:, None]).astype(x_BD.dtype)
    y_BD = _matmul(h_BF, w_down_FD)
    if "down" in lora:
        y_BD = y_BD + _low_rank(h_BF, slots_B, "down", lora["down"], spec, dropout)
    return y_BD


# ---------------------------------------------------------------------------------------------
# dense reference


def _dense_mlp(spec, x_TD, expert_TK, weight_TK, weights, lora, dropout):
    num_experts, num_slots = weights[0].shape[0], expert_TK.shape[1]
    tokens_T = jnp.arange(x_TD.shape[0]) * num_slots

    @jax.checkpoint
    def one_expert(y_TD, inputs):
        expert, weights_e, lora_e = inputs
        chosen_TK = expert_TK == expert
        p_T = jnp.sum(weight_TK * chosen_TK, axis=1)
        slots_T = dropout.first_slot + tokens_T + jnp.argmax(chosen_TK, axis=1)
        return y_TD + _expert_rows(spec, slots_T, dropout, x_TD, p_T, weights_e, lora_e), None

    experts = (jnp.arange(num_experts), weights, lora)
    return lax.scan(one_expert, jnp.zeros_like(x_TD), experts)[0]


# ---------------------------------------------------------------------------------------------
# block loop


def _block_rows(num_slots: int, num_experts: int) -> int:
    """Rows a block: about a quarter of the mean group, because the last block of a group is partly
    idle.
    """
    quarter = num_slots // (4 * num_experts)
    return min(MAX_BLOCK_ROWS, max(MIN_BLOCK_ROWS, 1 << max(quarter, 1).bit_length() - 1))


class _Plan(NamedTuple):
    """Slots sorted by expert; arrays over slots have a tail of one block, so that the last block
    may run over.
    """

    order_P: jax.Array  # sorted position -> slot
    token_P: jax.Array  # sorted position -> token, with tail
    slot_P: jax.Array  # sorted position -> global slot number, with tail
    place_TK: jax.Array  # token, k -> sorted position
    start_E: jax.Array
    size_E: jax.Array


def _make_plan(expert_TK, num_experts: int, block_rows: int, first_slot) -> _Plan:
    num_slots = expert_TK.size
    expert_P = expert_TK.reshape(-1)
    elsewhere_P = (expert_P < 0) | (expert_P >= num_experts)
    expert_P = jnp.where(
        elsewhere_P, num_experts, expert_P
    )  # sorted behind all groups, never visited
    order_P = jnp.argsort(expert_P, stable=True).astype(jnp.int32)
    size_E = jnp.bincount(expert_P, length=num_experts + 1)[:num_experts].astype(jnp.int32)
    start_E = jnp.cumsum(size_E) - size_E
    place_P = (
        jnp.zeros(num_slots, jnp.int32).at[order_P].set(jnp.arange(num_slots, dtype=jnp.int32))
    )
    tailed_P = jnp.pad(order_P, (0, block_rows))
    return _Plan(
        order_P=order_P,
        token_P=tailed_P // expert_TK.shape[1],
        slot_P=tailed_P + first_slot,
        place_TK=place_P.reshape(expert_TK.shape),
        start_E=start_E,
        size_E=size_E,
    )


def _write_block(array, block, start):
    return lax.dynamic_update_slice_in_dim(array, block.astype(array.dtype), start, axis=0)


class _Walk:
    """What one block of one expert's group is made of; `row` is its first sorted position."""

    def __init__(self, expert_TK, weight_TK, num_experts: int, first_slot):
        self._rows = _block_rows(expert_TK.size, num_experts)
        self.plan = _make_plan(expert_TK, num_experts, self._rows, first_slot)
        self._weight_P = jnp.pad(weight_TK.reshape(-1)[self.plan.order_P], (0, self._rows))

    def num_blocks(self, size):
        return (size + self._rows - 1) // self._rows

    def row(self, start, index):
        return start + index * self._rows

    def is_inside(self, index, size):
        """Which rows of a block belong to a group of `size` rows."""
        return index * self._rows + jnp.arange(self._rows) < size

    def tokens(self, row):
        return lax.dynamic_slice_in_dim(self.plan.token_P, row, self._rows)

    def slots(self, row):
        return lax.dynamic_slice_in_dim(self.plan.slot_P, row, self._rows)

    def weights(self, row, index, size):
        """Combine weights, 0 past the end of the group."""
        weight_B = lax.dynamic_slice_in_dim(self._weight_P, row, self._rows)
        return jnp.where(self.is_inside(index, size), weight_B, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _block_mlp(spec, x_TD, expert_TK, weight_TK, weights, lora, dropout):
    walk = _Walk(expert_TK, weight_TK, weights[0].shape[0], dropout.first_slot)

    def one_expert(y_PD, inputs):
        start, size, weights_e, lora_e = inputs

        def one_block(index, y_PD):
            row = walk.row(start, index)
            x_BD = x_TD[walk.tokens(row)]
            p_B = walk.weights(row, index, size)
            y_BD = _expert_rows(spec, walk.slots(row), dropout, x_BD, p_B, weights_e, lora_e)
            # Rows past the group's end are zero here; the next group, which starts there, writes
            # them anew.
            return _write_block(y_PD, y_BD, row)

        return lax.fori_loop(0, walk.num_blocks(size), one_block, y_PD), None

    plan = walk.plan
    y_PD = jnp.zeros((plan.token_P.size, x_TD.shape[1]), x_TD.dtype)
    y_PD, _ = lax.scan(one_expert, y_PD, (plan.start_E, plan.size_E, weights, lora))
    return jnp.sum(y_PD[plan.place_TK], axis=1)


def _block_mlp_forward(spec, x_TD, expert_TK, weight_TK, weights, lora, dropout):
    y_TD = _block_mlp(spec, x_TD, expert_TK, weight_TK, weights, lora, dropout)
    return y_TD, (x_TD, expert_TK, weight_TK, weights, lora, dropout)


def _block_mlp_backward(spec, saved, dy_TD):
    x_TD, expert_TK, weight_TK, weights, lora, dropout = saved
    walk = _Walk(expert_TK, weight_TK, weights[0].shape[0], dropout.first_slot)

    def one_expert(carry, inputs):
        start, size, weights_e, lora_e = inputs
        trained_e = (lora_e, weights_e) if spec.base_grad else (lora_e, ())

        def one_block(index, carry):
            dx_PD, dp_P, sums = carry
            row = walk.row(start, index)
            tokens_B, p_B = walk.tokens(row), walk.weights(row, index, size)

            def rows(x_BD, p_B, trained):
                lora_b, weights_b = trained
                weights_b = weights_b if spec.base_grad else weights_e
                return _expert_rows(spec, walk.slots(row), dropout, x_BD, p_B, weights_b, lora_b)

            _, pull = jax.vjp(rows, x_TD[tokens_B], p_B, trained_e)
            dx_BD, dp_B, grads = pull(dy_TD[tokens_B])
            # p = 0 on rows past the end makes their share of every sum exactly zero; dp itself is
            # not.
            dp_B = jnp.where(walk.is_inside(index, size), dp_B, 0)
            sums = jax.tree.map(lambda total, grad: total + grad.astype(total.dtype), sums, grads)
            return _write_block(dx_PD, dx_BD, row), _write_block(dp_P, dp_B, row), sums

        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), trained_e)
        dx_PD, dp_P, sums = lax.fori_loop(0, walk.num_blocks(size), one_block, (*carry, zeros))
        return (dx_PD, dp_P), sums

    plan = walk.plan
    carry = (
        jnp.zeros((plan.token_P.size, x_TD.shape[1]), x_TD.dtype),
        jnp.zeros(plan.token_P.size, jnp.float32),
    )
    (dx_PD, dp_P), (d_lora, d_weights) = lax.scan(
        one_expert, carry, (plan.start_E, plan.size_E, weights, lora)
    )
    dx_TD = jnp.sum(dx_PD[plan.place_TK], axis=1)
    dp_TK = dp_P[plan.place_TK]
    if spec.base_grad:
        d_weights = jax.tree.map(lambda grad, weight: grad.astype(weight.dtype), d_weights, weights)
    else:
        d_weights = jax.tree.map(jnp.zeros_like, weights)
    return dx_TD, None, dp_TK, d_weights, d_lora, None


_block_mlp.defvjp(_block_mlp_forward, _block_mlp_backward)
