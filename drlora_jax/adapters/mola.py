"""MoLA (arXiv 2402.08562): routed LoRA experts on every adapted matrix of a dense model.

Each adapted projection has a router of its own on its own input and E pairs of factors,

    y = W x + sum_k w_k s B_{e_k} A_{e_k} x

with w the renormalised softmax of the best K, so that B = 0 is the base. With the factors of all
experts side by side along the rank that is one LoRA of rank E * R whose z = A x is multiplied with
the weights: the cost of plain LoRA, whatever the routing. Layers with fewer experts than the one
with most have closed ones beside them: see `routing.open_experts`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from drlora_jax.adapters.expert_lora import ExpertLora
from drlora_jax.adapters.lora import NO_ADAPTER, drop_in_training, init_a
from drlora_jax.models.layers import Projection
from drlora_jax.models.routing import (
    Routing,
    RoutingStats,
    choose_open,
    open_experts,
    routing_stats,
)
from drlora_jax.ops.lora_deltas import from_ranks, open_ranks, ranks_of_all


class Router(nn.Module):
    """Logits f32 [T, E] of one matrix's experts."""

    num_experts: int

    @nn.compact
    def __call__(self, x_TD):
        shape_ED = (self.num_experts, x_TD.shape[-1])
        router_DE = self.variable(
            "lora", "router", lambda: init_a(self.make_rng("params"), shape_ED).T
        ).value
        return x_TD.astype(jnp.float32) @ router_DE


def routed_projection(
    parent: nn.Module, role: str, features: int, x_BTD, segment_ids_BT, *, has_bias: bool = False
) -> tuple[jax.Array, list[RoutingStats]]:
    """The projection `role` of attention or an FFN with whatever its adapter adds, and the
    statistics of its router if it has one.

    Args:
      parent: the module whose `__call__` this is part of; it has `location`, `dtype`, `adapter` and
        `routing`.
    """
    adapter, routing, path = parent.adapter, parent.routing, f"{parent.location}/{role}"
    plain = adapter if routing is None else NO_ADAPTER
    y_BTF = Projection(features, path, parent.dtype, plain, has_bias, name=role)(x_BTD)
    if routing is None or path not in adapter.paths:
        return y_BTF, []
    width = x_BTD.shape[-1]
    x_TD, is_valid_T = x_BTD.reshape(-1, width), segment_ids_BT.reshape(-1) > 0
    experts = routing.num_experts
    factors = ExpertLora(experts, width, features, adapter, name=f"{role}_lora")()
    logits_TE = Router(experts, name=f"{role}_router")(x_TD)
    logits_TE, chosen = choose_open(logits_TE, open_experts(factors.gate_ER), routing)
    z_TER = ranks_of_all(drop_in_training(parent, x_TD, adapter.dropout), factors)
    z_TER = open_ranks(z_TER, _dense_weights(chosen, experts), factors, adapter.scale)
    delta_BTF = from_ranks(z_TER, factors).reshape(y_BTF.shape)
    return y_BTF + delta_BTF, [routing_stats(logits_TE, chosen, is_valid_T)]


def _dense_weights(chosen: Routing, experts: int) -> jax.Array:
    """The weight of every expert for every token, f32 [T, E]; 0 where it was not chosen."""
    is_expert_TKE = jax.nn.one_hot(chosen.expert_TK, experts)
    return jnp.einsum("TK,TKE->TE", chosen.weight_TK, is_expert_TKE)
