"""Computes the expert operation on CPU: (token, expert) assignments are sorted by expert, and each
group is processed in blocks of rows.

The number of blocks is dynamic, so no token is dropped, groups may have any size, and the cost does
not depend on load skew. `lax.ragged_dot` is not used: on CPU it is a dense expansion.

Compute follows the active rank: LoRA matrices are processed in pages of `PAGE` rank rows, and the
loop over an expert's pages ends with the page of its last nonzero gate. Growth changes counts,
never shapes. Later pages are not read, and their cotangents are zero.

The backward pass is written by hand. It reads the saved pre-activations `moe_gu` of the sorted
assignments, or recomputes the product with gate and up (`ExpertSpec.repeats`), never the one with
down. Weights are read from the stack of all layers, one expert at a time, and sums over experts are
accumulated in place.

Letters: T tokens, K experts per token, P = T * K assignments (and a tail of one block), B rows per
block, E experts, D model, F expert hidden, R ranks, Q ranks per page. A `slot` is the number of an
assignment, t * K + k.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from drlora_jax.ops.experts.shared import ACTIVATIONS, RoleLora, drop, matmul

SMALL_ROWS, LARGE_ROWS = 64, 256
PAGE = 16  # float32 numbers in one AVX-512 register: thinner products cost as much


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def expert_mlp(spec, x_TD, expert_TK, weight_TK, weights, lora, dropout, layer):
    """Computes the same as `ops.experts.api.expert_mlp`, with the weights of `layer` in stacks
    [L, E, ...].
    """
    plan = _Plan(spec, expert_TK, weight_TK, weights, lora, dropout, layer)
    return _forward(plan, x_TD, keeps=False)[0]


def _expert_mlp_forward(spec, *inputs):
    y_TD, gate_up_PF = _forward(_Plan(spec, *inputs[1:]), inputs[0], keeps=not spec.repeats)
    return y_TD, (inputs, gate_up_PF)


def _expert_mlp_backward(spec, saved, dy_TD):
    inputs, gate_up_PF = saved
    x_TD, _, weight_TK, *_ = inputs
    plan = _Plan(spec, *inputs[1:])
    dx_TD, dp_P, d_weights, d_lora = _backward(plan, x_TD, dy_TD, gate_up_PF)
    return dx_TD, None, dp_P.reshape(weight_TK.shape), d_weights, d_lora, None, None


expert_mlp.defvjp(_expert_mlp_forward, _expert_mlp_backward)


def _forward(plan: "_Plan", x_TD, keeps: bool):
    """Returns sums over experts [T, D], and pre-activations of the sorted assignments (or None)."""

    def one_block(block: _Block, carry):
        y_TD, gate_up_PF = carry
        gate_up_BF = plan.pre_activations(block, x_TD[block.tokens_B])
        if keeps:
            # What a block writes past its group's end is overwritten by the next group.
            gate_up_PF = lax.dynamic_update_slice_in_dim(gate_up_PF, gate_up_BF, block.row, axis=0)
        h_BF = _activate(plan.spec, x_TD.dtype, gate_up_BF, block.p_B)
        y_BD = matmul(h_BF, block.w_down_FD)
        if "down" in plan.lora:
            y_BD = plan.add_low_rank(block, "down", h_BF, y_BD)
        # Rows past the group's end add zero.
        return y_TD.at[block.tokens_B].add(y_BD.astype(jnp.float32)), gate_up_PF

    gate_up_PF = None
    if keeps:
        gate_up_PF = jnp.zeros((plan.num_rows, plan.weights[0].shape[-1]), x_TD.dtype)
    y_TD, gate_up_PF = plan.run(one_block, (jnp.zeros(x_TD.shape, jnp.float32), gate_up_PF))
    return y_TD.astype(x_TD.dtype), checkpoint_name(gate_up_PF, "moe_gu") if keeps else None


def _backward(plan: "_Plan", x_TD, dy_TD, gate_up_PF):
    """Returns the cotangents of tokens [T, D], combine weights [P], base weights (None if frozen)
    and LoRA matrices.
    """
    spec = plan.spec

    def one_block(block: _Block, carry):
        dx_TD, dp_P, d_weights, d_lora = carry
        x_BD, dy_BD = x_TD[block.tokens_B], dy_TD[block.tokens_B]
        if gate_up_PF is None:
            gate_up_BF = plan.pre_activations(block, x_BD)
        else:
            gate_up_BF = lax.dynamic_slice_in_dim(gate_up_PF, block.row, x_BD.shape[0])
        h_BF, pull = jax.vjp(functools.partial(_activate, spec, x_TD.dtype), gate_up_BF, block.p_B)
        dh_BF = matmul(dy_BD, block.w_down_FD.T)
        if "down" in plan.lora:
            dh_BF, d_lora = plan.pull_low_rank(block, "down", h_BF, dy_BD, dh_BF, d_lora)
        # p = 0 makes the contribution of rows past the end exactly zero in every sum, except in dp.
        d_gate_up_BF, dp_B = pull(dh_BF)
        dp_B = jnp.where(block.is_inside_B, dp_B, 0)
        dx_BD = matmul(d_gate_up_BF, block.w_gate_up_DF.T)
        for role in plan.input_roles:
            part_BF = _columns(d_gate_up_BF, role)
            dx_BD, d_lora = plan.pull_low_rank(block, role, x_BD, part_BF, dx_BD, d_lora)
        if spec.base_grad:
            grads = (_gram(x_BD, d_gate_up_BF), _gram(h_BF, dy_BD))
            d_weights = plan.add_base_grads(block, d_weights, grads)
        dx_TD = dx_TD.at[block.tokens_B].add(dx_BD.astype(jnp.float32))
        dp_P = dp_P.at[block.slots_B].add(dp_B)
        return dx_TD, dp_P, d_weights, d_lora

    weights = plan.weights if spec.base_grad else ()
    sums = (x_TD, jax.ShapeDtypeStruct((plan.num_slots,), jnp.float32), weights, plan.lora)
    carry = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), sums)
    dx_TD, dp_P, d_weights, d_lora = plan.run(one_block, carry)
    if spec.base_grad:
        d_weights = jax.tree.map(lambda grad, w: grad.astype(w.dtype), d_weights, plan.weights)
    else:
        d_weights = None
    return dx_TD.astype(x_TD.dtype), dp_P, d_weights, d_lora


class _Block(NamedTuple):
    """Holds a block of rows of one expert's group."""

    expert: jax.Array
    row: jax.Array  # first sorted position
    w_gate_up_DF: jax.Array  # weights of the expert
    w_down_FD: jax.Array
    tokens_B: jax.Array
    slots_B: jax.Array
    p_B: jax.Array  # combine weights, 0 past the end of the group
    is_inside_B: jax.Array


class _Plan:
    """Sorts assignments by expert, and iterates over blocks of them and pages of LoRA matrices.

    Arrays over assignments have a tail of one block, so that the last block may extend past the
    end. Assignments of experts on other devices come last and are never processed.
    """

    def __init__(self, spec, expert_TK, weight_TK, weights, lora, dropout, layer):
        num_experts, self.num_slots = weights[0].shape[1], expert_TK.size
        self.spec, self.weights, self.lora, self._dropout = spec, weights, lora, dropout
        self._per_token, self.layer = expert_TK.shape[1], layer
        self.input_roles = [role for role in lora if role != "down"]
        self._rows = block_rows(self.num_slots, num_experts)
        expert_P = expert_TK.reshape(-1)
        is_elsewhere_P = (expert_P < 0) | (expert_P >= num_experts)
        expert_P = jnp.where(is_elsewhere_P, num_experts, expert_P)
        order_P = _order(expert_P, num_experts)
        self._size_E = jnp.bincount(expert_P, length=num_experts + 1)[:num_experts]
        self._start_E = jnp.cumsum(self._size_E) - self._size_E
        self._slot_P = jnp.pad(order_P, (0, self._rows[1]))  # sorted position -> slot
        self.num_rows = self._slot_P.size
        self._weight_P = weight_TK.reshape(-1)[self._slot_P]
        self._pages = {role: _count_pages(matrices.gate_ER) for role, matrices in lora.items()}

    def run(self, one_block, carry):
        """Calls `one_block(block, carry) -> carry` for all blocks, in sorted order."""

        def one_expert(expert, carry):
            weights = [w[self.layer, expert] for w in self.weights]
            for rows, first, count in self._blocks(self._size_E[expert]):

                def one(index, carry, rows=rows, first=first):
                    block = self._block(expert, weights, first + index * rows, rows)
                    return one_block(block, carry)

                carry = lax.fori_loop(0, count, one, carry)
            return carry

        return lax.fori_loop(0, len(self._size_E), one_expert, carry)

    def _blocks(self, size):
        """Returns (rows per block, first row, number of blocks), largest blocks first."""
        small, large = self._rows
        num_small = (size + small - 1) // small
        if small == large:
            return [(small, 0, num_small)]
        num_large = num_small * small // large
        done = num_large * large
        return [(large, 0, num_large), (small, done, (size - done + small - 1) // small)]

    def _block(self, expert, weights, first, rows: int):
        row = self._start_E[expert] + first
        is_inside_B = first + jnp.arange(rows) < self._size_E[expert]

        def read(array_P):
            return lax.dynamic_slice_in_dim(array_P, row, rows)

        p_B = jnp.where(is_inside_B, read(self._weight_P), 0)
        slots_B = read(self._slot_P)
        tokens_B = slots_B // self._per_token
        return _Block(expert, row, *weights, tokens_B, slots_B, p_B, is_inside_B)

    def pre_activations(self, block: _Block, x_BD):
        """Returns [gate | up], including LoRA."""
        gate_up_BF = matmul(x_BD, block.w_gate_up_DF)
        for role in self.input_roles:
            part_BF = self.add_low_rank(block, role, x_BD, _columns(gate_up_BF, role))
            gate_up_BF = _with_columns(gate_up_BF, role, part_BF)
        return gate_up_BF

    def _drop(self, block: _Block, role: str, rows_BD):
        slots_B = self._dropout.slots(block.slots_B, self._per_token)
        return drop(rows_BD, slots_B, role, self.spec, self._dropout)

    def add_low_rank(self, block: _Block, role: str, in_BD, out_BF):
        """Returns out + s * (gate * (drop(in) A^T)) B."""
        in_BD = self._drop(block, role, in_BD)

        def one_page(page: _Page, out_BF):
            z_BQ = matmul(in_BD, page.a_QD.T)
            z_BQ = (z_BQ * (self.spec.scale * page.gate_Q)[None]).astype(in_BD.dtype)
            return out_BF + matmul(z_BQ, page.b_QF)

        return self._each_page(block.expert, role, in_BD.dtype, one_page, out_BF)

    def add_base_grads(self, block: _Block, d_weights, grads) -> tuple:
        """Adds this block's gradients of an expert's base weights to the totals."""
        return tuple(
            _add_at(total, grad[None, None], self.layer, block.expert)
            for total, grad in zip(d_weights, grads, strict=True)
        )

    def pull_low_rank(self, block: _Block, role: str, in_BD, d_out_BF, d_in_BD, d_lora):
        """Adds this role's contribution to d_in, and this block's to the LoRA gradients."""
        scale = self.spec.scale
        in_BD = self._drop(block, role, in_BD)

        def one_page(page: _Page, carry):
            d_low_BD, (da_ERD, db_ERF, d_gate_ER) = carry
            z_BQ = matmul(in_BD, page.a_QD.T)
            dz_BQ = scale * matmul(d_out_BF, page.b_QF.T)
            gated_BQ = (dz_BQ * page.gate_Q[None]).astype(in_BD.dtype)
            scaled_BQ = (z_BQ * (scale * page.gate_Q)[None]).astype(in_BD.dtype)
            d_gate_Q = jnp.sum(z_BQ.astype(jnp.float32) * dz_BQ, axis=0)
            at = (block.expert, page.first)
            grads = RoleLora(
                _add_at(da_ERD, _gram(gated_BQ, in_BD)[None], *at),
                _add_at(db_ERF, _gram(scaled_BQ, d_out_BF)[None], *at),
                _add_at(d_gate_ER, jnp.where(page.is_own_Q, d_gate_Q, 0)[None], *at),
            )
            return d_low_BD + matmul(gated_BQ, page.a_QD), grads

        zeros_BD = jnp.zeros_like(d_in_BD)
        d_low_BD, grads = self._each_page(
            block.expert, role, in_BD.dtype, one_page, (zeros_BD, d_lora[role])
        )
        d_low_BD = self._drop(block, role, d_low_BD)
        return d_in_BD + d_low_BD, d_lora | {role: grads}

    def _each_page(self, expert, role: str, dtype, one_page, carry):
        matrices = self.lora[role]
        max_rank = matrices.gate_ER.shape[1]
        width = min(PAGE, max_rank)

        def run(index, carry):
            wanted = index * width
            # The last page may overlap the previous one.
            first = jnp.minimum(wanted, max_rank - width)
            is_own_Q = first + jnp.arange(width) >= wanted

            def cut(array):
                sizes = (1, width, *array.shape[2:])
                starts = (expert, first, *[0] * (array.ndim - 2))
                return lax.dynamic_slice(array, starts, sizes)[0]

            a_QD, b_QF, gate_Q = map(cut, matrices)
            page = _Page(
                first,
                a_QD.astype(dtype),
                b_QF.astype(dtype),
                jnp.where(is_own_Q, gate_Q, 0),
                is_own_Q,
            )
            return one_page(page, carry)

        # The first page runs outside a loop, so that its products can fuse with what follows.
        carry = run(0, carry)
        return (
            carry if max_rank <= PAGE else lax.fori_loop(1, self._pages[role][expert], run, carry)
        )


class _Page(NamedTuple):
    """Holds a page of rank rows of one expert's LoRA matrices."""

    first: jax.Array
    a_QD: jax.Array
    b_QF: jax.Array
    gate_Q: jax.Array
    is_own_Q: jax.Array  # False for ranks of the previous page


def block_rows(num_slots: int, num_experts: int) -> tuple[int, int]:
    """Returns the rows of small and of large blocks. The last block of a group is partly idle, so
    it is small; large blocks read the weights less often.
    """
    large = num_slots // num_experts // SMALL_ROWS * SMALL_ROWS
    return SMALL_ROWS, min(LARGE_ROWS, max(SMALL_ROWS, large))


def _order(expert_P, num_experts: int) -> jax.Array:
    """Returns the slots ordered by expert and then by number, i32 [P]."""
    slots = expert_P.size
    if (num_experts + 1) * slots > jnp.iinfo(jnp.int32).max:
        return jnp.argsort(expert_P, stable=True).astype(jnp.int32)
    # Both in one number: XLA takes five times as long to sort pairs (2.6 ms for 16,384, jax 0.10).
    return lax.sort(expert_P * slots + jnp.arange(slots, dtype=jnp.int32)) % slots


def _count_pages(gate_ER) -> jax.Array:
    """Returns the number of pages up to the last nonzero gate, i32 [E]."""
    last_E = jnp.max(jnp.where(gate_ER != 0, jnp.arange(1, gate_ER.shape[1] + 1), 0), axis=1)
    return (last_E + PAGE - 1) // PAGE


def _activate(spec, dtype, gate_up_BF, p_B):
    gate_BF, up_BF = jnp.split(gate_up_BF, 2, axis=-1)
    return (ACTIVATIONS[spec.activation](gate_BF) * up_BF * p_B[:, None]).astype(dtype)


def _columns(gate_up_BF, role: str):
    """Returns the columns of [gate | up] that an input role writes."""
    half = gate_up_BF.shape[1] // 2
    return {"gate": gate_up_BF[:, :half], "up": gate_up_BF[:, half:], "gate_up": gate_up_BF}[role]


def _with_columns(gate_up_BF, role: str, part_BF):
    half = gate_up_BF.shape[1] // 2
    if role == "gate_up":
        return part_BF
    both = (part_BF, gate_up_BF[:, half:]) if role == "gate" else (gate_up_BF[:, :half], part_BF)
    return jnp.concatenate(both, axis=1)


def _gram(left_BX, right_BY):
    """Returns left^T right in f32, summed over B."""
    return jnp.matmul(left_BX.T, right_BY, preferred_element_type=jnp.float32)


def _add_at(total, part, *first):
    """Returns `total` with `part` added at the leading indices `first`."""
    first = (*first, *[0] * (total.ndim - len(first)))
    old = lax.dynamic_slice(total, first, part.shape)
    return lax.dynamic_update_slice(total, old + part.astype(total.dtype), first)
