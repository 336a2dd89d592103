"""Choice of experts and routing statistics against NumPy loops."""

import jax.numpy as jnp
import numpy as np
import pytest

from drlora_jax.models.architecture import RoutingConfig
from drlora_jax.models.routing import Routing, choose_experts, routing_stats


def top(values, count):
    """Indices of the largest values, best first; of equal ones the lower index."""
    return sorted(range(len(values)), key=lambda index: (-values[index], index))[:count]


def loop_choose(logits, config, bias=None):
    """One token at a time."""
    experts, weights = [], []
    for row in np.asarray(logits, np.float64):
        if config.score == "softmax_of_top_k":
            chosen = top(row, config.experts_per_token)
            weight = np.exp(row[chosen]) / np.exp(row[chosen]).sum()
        else:
            score = 1 / (1 + np.exp(-row))
            if config.score == "softmax":
                score = np.exp(row) / np.exp(row).sum()
            choice = score if bias is None else score + bias
            allowed = range(len(row))
            if config.num_groups > 1:
                groups = choice.reshape(config.num_groups, -1)
                kept = {"max": 1, "top2_sum": 2}[config.group_score]
                worth = [np.sort(group)[-kept:].sum() for group in groups]
                best = top(worth, config.top_groups)
                allowed = [i for i in allowed if i // groups.shape[1] in best]
            limited = [choice[i] if i in allowed else -np.inf for i in range(len(row))]
            chosen = top(limited, config.experts_per_token)
            weight = score[chosen]
            if config.normalize:
                weight = weight / weight.sum()
        experts.append(chosen)
        weights.append(weight * config.scaling)
    return np.array(experts), np.array(weights)


CASES = {
    "softmax": RoutingConfig(16, 4),
    "normalised": RoutingConfig(16, 4, normalize=True),
    "one": RoutingConfig(16, 1, normalize=True),
    "all": RoutingConfig(16, 16),
    "top_8": RoutingConfig(64, 8, normalize=True),
    "sigmoid": RoutingConfig(16, 4, "sigmoid", normalize=True, scaling=2.5),
    "softmax_of_top_k": RoutingConfig(16, 4, "softmax_of_top_k", scaling=0.5),
    "groups_max": RoutingConfig(16, 3, scaling=16.0, num_groups=4, top_groups=2),
    "groups_top2_sum": RoutingConfig(
        16, 4, "sigmoid", True, 2.5, num_groups=4, top_groups=2, group_score="top2_sum"
    ),
}


# A selection bias is added to scores, and softmax_of_top_k has none before the choice.
@pytest.mark.parametrize(
    "name, has_bias",
    [
        (name, has_bias)
        for name, config in CASES.items()
        for has_bias in (False, True)
        if not (has_bias and config.score == "softmax_of_top_k")
    ],
)
def test_choose_experts(name, has_bias):
    config = CASES[name]
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(50, config.num_experts)).astype(np.float32)
    # Large enough to change choices, and negative: experts outside the kept groups stay out.
    bias = rng.normal(size=config.num_experts).astype(np.float32) - 1.5 if has_bias else None
    got = choose_experts(jnp.asarray(logits), config, None if bias is None else jnp.asarray(bias))
    experts, weights = loop_choose(logits, config, bias)
    np.testing.assert_array_equal(got.expert_TK, experts)
    np.testing.assert_allclose(got.weight_TK, weights, rtol=1e-5)
    if has_bias and config.experts_per_token < config.num_experts:
        assert not np.array_equal(experts, loop_choose(logits, config)[0])


@pytest.mark.parametrize("name", CASES)
def test_ties_go_to_the_lower_index(name):
    config = CASES[name]
    logits = np.random.default_rng(1).integers(0, 2, (40, config.num_experts)).astype(np.float32)
    logits[0] = 0
    got = choose_experts(jnp.asarray(logits), config)
    np.testing.assert_array_equal(got.expert_TK, loop_choose(logits, config)[0])
    assert list(np.asarray(got.expert_TK)[0]) == list(range(config.experts_per_token))


def test_extreme_logits_stay_finite():
    logits = jnp.asarray([[1e4, -1e4, 0.0, 0.0], [-1e4, -1e4, -1e4, -1e4]], jnp.float32)
    for score in ("softmax", "sigmoid", "softmax_of_top_k"):
        routing = choose_experts(logits, RoutingConfig(4, 2, score, normalize=True))
        assert np.all(np.isfinite(routing.weight_TK))


def test_routing_stats_leave_padding_out():
    rng = np.random.default_rng(2)
    tokens, experts, per_token = 40, 8, 8
    logits = rng.normal(size=(tokens, experts)).astype(np.float32)
    is_valid = rng.random(tokens) < 0.7
    chosen = np.array([rng.permutation(experts)[:per_token] for _ in range(tokens)])
    chosen = chosen[:, :3]
    weights = rng.random((tokens, 3)).astype(np.float32)
    got = routing_stats(
        jnp.asarray(logits),
        Routing(jnp.asarray(chosen), jnp.asarray(weights)),
        jnp.asarray(is_valid),
    )
    count, weight, probability, log_z = np.zeros(experts), np.zeros(experts), np.zeros(experts), 0.0
    for t in np.flatnonzero(is_valid):
        for k in range(3):
            count[chosen[t, k]] += 1
            weight[chosen[t, k]] += weights[t, k]
        exponentials = np.exp(logits[t].astype(np.float64))
        probability += exponentials / exponentials.sum()
        log_z += np.log(exponentials.sum()) ** 2
    np.testing.assert_array_equal(got.count_E, count)
    np.testing.assert_allclose(got.weight_E, weight, rtol=1e-5)
    np.testing.assert_allclose(got.probability_E, probability, rtol=1e-5)
    np.testing.assert_allclose(got.log_z_squared, log_z, rtol=1e-5)


def test_routing_stats_count_all_eight_choices():
    """With 8 experts a token the counts are those of 8, and add up to 8 a token."""
    config = CASES["top_8"]
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(30, 64)), jnp.float32)
    routing = choose_experts(logits, config)
    assert all(len(set(row)) == 8 for row in np.asarray(routing.expert_TK).tolist())
    stats = routing_stats(logits, routing, jnp.ones(30, bool))
    experts, _ = loop_choose(logits, config)
    np.testing.assert_array_equal(stats.count_E, np.bincount(experts.ravel(), minlength=64))
    np.testing.assert_allclose(np.sum(stats.weight_E), 30, rtol=1e-5)


def test_no_valid_token():
    logits = jnp.ones((5, 4))
    stats = routing_stats(logits, choose_experts(logits, RoutingConfig(4, 2)), jnp.zeros(5, bool))
    assert stats.experts == 4
    assert not any(np.any(value) for value in stats._replace(experts=0))
