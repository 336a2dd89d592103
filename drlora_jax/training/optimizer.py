"""Builds AdamW with gradient clipping and a learning-rate schedule from optax, and defines an Adam
whose bias correction counts steps per rank.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from drlora_jax.config import TrainSection


def make_schedule(
    section: TrainSection, total_steps: int, peak: float, *, first_total: int | None = None
) -> optax.Schedule:
    """Returns a linear warm-up over `warmup_ratio` of the steps, then linear decay to 0, cosine
    decay to 0, or a constant rate.

    Args:
      first_total: Number of steps that the run was created with, if it has changed. The warm-up
        keeps its original length, so that an extended run does not warm up again.
    """
    warmup = int(section.warmup_ratio * (first_total or total_steps))
    decay = max(1, total_steps - warmup)
    after = {
        "linear": optax.linear_schedule(peak, 0.0, decay),
        "cosine": optax.cosine_decay_schedule(peak, decay),
        "constant": optax.constant_schedule(peak),
    }[section.schedule]
    if not warmup:
        return after
    # The first step of a warm-up already has the rate peak / warmup, not 0.
    rise = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([rise, after], [warmup])


def make_optimizer(
    section: TrainSection,
    total_steps: int,
    *,
    first_total: int | None = None,
    router_learning_rate: float | None = None,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Returns the optimizer of a run and its learning-rate schedule (optimizer steps done -> rate).

    Args:
      first_total: As in `make_schedule`.
      router_learning_rate: Peak rate of routers; None: the common rate.
    """
    make = functools.partial(make_schedule, section, total_steps, first_total=first_total)
    schedule = make(section.learning_rate)
    rate = optax.scale_by_learning_rate(schedule)
    ratio = section.b_learning_rate_ratio
    if router_learning_rate is not None or ratio != 1:
        peaks = {"lora": 1.0, "b": ratio, "router": 1.0}
        peaks = {label: share * section.learning_rate for label, share in peaks.items()}
        if router_learning_rate is not None:
            peaks["router"] = router_learning_rate
        rates = {label: make(peak) for label, peak in peaks.items()}
        rate = optax.partition(
            {label: optax.scale_by_learning_rate(each) for label, each in rates.items()},
            label_leaves,
        )
    adam = {"global": optax.scale_by_adam, "per_rank": scale_by_rank_adam}[section.bias_correction]
    parts = [
        adam(section.beta1, section.beta2, section.epsilon),
        optax.add_decayed_weights(section.weight_decay),
        rate,
    ]
    if section.max_grad_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(section.max_grad_norm))
    return optax.chain(*parts), schedule


class RankAdamState(NamedTuple):
    # i32, shaped like the parameters with a last axis of 1: gradients that each row has received.
    count: Any
    mu: Any
    nu: Any


def scale_by_rank_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Returns Adam whose bias correction counts, row by row, the steps in which the row had a
    gradient.

    Rows extend along the last axis and are the ranks of A and B. `optax.scale_by_adam` counts the
    steps of the whole run, so the first update of a rank that is activated late is
    (1 - b1) / sqrt(1 - b2) times as large as it should be (3.2 for the defaults). An inactive rank
    has a gradient of exactly zero. In the first step after an activation the gradient of A's row is
    zero as well, because B's row is still zero.
    """

    def init(params):
        return RankAdamState(
            jax.tree.map(lambda leaf: jnp.zeros((*leaf.shape[:-1], 1), jnp.int32), params),
            optax.tree.zeros_like(params),
            optax.tree.zeros_like(params),
        )

    def update(grads, state, params=None):
        del params
        count = jax.tree.map(
            lambda count, grad: count + jnp.any(grad != 0, axis=-1, keepdims=True),
            state.count,
            grads,
        )
        mu = jax.tree.map(lambda mu, grad: b1 * mu + (1 - b1) * grad, state.mu, grads)
        nu = jax.tree.map(lambda nu, grad: b2 * nu + (1 - b2) * grad**2, state.nu, grads)

        def leaf(mu, nu, count):
            steps = jnp.maximum(count, 1).astype(mu.dtype)
            return mu / (1 - b1**steps) / (jnp.sqrt(nu / (1 - b2**steps)) + eps)

        return jax.tree.map(leaf, mu, nu, count), RankAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def label_leaves(tree):
    """Labels leaves: `router` for routers and their deltas, `b` for B, `lora` for all others."""
    labels = {"router": "router", "router_delta": "router", "b": "b"}
    return jax.tree.map_with_path(lambda path, _: labels.get(path[-1].key, "lora"), tree)
