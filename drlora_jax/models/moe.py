"""The mixture-of-experts FFN of a pretrained MoE."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from drlora_jax.models.architecture import MoeConfig
from drlora_jax.models.layers import kernel_init
from drlora_jax.models.options import DecoderOptions
from drlora_jax.models.routing import RoutingStats, choose_experts, routing_stats
from drlora_jax.ops.experts.shared import Dropout, ExpertSpec


class ExpertStack(NamedTuple):
    """Frozen expert weights of a segment's scan, and the layer that is meant."""

    gate_up_LEDF: jax.Array
    down_LEFD: jax.Array
    layer: jax.Array


class Moe(nn.Module):
    config: MoeConfig
    options: DecoderOptions

    @nn.compact
    def __call__(
        self, x_BTD, segment_ids_BT, stack: ExpertStack | None = None
    ) -> tuple[jax.Array, list[RoutingStats]]:
        """The output [B, T, D], and the statistics of the router."""
        width, hidden = x_BTD.shape[-1], self.config.expert_dim
        experts, options = self.config.routing.num_experts, self.options
        x_TD, is_valid_T = x_BTD.reshape(-1, width), segment_ids_BT.reshape(-1) > 0
        logits_TE, bias_E = self._router_logits(x_TD)
        routing = choose_experts(logits_TE, self.config.routing, bias_E)
        stats = routing_stats(logits_TE, routing, is_valid_T)

        gate_up_shape, down_shape = (experts, width, 2 * hidden), (experts, hidden, width)
        w_gate_up_EDF = self.param("gate_up", kernel_init, gate_up_shape, options.dtype)
        w_down_EFD = self.param("down", kernel_init, down_shape, options.dtype)
        weights, which = (w_gate_up_EDF, w_down_EFD), {}
        if stack is not None:
            weights, which = (stack.gate_up_LEDF, stack.down_LEFD), {"layer": stack.layer}
        shapes = {role: (width, hidden) for role in ("gate", "up")}
        shapes |= {"gate_up": (width, 2 * hidden), "down": (hidden, width)}
        lora = options.adapter.expert_matrices(self, experts, shapes)
        spec = ExpertSpec(
            activation=self.config.activation,
            scale=lora.strength.scale,
            dropout=lora.strength.dropout,
            base_grad=options.base_grad,
            repeats=options.remat == "full",  # the backward pass computes the whole layer again
        )
        is_dropping = bool(lora.roles) and spec.dropout > 0 and self.has_rng("dropout")
        y_TD = options.ops.expert_mlp(
            x_TD,
            # Padding is computed by no expert: its output is zero and it costs nothing.
            jnp.where(is_valid_T[:, None], routing.expert_TK, experts),
            routing.weight_TK,
            *weights,
            lora.roles,
            spec,
            dropout=Dropout(self.make_rng("dropout")) if is_dropping else None,
            **which,
        )
        return y_TD.reshape(x_BTD.shape), [stats]

    def _router_logits(self, x_TD):
        routing = self.config.routing
        shape_DE = (x_TD.shape[-1], routing.num_experts)
        kernel_DE = self.param("router", kernel_init, shape_DE, self.options.dtype)
        kernel_DE = kernel_DE.astype(jnp.float32)
        delta_DE = self.options.adapter.router_delta(self, shape_DE)
        if delta_DE is not None:
            kernel_DE = kernel_DE + delta_DE
        bias_E = None
        if routing.has_selection_bias:
            bias_E = self.param("selection_bias", nn.initializers.zeros, shape_DE[1:], jnp.float32)
        return x_TD.astype(jnp.float32) @ kernel_DE, bias_E
