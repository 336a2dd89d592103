"""What the backends of the expert operation share: its types, activations, products and dropout."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

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
    repeats: bool = False  # the backward pass computes pre-activations again, where it has a choice


class Dropout(NamedTuple):
    """Randomness that does not depend on how tokens are sorted or sharded: one stream per role and
    (token, expert) assignment.
    """

    key: jax.Array
    # For a part of a batch: the number of each token's first assignment in the whole batch.
    first_slot_T: jax.Array | None = None

    def slots(self, slots_B: jax.Array, per_token: int) -> jax.Array:
        """The numbers, in the whole batch, of assignments of these tokens."""
        if self.first_slot_T is None:
            return slots_B
        return self.first_slot_T[slots_B // per_token] + slots_B % per_token


def matmul(left, right):
    """Products accumulate in f32 and return in the dtype of the tokens, gradients as well: asked
    for an f32 result that is cast, autodiff would multiply f32 by f32.
    """
    return jnp.matmul(left, right).astype(left.dtype)


def _hash(x):
    """lowbias32: a bijection of uint32 in which every input bit flips every output bit half the
    time.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _role_key(dropout: Dropout, role: int | jax.Array):
    return jax.random.fold_in(dropout.key, role)


def drop(x_BD, slots_B, role: str, spec: ExpertSpec, dropout: Dropout):
    """Dropout of rows by the numbers of their assignments; linear, so it is its own pullback."""
    if spec.dropout == 0.0:
        return x_BD
    row_seed, column_seed = jax.random.bits(_role_key(dropout, ROLES.index(role)), (2,), jnp.uint32)
    # A hash of (assignment, column): jax.random inside the block loop takes twice as long to
    # compile, and a draw by block would depend on how the tokens are sorted.
    row_B = _hash(slots_B.astype(jnp.uint32) ^ row_seed)
    column_D = jnp.arange(x_BD.shape[1], dtype=jnp.uint32) * jnp.uint32(0x9E3779B9) + column_seed
    keep_BD = _hash(row_B[:, None] ^ column_D[None]) >= jnp.uint32(round(spec.dropout * 2**32))
    return jnp.where(keep_BD, x_BD / (1.0 - spec.dropout), 0).astype(x_BD.dtype)
