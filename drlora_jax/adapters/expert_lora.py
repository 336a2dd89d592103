"""Placement `expert_lora`: every routed expert has factors of the maximum rank, of which a prefix
is active.

The collection `rank_mask` holds one gate f32 [E, R] per adapted projection: the mask arange(R) <
rank, times a gate of one whose gradient is the importance of each rank. It is state: never trained,
derived from the integer ranks.
"""

import flax.linen as nn
import jax.numpy as jnp

from drlora_jax.adapters.lora import AdapterSpec, init_a
from drlora_jax.ops.experts.shared import RoleLora


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
