"""Allocation policies by their config name."""

import functools

from drlora_jax.adapters.expert_counts import experts_of_layers
from drlora_jax.allocation.adalora import adalora
from drlora_jax.allocation.alphalora import (
    alphalora_experts,
    alphalora_ranks,
    spectral_prior,
    spectral_start,
)
from drlora_jax.allocation.base import (
    CapacityShapes,
    CapacityState,
    Event,
    Policy,
    StepStats,
    masks_from_ranks,
)
from drlora_jax.allocation.by_expert_count import for_counts
from drlora_jax.allocation.dr_lora import dr_lora
from drlora_jax.allocation.moe_sieve import moe_sieve
from drlora_jax.allocation.pattern import pattern
from drlora_jax.allocation.prilora import prilora
from drlora_jax.allocation.spectra import Exponents
from drlora_jax.allocation.uniform import uniform
from drlora_jax.config import TrainConfig

__all__ = [
    "CapacityShapes",
    "CapacityState",
    "Event",
    "Policy",
    "StepStats",
    "make_policy",
    "masks_from_ranks",
]


def make_policy(
    config: TrainConfig,
    shapes: CapacityShapes,
    total_steps: int,
    exponents: Exponents | None = None,
) -> Policy:
    """The policy that a config names, for a model's shapes and the number of steps its schedule is
    made for; `exponents` where it needs them.
    """
    counts_L = experts_of_layers(config.adapter, shapes.layers)
    section = config.allocation
    if section.kind == "pattern":
        return pattern(shapes, path=section.pattern, r_target=section.r_target, counts_L=counts_L)
    make = functools.partial(
        _for_layers_alike, config, total_steps=total_steps, exponents=exponents
    )
    return for_counts(counts_L, shapes, make) if len(set(counts_L)) > 1 else make(shapes)


def _for_layers_alike(
    config: TrainConfig, shapes: CapacityShapes, *, total_steps: int, exponents: Exponents | None
) -> Policy:
    section = config.allocation
    if section.kind == "alphalora" and config.adapter.makes_experts:
        return alphalora_experts(
            shapes,
            exponents.layer_L,
            total=section.experts,
            rank=section.r_target,
            beta=section.alpha_beta,
        )
    if section.kind == "alphalora":
        return alphalora_ranks(
            shapes, exponents.expert_LE, r_target=section.r_target, beta=section.alpha_beta
        )
    if section.kind == "uniform":
        return uniform(shapes, rank=section.r_target)
    if section.kind == "prilora":
        return prilora(
            shapes, r_init=section.r_init, r_target=section.r_target, r_max=section.r_max
        )
    if section.kind == "moe_sieve":
        return moe_sieve(
            shapes,
            r_target=section.r_target,
            share=section.share,
            profile_rows=section.profile_rows,
        )
    warmup_ratio = (
        config.train.warmup_ratio if section.warmup_ratio is None else section.warmup_ratio
    )
    if section.kind == "adalora":
        return adalora(
            shapes,
            total_steps=total_steps,
            r_init=section.r_init,
            r_target=section.r_target,
            interval=section.interval,
            importance_decay=section.importance_decay,
            uncertainty_decay=section.uncertainty_decay,
            warmup_ratio=warmup_ratio,
            last_event=section.last_event,
            importance=section.importance,
        )
    return dr_lora(
        shapes,
        total_steps=total_steps,
        r_init=section.r_init,
        r_target=section.r_target,
        interval=section.interval,
        p_grow=section.p_grow,
        gamma=section.gamma,
        frequency_decay=section.frequency_decay,
        importance_decay=section.importance_decay,
        warmup_ratio=warmup_ratio,
        last_event=section.last_event,
        frequency=section.frequency,
        importance=section.importance,
        score="random" if section.kind == "random" else section.saliency,
        released=section.released,
        seed=config.run.seed,
        prior_LE=spectral_prior(exponents.expert_LE, section.spectral_prior)
        if section.spectral_prior
        else None,
        first_LE=spectral_start(
            exponents.expert_LE, section.r_init, beta=section.alpha_beta, most=shapes.max_rank
        )
        if section.spectral_start
        else None,
    )
