"""What the chosen experts of every token add to a product: s (x A_e^T) B_e, for K experts a token.

Two ways to compute it, with the same arguments and numbers:

    SideBySide  the factors of all experts as one of rank E * R, with every rank of other experts
                masked: two plain products, E / K times the operations that are needed
    Sorted      slots sorted by expert, in blocks of one expert each: only what is needed, and K
                copies of every row

A LoRA's products are thin, so that moving rows costs as much as they do until E * R is large:
`deltas_of` takes `Sorted` from `SORTED_FROM` ranks on. On CPU it is a little faster from 128 on
(docs/benchmarks.md); a matrix unit is not full below about 128 columns, and has K slots to fill.

Letters: T tokens, K experts a token, P = T * K slots, E experts, R ranks, D inputs, F outputs, N
blocks of S slots.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from drlora_jax.ops.experts.shared import RoleLora
from drlora_jax.system.numbers import ceil_div

SORTED_FROM = 256  # E * R
BLOCK = 64  # S: of more, most are padding where tokens are few


def deltas_of(expert_TK: jax.Array, factors: RoleLora, scale: float) -> "SideBySide | Sorted":
    """The cheaper way for experts of this number and rank (static: it is a matter of shapes)."""
    experts, ranks = factors.gate_ER.shape
    if experts * ranks < SORTED_FROM:
        return side_by_side(expert_TK, factors, scale)
    return Sorted(sort_slots(expert_TK, experts), scale)


def side_by_side(expert_TK: jax.Array, factors: RoleLora, scale: float) -> "SideBySide":
    """Over a mesh: every token stays where it is, sorting would gather them."""
    return SideBySide(expert_TK, factors.gate_ER.shape[0], scale)


def ranks_of_all(x_TD: jax.Array, factors: RoleLora) -> jax.Array:
    """z = x A^T of every expert, [T, E, R] in the dtype of x."""
    return jnp.einsum("TD,ERD->TER", x_TD, factors.a_ERD.astype(x_TD.dtype))


def open_ranks(z_TER: jax.Array, weight_TE: jax.Array, factors: RoleLora, scale: float):
    """s w z of every expert's open ranks, [T, E, R] in the dtype of z."""
    return (z_TER * (weight_TE[:, :, None] * (scale * factors.gate_ER)[None])).astype(z_TER.dtype)


def from_ranks(z_TER: jax.Array, factors: RoleLora) -> jax.Array:
    """sum over experts and ranks of z B, [T, F] in the dtype of z."""
    return jnp.einsum("TER,ERF->TF", z_TER, factors.b_ERF.astype(z_TER.dtype))


class SideBySide(NamedTuple):
    expert_TK: jax.Array
    num_experts: int
    scale: float

    def of_tokens(self, x_TD: jax.Array, factors: RoleLora) -> list[jax.Array]:
        """For each of a token's K experts what it adds, [T, F] in the dtype of x."""
        z_TER = ranks_of_all(x_TD, factors)
        return [
            from_ranks(open_ranks(z_TER, is_expert_TE, factors, self.scale), factors)
            for is_expert_TE in self._chosen()
        ]

    def of_slots(self, rows: list[jax.Array], weight_TK: jax.Array, factors: RoleLora) -> jax.Array:
        """What a token's experts add together, each from its own row and with its weight; `rows`
        are K arrays [T, D].
        """
        z_TER = 0.0
        for slot, (rows_TD, is_expert_TE) in enumerate(zip(rows, self._chosen(), strict=True)):
            weight_TE = weight_TK[:, slot, None] * is_expert_TE
            z_TER += open_ranks(ranks_of_all(rows_TD, factors), weight_TE, factors, self.scale)
        return from_ranks(z_TER, factors)

    def _chosen(self) -> list[jax.Array]:
        return [jax.nn.one_hot(expert_T, self.num_experts) for expert_T in self.expert_TK.T]


class Blocks(NamedTuple):
    """Slots sorted by expert; every block is of one expert and may end with empty places."""

    slot_NS: jax.Array  # 0 at an empty place
    is_taken_NS: jax.Array
    expert_N: jax.Array
    place_P: jax.Array  # where each slot is, in N * S


def sort_slots(expert_TK: jax.Array, num_experts: int, block: int = BLOCK) -> Blocks:
    """Blocks for these choices; P / S + E of them are enough, however tokens are spread."""
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
    expert_N = jnp.minimum(expert_N, num_experts - 1)  # blocks behind all are empty
    within_NS = (number_N - first_E[expert_N])[:, None] * block + jnp.arange(block)[None]
    is_taken_NS = within_NS < size_E[expert_N][:, None]
    sorted_NS = jnp.where(is_taken_NS, start_E[expert_N][:, None] + within_NS, 0)
    rank_P = jnp.argsort(order_P)  # of a slot among all, sorted
    place_P = first_E[expert_P] * block + rank_P - start_E[expert_P]
    return Blocks(jnp.where(is_taken_NS, order_P[sorted_NS], 0), is_taken_NS, expert_N, place_P)


class Sorted(NamedTuple):
    blocks: Blocks
    scale: float

    def of_tokens(self, x_TD: jax.Array, factors: RoleLora) -> list[jax.Array]:
        """As `SideBySide.of_tokens`."""
        slots_each = self.blocks.place_P.size // x_TD.shape[0]
        delta_PF = self._delta(jnp.repeat(x_TD, slots_each, axis=0), factors)
        return list(jnp.moveaxis(delta_PF.reshape(x_TD.shape[0], slots_each, -1), 1, 0))

    def of_slots(self, rows: list[jax.Array], weight_TK: jax.Array, factors: RoleLora) -> jax.Array:
        """As `SideBySide.of_slots`."""
        rows_TKD = jnp.stack(rows, axis=1)
        delta_PF = self._delta(rows_TKD.reshape(-1, rows_TKD.shape[-1]), factors)
        delta_TKF = delta_PF.reshape(*weight_TK.shape, -1)
        return jnp.sum(weight_TK[..., None] * delta_TKF, axis=1).astype(delta_PF.dtype)

    def _delta(self, rows_PD: jax.Array, factors: RoleLora) -> jax.Array:
        """[P, F]"""
        blocks, dtype = self.blocks, rows_PD.dtype
        rows_NSD = _into_blocks(rows_PD, blocks)
        a_NRD, b_NRF = (
            leaf.astype(dtype)[blocks.expert_N] for leaf in (factors.a_ERD, factors.b_ERF)
        )
        gate_NR = self.scale * factors.gate_ER[blocks.expert_N]
        z_NSR = jnp.einsum("NSD,NRD->NSR", rows_NSD, a_NRD)
        z_NSR = (z_NSR * gate_NR[:, None, :]).astype(dtype)
        return _out_of_blocks(jnp.einsum("NSR,NRF->NSF", z_NSR, b_NRF), blocks)


# Each is the other's transpose. Autodiff would make a scatter of a gather.


def _gather_in(rows_PX, blocks: Blocks):
    return jnp.where(blocks.is_taken_NS[..., None], rows_PX[blocks.slot_NS], 0)


def _gather_out(rows_NSX, blocks: Blocks):
    return rows_NSX.reshape(-1, rows_NSX.shape[-1])[blocks.place_P]


@jax.custom_vjp
def _into_blocks(rows_PX: jax.Array, blocks: Blocks) -> jax.Array:
    """[N, S, X], zero at empty places."""
    return _gather_in(rows_PX, blocks)


@jax.custom_vjp
def _out_of_blocks(rows_NSX: jax.Array, blocks: Blocks) -> jax.Array:
    """[P, X]"""
    return _gather_out(rows_NSX, blocks)


_into_blocks.defvjp(
    lambda rows_PX, blocks: (_gather_in(rows_PX, blocks), blocks),
    lambda blocks, d_NSX: (_gather_out(d_NSX, blocks), None),
)
_out_of_blocks.defvjp(
    lambda rows_NSX, blocks: (_gather_out(rows_NSX, blocks), blocks),
    lambda blocks, d_PX: (_gather_in(d_PX, blocks), None),
)
