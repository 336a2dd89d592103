"""The expert operation on CPU: slots sorted by expert, each group walked in blocks of rows.

The number of blocks is dynamic, so nothing is dropped, group sizes are free and cost does not
depend on skew. `lax.ragged_dot` is not used: on CPU it is a dense expansion.

Compute follows the active rank: factors are worked on in pages of `PAGE` rank rows, and an expert
walks its pages up to that of the last open gate. Growth changes counts, never shapes. What lies
behind that page is not read, and its cotangents are zero.

The backward pass is written out. It reads the pre-activations `moe_gu` in the order of the sorted
slots, or repeats the product with gate and up (`ExpertSpec.repeats`); never the one with down.
Weights are read from the stack of all layers, one expert at a time, and sums over experts are added
up in place.

Letters: T tokens, K experts per token, P = T * K slots (and a tail of one block), B rows of a
  block, E experts, D model, F expert hidden, R ranks, Q ranks of a page.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from drlora_jax.ops.experts.shared import ACTIVATIONS, RoleLora, drop, matmul

SMALL_ROWS, LARGE_ROWS = 64, 256
PAGE = 16  # what AVX-512 holds in one register: thinner products cost as much


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def expert_mlp(spec, x_TD, expert_TK, weight_TK, weights, lora, dropout, layer):
    """As `ops.grouped.expert_mlp`; `weights` are stacks [L, E, ...], of which `layer` is used."""
    walk = _Walk(spec, expert_TK, weight_TK, weights, lora, dropout, layer)
    return _forward(walk, x_TD, keeps=False)[0]


def _expert_mlp_forward(spec, *inputs):
    y_TD, gate_up_PF = _forward(_Walk(spec, *inputs[1:]), inputs[0], keeps=not spec.repeats)
    return y_TD, (inputs, gate_up_PF)


def _expert_mlp_backward(spec, saved, dy_TD):
    inputs, gate_up_PF = saved
    x_TD, _, weight_TK, *_ = inputs
    walk = _Walk(spec, *inputs[1:])
    dx_TD, dp_P, d_weights, d_lora = _backward(walk, x_TD, dy_TD, gate_up_PF)
    return dx_TD, None, dp_P.reshape(weight_TK.shape), d_weights, d_lora, None, None


expert_mlp.defvjp(_expert_mlp_forward, _expert_mlp_backward)


def _forward(walk: "_Walk", x_TD, keeps: bool):
    """Sums over experts, [T, D], and pre-activations of the sorted slots (None if not kept)."""

    def one_block(block: _Block, carry):
        y_TD, gate_up_PF = carry
        gate_up_BF = walk.pre_activations(block, x_TD[block.tokens_B])
        if keeps:
            # What a block writes past its group's end the next group writes again.
            gate_up_PF = lax.dynamic_update_slice_in_dim(gate_up_PF, gate_up_BF, block.row, axis=0)
        h_BF = _activate(walk.spec, x_TD.dtype, gate_up_BF, block.p_B)
        y_BD = matmul(h_BF, block.w_down_FD)
        if "down" in walk.lora:
            y_BD = walk.add_low_rank(block, "down", h_BF, y_BD)
        # Rows past the group's end add zeros.
        return y_TD.at[block.tokens_B].add(y_BD.astype(jnp.float32)), gate_up_PF

    gate_up_PF = None
    if keeps:
        gate_up_PF = jnp.zeros((walk.num_rows, walk.weights[0].shape[-1]), x_TD.dtype)
    y_TD, gate_up_PF = walk.run(one_block, (jnp.zeros(x_TD.shape, jnp.float32), gate_up_PF))
    return y_TD.astype(x_TD.dtype), checkpoint_name(gate_up_PF, "moe_gu") if keeps else None


def _backward(walk: "_Walk", x_TD, dy_TD, gate_up_PF):
    """Cotangents of tokens [T, D], combine weights [P], base weights (None if frozen), factors."""
    spec = walk.spec

    def one_block(block: _Block, carry):
        dx_TD, dp_P, d_weights, d_lora = carry
        x_BD, dy_BD = x_TD[block.tokens_B], dy_TD[block.tokens_B]
        if gate_up_PF is None:
            gate_up_BF = walk.pre_activations(block, x_BD)
        else:
            gate_up_BF = lax.dynamic_slice_in_dim(gate_up_PF, block.row, x_BD.shape[0])
        h_BF, pull = jax.vjp(functools.partial(_activate, spec, x_TD.dtype), gate_up_BF, block.p_B)
        dh_BF = matmul(dy_BD, block.w_down_FD.T)
        if "down" in walk.lora:
            dh_BF, d_lora = walk.pull_low_rank(block, "down", h_BF, dy_BD, dh_BF, d_lora)
        # p = 0 on rows past the end makes their share of every sum exactly zero; dp itself is not.
        d_gate_up_BF, dp_B = pull(dh_BF)
        dp_B = jnp.where(block.is_inside_B, dp_B, 0)
        dx_BD = matmul(d_gate_up_BF, block.w_gate_up_DF.T)
        for role in walk.input_roles:
            part_BF = _columns(d_gate_up_BF, role)
            dx_BD, d_lora = walk.pull_low_rank(block, role, x_BD, part_BF, dx_BD, d_lora)
        if spec.base_grad:
            grads = (_gram(x_BD, d_gate_up_BF), _gram(h_BF, dy_BD))
            d_weights = walk.add_base_grads(block, d_weights, grads)
        dx_TD = dx_TD.at[block.tokens_B].add(dx_BD.astype(jnp.float32))
        dp_P = dp_P.at[block.slots_B].add(dp_B)
        return dx_TD, dp_P, d_weights, d_lora

    weights = walk.weights if spec.base_grad else ()
    sums = (x_TD, jax.ShapeDtypeStruct((walk.num_slots,), jnp.float32), weights, walk.lora)
    carry = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), sums)
    dx_TD, dp_P, d_weights, d_lora = walk.run(one_block, carry)
    if spec.base_grad:
        d_weights = jax.tree.map(lambda grad, w: grad.astype(w.dtype), d_weights, walk.weights)
    else:
        d_weights = None
    return dx_TD.astype(x_TD.dtype), dp_P, d_weights, d_lora


class _Block(NamedTuple):
    """Some rows of one expert's group."""

    expert: jax.Array
    row: jax.Array  # first sorted slot
    w_gate_up_DF: jax.Array  # of the expert
    w_down_FD: jax.Array
    tokens_B: jax.Array
    slots_B: jax.Array
    p_B: jax.Array  # combine weights, 0 past the end of the group
    is_inside_B: jax.Array


class _Walk:
    """Slots sorted by expert, and the blocks and pages that they and the factors are cut into.

    Arrays over slots have a tail of one block, so that the last block may run over. Slots of no
    expert here come last and are never visited.
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
        self._pages = {role: _count_pages(factors.gate_ER) for role, factors in lora.items()}

    def run(self, one_block, carry):
        """`one_block(block, carry) -> carry` for all blocks, in sorted order."""

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
        """(rows a block, first row, number of blocks), largest blocks first."""
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
        """[gate | up], factors included."""
        gate_up_BF = matmul(x_BD, block.w_gate_up_DF)
        for role in self.input_roles:
            part_BF = self.add_low_rank(block, role, x_BD, _columns(gate_up_BF, role))
            gate_up_BF = _with_columns(gate_up_BF, role, part_BF)
        return gate_up_BF

    def _drop(self, block: _Block, role: str, rows_BD):
        slots_B = self._dropout.slots(block.slots_B, self._per_token)
        return drop(rows_BD, slots_B, role, self.spec, self._dropout)

    def add_low_rank(self, block: _Block, role: str, in_BD, out_BF):
        """out + s * (gate * (drop(in) A^T)) B."""
        in_BD = self._drop(block, role, in_BD)

        def one_page(page: _Page, out_BF):
            z_BQ = matmul(in_BD, page.a_QD.T)
            z_BQ = (z_BQ * (self.spec.scale * page.gate_Q)[None]).astype(in_BD.dtype)
            return out_BF + matmul(z_BQ, page.b_QF)

        return self._each_page(block.expert, role, in_BD.dtype, one_page, out_BF)

    def add_base_grads(self, block: _Block, d_weights, grads) -> tuple:
        """Adds this block's gradients of an expert's base weights to those of all."""
        return tuple(
            _add_at(total, grad[None, None], self.layer, block.expert)
            for total, grad in zip(d_weights, grads, strict=True)
        )

    def pull_low_rank(self, block: _Block, role: str, in_BD, d_out_BF, d_in_BD, d_lora):
        """d_in with this role's share, and the factors' gradients with this block's."""
        scale = self.spec.scale
        in_BD = self._drop(block, role, in_BD)

        def one_page(page: _Page, carry):
            d_low_BD, (da_ERD, db_ERF, d_gate_ER) = carry
            z_BQ = matmul(in_BD, page.a_QD.T)
            dz_BQ = scale * matmul(d_out_BF, page.b_QF.T)
            gated_BQ = (dz_BQ * page.gate_Q[None]).astype(in_BD.dtype)
            open_BQ = (z_BQ * (scale * page.gate_Q)[None]).astype(in_BD.dtype)
            d_gate_Q = jnp.sum(z_BQ.astype(jnp.float32) * dz_BQ, axis=0)
            at = (block.expert, page.first)
            grads = RoleLora(
                _add_at(da_ERD, _gram(gated_BQ, in_BD)[None], *at),
                _add_at(db_ERF, _gram(open_BQ, d_out_BF)[None], *at),
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
        factors = self.lora[role]
        max_rank = factors.gate_ER.shape[1]
        width = min(PAGE, max_rank)

        def run(index, carry):
            wanted = index * width
            # The last page may overlap the one before.
            first = jnp.minimum(wanted, max_rank - width)
            is_own_Q = first + jnp.arange(width) >= wanted

            def cut(array):
                sizes = (1, width, *array.shape[2:])
                starts = (expert, first, *[0] * (array.ndim - 2))
                return lax.dynamic_slice(array, starts, sizes)[0]

            a_QD, b_QF, gate_Q = map(cut, factors)
            page = _Page(
                first,
                a_QD.astype(dtype),
                b_QF.astype(dtype),
                jnp.where(is_own_Q, gate_Q, 0),
                is_own_Q,
            )
            return one_page(page, carry)

        # The first page is not worth a loop, which would keep its products apart from what follows.
        carry = run(0, carry)
        return (
            carry if max_rank <= PAGE else lax.fori_loop(1, self._pages[role][expert], run, carry)
        )


class _Page(NamedTuple):
    """Some rank rows of one expert's factors."""

    first: jax.Array
    a_QD: jax.Array
    b_QF: jax.Array
    gate_Q: jax.Array
    is_own_Q: jax.Array  # not those of the page before


def block_rows(num_slots: int, num_experts: int) -> tuple[int, int]:
    """Rows of small and of large blocks. The last block of a group is partly idle, so it is small;
    large ones read the weights less often.
    """
    large = num_slots // num_experts // SMALL_ROWS * SMALL_ROWS
    return SMALL_ROWS, min(LARGE_ROWS, max(SMALL_ROWS, large))


def _order(expert_P, num_experts: int) -> jax.Array:
    """Slots by expert and then by number, i32 [P]."""
    slots = expert_P.size
    if (num_experts + 1) * slots > jnp.iinfo(jnp.int32).max:
        return jnp.argsort(expert_P, stable=True).astype(jnp.int32)
    # One number for both: XLA sorts pairs five times as slowly (2.6 ms for 16,384, jax 0.10).
    return lax.sort(expert_P * slots + jnp.arange(slots, dtype=jnp.int32)) % slots


def _count_pages(gate_ER) -> jax.Array:
    """Pages up to the last open gate, i32 [E]."""
    last_E = jnp.max(jnp.where(gate_ER != 0, jnp.arange(1, gate_ER.shape[1] + 1), 0), axis=1)
    return (last_E + PAGE - 1) // PAGE


def _activate(spec, dtype, gate_up_BF, p_B):
    gate_BF, up_BF = jnp.split(gate_up_BF, 2, axis=-1)
    return (ACTIVATIONS[spec.activation](gate_BF) * up_BF * p_B[:, None]).astype(dtype)


def _columns(gate_up_BF, role: str):
    """Those of [gate | up] that an input role writes."""
    half = gate_up_BF.shape[1] // 2
    return {"gate": gate_up_BF[:, :half], "up": gate_up_BF[:, half:], "gate_up": gate_up_BF}[role]


def _with_columns(gate_up_BF, role: str, part_BF):
    half = gate_up_BF.shape[1] // 2
    if role == "gate_up":
        return part_BF
    both = (part_BF, gate_up_BF[:, half:]) if role == "gate" else (gate_up_BF[:, :half], part_BF)
    return jnp.concatenate(both, axis=1)


def _gram(left_BX, right_BY):
    """sum_B left right^T in f32."""
    return jnp.matmul(left_BX.T, right_BY, preferred_element_type=jnp.float32)


def _add_at(total, part, *first):
    """total with `part` added where it starts at these leading indices."""
    first = (*first, *[0] * (total.ndim - len(first)))
    old = lax.dynamic_slice(total, first, part.shape)
    return lax.dynamic_update_slice(total, old + part.astype(total.dtype), first)
