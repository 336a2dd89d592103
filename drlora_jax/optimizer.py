"""AdamW with gradient clipping and a schedule, out of optax."""

import jax
import optax

from drlora_jax.config import TrainSection


def make_schedule(section: TrainSection, total_steps: int, peak: float) -> optax.Schedule:
    """Linear warm-up over `warmup_ratio` of the steps, then linear, cosine or constant; 0 at the
    end of a decay.
    """
    warmup = int(section.warmup_ratio * total_steps)
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
    section: TrainSection, total_steps: int, *, router_learning_rate: float | None = None
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer of a run and its learning-rate schedule (optimizer steps done -> rate).

    Args:
      router_learning_rate: peak rate of `router_delta` leaves; None: like everything else.
    """
    schedule = make_schedule(section, total_steps, section.learning_rate)
    rate = optax.scale_by_learning_rate(schedule)
    if router_learning_rate is not None:
        router_rate = optax.scale_by_learning_rate(
            make_schedule(section, total_steps, router_learning_rate)
        )
        rate = optax.partition({"lora": rate, "router": router_rate}, label_leaves)
    parts = [
        optax.scale_by_adam(section.beta1, section.beta2, section.epsilon),
        optax.add_decayed_weights(section.weight_decay),
        rate,
    ]
    if section.max_grad_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(section.max_grad_norm))
    return optax.chain(*parts), schedule


def label_leaves(tree):
    """`router` for router deltas, `lora` for every other leaf."""
    return jax.tree.map_with_path(
        lambda path, _: "router" if path[-1].key == "router_delta" else "lora", tree
    )
