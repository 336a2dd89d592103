"""Placement `expert_lora`: every routed expert has factors of the maximum rank, of which a prefix
is active.

The collection `rank_mask` holds one gate f32 [E, R] per adapted projection: the mask arange(R) <
rank, times a gate of one whose gradient is the importance of each rank. It is state: never trained,
derived from the integer ranks.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from drlora_jax.adapters.lora import AdapterSpec, init_a
from drlora_jax.ops.grouped_parts import RoleLora


class ExpertLora(nn.Module):
    """Factors and gate of one projection of all experts."""

    num_experts: int
    in_features: int
    out_features: int
    adapter: AdapterSpec

    @nn.compact
    def __call__(self) -> RoleLora:
        shape_ER = (self.num_experts, self.adapter.max_rank)
        a_shape = (*shape_ER, self.in_features)
        a_ERD = self.variable("lora", "a", lambda: init_a(self.make_rng("params"), a_shape)).value
        b_ERF = self.variable(
            "lora", "b", lambda: jnp.zeros((*shape_ER, self.out_features), jnp.float32)
        ).value
        gate_ER = self.variable("rank_mask", "gate", lambda: jnp.ones(shape_ER, jnp.float32)).value
        return RoleLora(a_ERD, b_ERF, gate_ER)


# The factors of all experts lie side by side along the rank, so that many small products are one.


def ranks_of_all(x_TD: jax.Array, factors: RoleLora) -> jax.Array:
    """z = x A^T of every expert, [T, E, R] in the dtype of x."""
    return jnp.einsum("TD,ERD->TER", x_TD, factors.a_ERD.astype(x_TD.dtype))


def open_ranks(z_TER: jax.Array, weight_TE: jax.Array, factors: RoleLora, scale: float):
    """s w z of every expert's open ranks, [T, E, R] in the dtype of z."""
    return (z_TER * (weight_TE[:, :, None] * (scale * factors.gate_ER)[None])).astype(z_TER.dtype)


def from_ranks(z_TER: jax.Array, factors: RoleLora) -> jax.Array:
    """sum over experts and ranks of z B, [T, F] in the dtype of z."""
    return jnp.einsum("TER,ERF->TF", z_TER, factors.b_ERF.astype(z_TER.dtype))
