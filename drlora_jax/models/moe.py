"""The mixture-of-experts FFN of a pretrained MoE."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from drlora_jax.adapters.expert_lora import ExpertLora
from drlora_jax.adapters.lora import AdapterSpec
from drlora_jax.models.architecture import MoeConfig
from drlora_jax.models.layers import kernel_init
from drlora_jax.models.routing import RoutingStats, choose_experts, routing_stats
from drlora_jax.ops.experts.shared import ROLES, Dropout, ExpertSpec


class ExpertStack(NamedTuple):
    """Frozen expert weights of a segment's scan, and the layer that is meant."""

    gate_up_LEDF: jax.Array
    down_LEFD: jax.Array
    layer: jax.Array


class Moe(nn.Module):
    config: MoeConfig
    location: str
    dtype: jnp.dtype
    adapter: AdapterSpec
    expert_mlp: Callable  # ops.grouped.expert_mlp, or the same over a mesh
    base_grad: bool
    repeats: bool  # the backward pass computes the whole layer again

    @nn.compact
    def __call__(
        self, x_BTD, segment_ids_BT, stack: ExpertStack | None = None
    ) -> tuple[jax.Array, RoutingStats]:
        width, routing_config = x_BTD.shape[-1], self.config.routing
        experts, hidden = routing_config.num_experts, self.config.expert_dim
        x_TD, is_valid_T = x_BTD.reshape(-1, width), segment_ids_BT.reshape(-1) > 0
        logits_TE, bias_E = self._router_logits(x_TD)
        routing = choose_experts(logits_TE, routing_config, bias_E)
        stats = routing_stats(logits_TE, routing, is_valid_T)

        w_gate_up_EDF = self.param("gate_up", kernel_init, (experts, width, 2 * hidden), self.dtype)
        w_down_EFD = self.param("down", kernel_init, (experts, hidden, width), self.dtype)
        weights, which = (w_gate_up_EDF, w_down_EFD), {}
        if stack is not None:
            weights, which = (stack.gate_up_LEDF, stack.down_LEFD), {"layer": stack.layer}
        shapes = {role: (width, hidden) for role in ("gate", "up")}
        shapes |= {"gate_up": (width, 2 * hidden), "down": (hidden, width)}
        lora = {
            role: ExpertLora(experts, *shapes[role], self.adapter, name=f"{role}_lora")()
            for role in ROLES
            if f"{self.location}/{role}" in self.adapter.paths
        }
        adapter = self.adapter.of_experts
        options = (adapter.scale, adapter.dropout, self.base_grad, self.repeats)
        spec = ExpertSpec(self.config.activation, *options)
        is_dropping = bool(lora) and adapter.dropout > 0 and self.has_rng("dropout")
        y_TD = self.expert_mlp(
            x_TD,
            # Padding is computed by no expert: its output is zero and it costs nothing.
            jnp.where(is_valid_T[:, None], routing.expert_TK, experts),
            routing.weight_TK,
            *weights,
            lora,
            spec,
            dropout=Dropout(self.make_rng("dropout")) if is_dropping else None,
            **which,
        )
        return y_TD.reshape(x_BTD.shape), stats

    def _router_logits(self, x_TD):
        routing = self.config.routing
        shape_DE = (x_TD.shape[-1], routing.num_experts)
        kernel_DE = self.param("router", kernel_init, shape_DE, self.dtype).astype(jnp.float32)
        if self.adapter.train_router:
            kernel_DE = (
                kernel_DE + self.variable("lora", "router_delta", lambda: jnp.zeros(shape_DE)).value
            )
        bias_E = None
        if routing.has_selection_bias:
            bias_E = self.param("selection_bias", nn.initializers.zeros, shape_DE[1:], jnp.float32)
        return x_TD.astype(jnp.float32) @ kernel_DE, bias_E
