"""Computes what the chosen experts of every token add to a product: s (x A_e^T) B_e, for K experts
per token.

There are two ways, with the same arguments and results:

    SideBySide  treats the LoRA matrices of all experts as one pair of rank E * R, in which the
                ranks of other experts are masked: two plain products, E / K times the necessary
                operations
    Sorted      sorts the (token, expert) assignments by expert, in blocks of one expert each: only
                the necessary operations, and K copies of every row

The products of LoRA are thin, so moving rows costs as much as multiplying them until E * R is
large: `deltas_of` uses `Sorted` from `SORTED_FROM` ranks on. On CPU it is slightly faster from 128
on (docs/benchmarks.md); a matrix unit is not filled below about 128 columns, and processes K
assignments per token.

Letters: T tokens, K experts per token, P = T * K assignments, E experts, R ranks, D inputs, F
outputs, N blocks of S places.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from drlora_jax.ops.experts.shared import RoleLora
from drlora_jax.system.numbers import ceil_div

SORTED_FROM = 256  # E * R
BLOCK = 64  # S; larger blocks would be mostly padding where tokens are few


def deltas_of(expert_TK: jax.Array, matrices: RoleLora, scale: float) -> "SideBySide | Sorted":
    """Returns the cheaper way for this number of experts and ranks (decided by static shapes)."""
    experts, ranks = matrices.gate_ER.shape
    if experts * ranks < SORTED_FROM:
        return side_by_side(expert_TK, matrices, scale)
    return Sorted(sort_slots(expert_TK, experts), scale)


def side_by_side(expert_TK: jax.Array, matrices: RoleLora, scale: float) -> "SideBySide":
    """Returns the way for a mesh: every token stays on its device; sorting would gather them."""
    return SideBySide(expert_TK, matrices.gate_ER.shape[0], scale)


def ranks_of_all(x_TD: jax.Array, matrices: RoleLora) -> jax.Array:
    """Returns z = x A^T of every expert, [T, E, R] in the dtype of x."""
    return jnp.einsum("TD,ERD->TER", x_TD, matrices.a_ERD.astype(x_TD.dtype))


def open_ranks(z_TER: jax.Array, weight_TE: jax.Array, matrices: RoleLora, scale: float):
    """Returns s w z of every expert's active ranks, [T, E, R] in the dtype of z."""
    return (z_TER * (weight_TE[:, :, None] * (scale * matrices.gate_ER)[None])).astype(z_TER.dtype)


def from_ranks(z_TER: jax.Array, matrices: RoleLora) -> jax.Array:
    """Returns the sum over experts and ranks of z B, [T, F] in the dtype of z."""
    return jnp.einsum("TER,ERF->TF", z_TER, matrices.b_ERF.astype(z_TER.dtype))


class SideBySide(NamedTuple):
    expert_TK: jax.Array
    num_experts: int
    scale: float

    def of_tokens(self, x_TD: jax.Array, matrices: RoleLora) -> list[jax.Array]:
        """Returns K arrays: what each of a token's experts adds, [T, F] in the dtype of x."""
        z_TER = ranks_of_all(x_TD, matrices)
        return [
            from_ranks(open_ranks(z_TER, is_expert_TE, matrices, self.scale), matrices)
            for is_expert_TE in self._chosen()
        ]

    def of_slots(
        self, rows: list[jax.Array], weight_TK: jax.Array, matrices: RoleLora
    ) -> jax.Array:
        """Returns the weighted sum of what a token's experts add, [T, F], each computed from its
        own row; `rows` are K arrays [T, D].
        """
        z_TER = 0.0
        for slot, (rows_TD, is_expert_TE) in enumerate(zip(rows, self._chosen(), strict=True)):
            weight_TE = weight_TK[:, slot, None] * is_expert_TE
            z_TER += open_ranks(ranks_of_all(rows_TD, matrices), weight_TE, matrices, self.scale)
        return from_ranks(z_TER, matrices)

    def _chosen(self) -> list[jax.Array]:
        return [jax.nn.one_hot(expert_T, self.num_experts) for expert_T in self.expert_TK.T]


class Blocks(NamedTuple):
    """Holds assignments sorted by expert; every block belongs to one expert and may end with empty
    places.
    """

    slot_NS: jax.Array  # number of the assignment; 0 at an empty place
    is_taken_NS: jax.Array
    expert_N: jax.Array
    place_P: jax.Array  # place of each assignment in N * S


def sort_slots(expert_TK: jax.Array, num_experts: int, block: int = BLOCK) -> Blocks:
    """Sorts assignments into blocks; P / S + E blocks suffice, however tokens are distributed."""
    expert_P = expert_TK.reshape(-1)
    slots = expert_P.size
    order_P = jnp.argsort(expert_P, stable=True)
    experts = jnp.arange(num_experts)
    size_E = jnp.sum(expert_P[None] == experts[:, None], axis=1)
    start_E = jnp.cumsum(size_E) - size_E
    blocks_E = ceil_div(size_E, block)
    first_E = jnp.cumsum(blocks_E) - blocks_E
    number_N = jnp.arange(slots // block + num_experts)
    expert_N = jnp.searchsorted(jnp.cumsum(blocks_E), number_N, side="right")
    expert_N = jnp.minimum(expert_N, num_experts - 1)  # the last blocks may be empty
    within_NS = (number_N - first_E[expert_N])[:, None] * block + jnp.arange(block)[None]
    is_taken_NS = within_NS < size_E[expert_N][:, None]
    sorted_NS = jnp.where(is_taken_NS, start_E[expert_N][:, None] + within_NS, 0)
    rank_P = jnp.argsort(order_P)  # position of each assignment in the sorted order
    place_P = first_E[expert_P] * block + rank_P - start_E[expert_P]
    return Blocks(jnp.where(is_taken_NS, order_P[sorted_NS], 0), is_taken_NS, expert_N, place_P)


class Sorted(NamedTuple):
    blocks: Blocks
    scale: float

    def of_tokens(self, x_TD: jax.Array, matrices: RoleLora) -> list[jax.Array]:
        """Computes the same as `SideBySide.of_tokens`."""
        slots_each = self.blocks.place_P.size // x_TD.shape[0]
        delta_PF = self._delta(jnp.repeat(x_TD, slots_each, axis=0), matrices)
        return list(jnp.moveaxis(delta_PF.reshape(x_TD.shape[0], slots_each, -1), 1, 0))

    def of_slots(
        self, rows: list[jax.Array], weight_TK: jax.Array, matrices: RoleLora
    ) -> jax.Array:
        """Computes the same as `SideBySide.of_slots`."""
        rows_TKD = jnp.stack(rows, axis=1)
        delta_PF = self._delta(rows_TKD.reshape(-1, rows_TKD.shape[-1]), matrices)
        delta_TKF = delta_PF.reshape(*weight_TK.shape, -1)
        return jnp.sum(weight_TK[..., None] * delta_TKF, axis=1).astype(delta_PF.dtype)

    def _delta(self, rows_PD: jax.Array, matrices: RoleLora) -> jax.Array:
        """Returns what each assignment adds, [P, F]."""
        blocks, dtype = self.blocks, rows_PD.dtype
        rows_NSD = _into_blocks(rows_PD, blocks)
        a_NRD, b_NRF = (
            leaf.astype(dtype)[blocks.expert_N] for leaf in (matrices.a_ERD, matrices.b_ERF)
        )
        gate_NR = self.scale * matrices.gate_ER[blocks.expert_N]
        z_NSR = jnp.einsum("NSD,NRD->NSR", rows_NSD, a_NRD)
        z_NSR = (z_NSR * gate_NR[:, None, :]).astype(dtype)
        return _out_of_blocks(jnp.einsum("NSR,NRF->NSF", z_NSR, b_NRF), blocks)


# Each of the following is the other's transpose. Autodiff would turn a gather into a scatter.


def _gather_in(rows_PX, blocks: Blocks):
    return jnp.where(blocks.is_taken_NS[..., None], rows_PX[blocks.slot_NS], 0)


def _gather_out(rows_NSX, blocks: Blocks):
    return rows_NSX.reshape(-1, rows_NSX.shape[-1])[blocks.place_P]


@jax.custom_vjp
def _into_blocks(rows_PX: jax.Array, blocks: Blocks) -> jax.Array:
    """Gathers rows into blocks, [N, S, X], zero at empty places."""
    return _gather_in(rows_PX, blocks)


@jax.custom_vjp
def _out_of_blocks(rows_NSX: jax.Array, blocks: Blocks) -> jax.Array:
    """Gathers the rows of assignments from blocks, [P, X]."""
    return _gather_out(rows_NSX, blocks)


_into_blocks.defvjp(
    lambda rows_PX, blocks: (_gather_in(rows_PX, blocks), blocks),
    lambda blocks, d_NSX: (_gather_out(d_NSX, blocks), None),
)
_out_of_blocks.defvjp(
    lambda rows_NSX, blocks: (_gather_out(rows_NSX, blocks), blocks),
    lambda blocks, d_PX: (_gather_in(d_PX, blocks), None),
)
