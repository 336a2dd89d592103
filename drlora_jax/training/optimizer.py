"""AdamW with gradient clipping and a schedule, out of optax; and Adam that counts by rank."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from drlora_jax.config import TrainSection


def make_schedule(
    section: TrainSection, total_steps: int, peak: float, *, first_total: int | None = None
) -> optax.Schedule:
    """Linear warm-up over `warmup_ratio` of the steps, then linear, cosine or constant; 0 at the
    end of a decay.

    Args:
      first_total: the steps that the run was created with, if they are others now. Its warm-up
        stays as long as it was, so that a run that is prolonged does not go through one again.
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
    # The first step of a warm-up already moves: peak / warmup, not 0.
    rise = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([rise, after], [warmup])


def make_optimizer(
    section: TrainSection,
    total_steps: int,
    *,
    first_total: int | None = None,
    router_learning_rate: float | None = None,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer of a run and its learning-rate schedule (optimizer steps done -> rate).

    Args:
      first_total: as in `make_schedule`.
      router_learning_rate: peak rate of routers; None: like everything else.
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
    count: Any  # i32 like the factors with a last axis of 1: gradients seen by a row
    mu: Any
    nu: Any


def scale_by_rank_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam whose bias correction counts, row by row, the steps that brought the row a gradient.

    Rows are the last axis: the ranks of A and B. `optax.scale_by_adam` counts the steps of the
    whole run, so the first update of a rank that is activated late is (1 - b1) / sqrt(1 - b2) times
    as long as it should be (3.2 for the defaults). A rank that is not active has a gradient of
    exactly zero; so has B's row, and not A's, in the step after an activation.
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
    """`router` for routers and their deltas, `b` for B, `lora` for every other leaf."""
    labels = {"router": "router", "router_delta": "router", "b": "b"}
    return jax.tree.map_with_path(lambda path, _: labels.get(path[-1].key, "lora"), tree)
