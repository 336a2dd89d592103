"""Routing and the mixture-of-experts FFN.

The router runs in f32 whatever the model's dtype: in bf16 several per cent of the tokens choose
other experts. Routing statistics are plain outputs, summed over valid tokens, so that they add over
micro-batches and shards.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from drlora_jax.adapters.expert_lora import ExpertLora
from drlora_jax.adapters.lora import AdapterSpec
from drlora_jax.models.architecture import MoeConfig, RoutingConfig
from drlora_jax.models.layers import kernel_init
from drlora_jax.ops.grouped_parts import ROLES, Dropout, ExpertSpec


class RoutingStats(NamedTuple):
    """Sums over the valid tokens of a batch; a leading [L] when all layers are stacked."""

    count_E: jax.Array  # times each expert was chosen, f32
    weight_E: jax.Array  # combine weight each expert got, f32
    probability_E: jax.Array  # softmax probability each expert got, f32 (differentiable)
    log_z_squared: jax.Array  # logsumexp(router logits) ** 2, f32 (differentiable)


class Routing(NamedTuple):
    expert_TK: jax.Array  # i32
    weight_TK: jax.Array  # f32, what multiplies the expert's output


def choose_experts(
    logits_TE: jax.Array, config: RoutingConfig, bias_E: jax.Array | None = None
) -> Routing:
    """Top-k experts and combine weights from f32 router logits; ties go to the lower index."""
    if config.score == "softmax_of_top_k":
        top_TK, expert_TK = jax.lax.top_k(logits_TE, config.experts_per_token)
        return Routing(expert_TK, jax.nn.softmax(top_TK, axis=-1) * config.scaling)
    score_TE = (
        jax.nn.sigmoid(logits_TE)
        if config.score == "sigmoid"
        else jax.nn.softmax(logits_TE, axis=-1)
    )
    if config.top_p is not None:
        return _choose_top_p(score_TE, config)
    choice_TE = score_TE if bias_E is None else score_TE + bias_E[None]
    if config.num_groups > 1:
        choice_TE = _limit_to_groups(choice_TE, config)
    _, expert_TK = jax.lax.top_k(choice_TE, config.experts_per_token)
    weight_TK = jnp.take_along_axis(score_TE, expert_TK, axis=-1)
    if config.normalize:
        weight_TK = weight_TK / (jnp.sum(weight_TK, axis=-1, keepdims=True) + 1e-20)
    return Routing(expert_TK, weight_TK * config.scaling)


def _choose_top_p(score_TE, config: RoutingConfig) -> Routing:
    """Every expert up to and with the first that takes the sum of scores over `top_p`."""
    num_experts = score_TE.shape[-1]
    weight_TK, expert_TK = jax.lax.top_k(score_TE, num_experts)
    before_TK = jnp.cumsum(weight_TK, axis=-1) - weight_TK
    is_chosen_TK = before_TK <= config.top_p
    weight_TK = jnp.where(is_chosen_TK, weight_TK, 0.0)
    if config.normalize:
        weight_TK = weight_TK / jnp.sum(weight_TK, axis=-1, keepdims=True)
    # An index that is no expert's: not counted, not computed.
    expert_TK = jnp.where(is_chosen_TK, expert_TK, num_experts)
    return Routing(expert_TK, weight_TK * config.scaling)


def _limit_to_groups(choice_TE, config: RoutingConfig):
    """Keeps the scores of the best groups; the others can not be chosen."""
    grouped = choice_TE.reshape(choice_TE.shape[0], config.num_groups, -1)
    best = jax.lax.top_k(grouped, 1 if config.group_score == "max" else 2)[0]
    _, chosen = jax.lax.top_k(jnp.sum(best, axis=-1), config.top_groups)
    keep = jnp.sum(jax.nn.one_hot(chosen, config.num_groups), axis=1) > 0
    return jnp.where(keep[:, :, None], grouped, -jnp.inf).reshape(choice_TE.shape)


def routing_stats(logits_TE: jax.Array, routing: Routing, is_valid_T: jax.Array) -> RoutingStats:
    """Statistics over valid tokens only; counts and weights are of the experts really used."""
    num_experts = logits_TE.shape[-1]
    expert_P = jnp.where(is_valid_T[:, None], routing.expert_TK, num_experts).reshape(-1)
    zeros = jnp.zeros(num_experts + 1, jnp.float32)
    valid_T = is_valid_T.astype(jnp.float32)
    return RoutingStats(
        count_E=zeros.at[expert_P].add(1.0)[:num_experts],
        weight_E=zeros.at[expert_P].add(routing.weight_TK.reshape(-1))[:num_experts],
        probability_E=jnp.sum(jax.nn.softmax(logits_TE, axis=-1) * valid_T[:, None], axis=0),
        log_z_squared=jnp.sum(jax.nn.logsumexp(logits_TE, axis=-1) ** 2 * valid_T),
    )


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
        spec = ExpertSpec(
            self.config.activation, self.adapter.scale, self.adapter.dropout, self.base_grad
        )
        is_dropping = bool(lora) and self.adapter.dropout > 0 and self.has_rng("dropout")
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
