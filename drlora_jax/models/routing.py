"""Routing: the experts of each token, their weights, and statistics of the choices.

Routers run in f32 whatever the model's dtype: in bf16 several per cent of the tokens choose other
experts. Routing statistics are plain outputs, summed over valid tokens, so that they add over
micro-batches and shards. A logit of minus infinity is an expert that is not there.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from drlora_jax.models.architecture import RoutingConfig


class RoutingStats(NamedTuple):
    """Sums over the valid tokens of a batch; a leading [L] when all layers are stacked."""

    count_E: jax.Array  # times each expert was chosen, f32
    weight_E: jax.Array  # combine weight each expert got, f32
    probability_E: jax.Array  # softmax probability each expert got, f32 (differentiable)
    log_z_squared: jax.Array  # logsumexp(router logits) ** 2, f32 (differentiable)
    first_E: jax.Array  # times each expert was the first choice, f32
    experts: jax.Array  # experts that can be chosen: no sum, f32


class Routing(NamedTuple):
    expert_TK: jax.Array  # i32; the number of experts where an assignment has none
    weight_TK: jax.Array  # f32, what multiplies the expert's output


def choose_experts(
    logits_TE: jax.Array, config: RoutingConfig, bias_E: jax.Array | None = None
) -> Routing:
    """Top-k experts and combine weights from f32 router logits; ties go to the lower index."""
    if config.score == "softmax_of_top_k":
        expert_TK = _highest(logits_TE, config.experts_per_token)
        top_TK = jnp.take_along_axis(logits_TE, expert_TK, axis=-1)
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
    expert_TK = _highest(choice_TE, config.experts_per_token)
    weight_TK = jnp.take_along_axis(score_TE, expert_TK, axis=-1)
    if config.normalize:
        weight_TK = weight_TK / (jnp.sum(weight_TK, axis=-1, keepdims=True) + 1e-20)
    return Routing(expert_TK, weight_TK * config.scaling)


def _highest(score_TE, count: int):
    """Indices of the highest scores, kept: to find them again takes longer than to read them."""
    return checkpoint_name(jax.lax.top_k(score_TE, count)[1], "expert")


def _choose_top_p(score_TE, config: RoutingConfig) -> Routing:
    """Every expert up to and with the first that takes the sum of scores over `top_p`."""
    num_experts = score_TE.shape[-1]
    expert_TK = _highest(score_TE, num_experts)
    weight_TK = jnp.take_along_axis(score_TE, expert_TK, axis=-1)
    before_TK = jnp.cumsum(weight_TK, axis=-1) - weight_TK
    is_chosen_TK = before_TK <= config.top_p
    weight_TK = jnp.where(is_chosen_TK, weight_TK, 0.0)
    if config.normalize:
        weight_TK = weight_TK / jnp.sum(weight_TK, axis=-1, keepdims=True)
    # An index that is no expert's: not counted, not computed.
    expert_TK = jnp.where(is_chosen_TK, expert_TK, num_experts)
    return Routing(expert_TK, weight_TK * config.scaling)


def _limit_to_groups(choice_TE, config: RoutingConfig):
    """Keeps the scores of the best groups; the others cannot be chosen."""
    grouped = choice_TE.reshape(choice_TE.shape[0], config.num_groups, -1)
    best = jax.lax.top_k(grouped, 1 if config.group_score == "max" else 2)[0]
    _, chosen = jax.lax.top_k(jnp.sum(best, axis=-1), config.top_groups)
    keep = jnp.sum(jax.nn.one_hot(chosen, config.num_groups), axis=1) > 0
    return jnp.where(keep[:, :, None], grouped, -jnp.inf).reshape(choice_TE.shape)


def routing_stats(logits_TE: jax.Array, routing: Routing, is_valid_T: jax.Array) -> RoutingStats:
    """Statistics over valid tokens only; counts and weights are of the experts really used."""
    num_experts = logits_TE.shape[-1]
    expert_TK = jnp.where(is_valid_T[:, None], routing.expert_TK, num_experts)
    zeros = jnp.zeros(num_experts + 1, jnp.float32)
    valid_T = is_valid_T.astype(jnp.float32)
    return RoutingStats(
        count_E=zeros.at[expert_TK.reshape(-1)].add(1.0)[:num_experts],
        weight_E=zeros.at[expert_TK.reshape(-1)].add(routing.weight_TK.reshape(-1))[:num_experts],
        probability_E=jnp.sum(jax.nn.softmax(logits_TE, axis=-1) * valid_T[:, None], axis=0),
        log_z_squared=jnp.sum(jax.nn.logsumexp(logits_TE, axis=-1) ** 2 * valid_T),
        first_E=zeros.at[expert_TK[:, 0]].add(1.0)[:num_experts],
        experts=jnp.sum(logits_TE[0] > -jnp.inf).astype(jnp.float32),
    )


def mean_stats(routers: list[RoutingStats]) -> RoutingStats | None:
    """The mean over several routers of the same tokens, as if they were one; None for none."""
    if len(routers) < 2:
        return routers[0] if routers else None
    return jax.tree.map(lambda *each: sum(each) / len(each), *routers)
