"""Resolves a config for a model: derived settings, the adapter, the shapes of ranks, the policy.

Pure functions.
"""

import dataclasses
from collections.abc import Callable

from drlora_jax.adapters.expert_counts import experts_of_layers
from drlora_jax.adapters.registry import PLACEMENTS
from drlora_jax.adapters.targets import resolve_targets
from drlora_jax.allocation import CapacityShapes, Context, Policy
from drlora_jax.allocation.by_expert_count import for_counts
from drlora_jax.allocation.spectra import Exponents
from drlora_jax.config import TrainConfig
from drlora_jax.errors import UserError
from drlora_jax.models.architecture import ModelConfig
from drlora_jax.models.placement import Placement
from drlora_jax.system.precision import resolve_dtype


def with_resolved_dtype(config: TrainConfig) -> TrainConfig:
    """Returns the config with its dtype settled, so that config.json records it and a resume on
    other hardware uses the same dtype or is refused.
    """
    dtype = resolve_dtype(config.model.dtype)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))


def with_resolved_rank(config: TrainConfig, model_config: ModelConfig) -> TrainConfig:
    """Returns the config with r_target replaced by the rank that `allocation.rank_rule` derives
    from it.

    The undivided r_target stays the rank of plain LoRA unless that is set: the rules make the
    experts of a token, or of a layer, together as large as one adapter of rank r_target.
    """
    section = config.allocation
    if section.rank_rule == "fixed":
        return config
    routing = make_adapter(config, model_config).routing(model_config)
    if routing is None:  # without experts, the check of targets reports it
        return config
    counts = set(experts_of_layers(config.adapter, model_config.num_layers))
    if len(counts) > 1:
        raise UserError(
            f"allocation.rank_rule={section.rank_rule} divides by the number of experts, but "
            "adapter.experts_per_layer gives layers different numbers; set "
            "allocation.rank_rule=fixed and allocation.r_target to the rank that you want."
        )
    by, what = {
        "per_top_k": (routing.experts_per_token, "experts per token"),
        "per_expert": (routing.num_experts, "experts"),
    }[section.rank_rule]
    rank = section.r_target // by
    if not rank:
        raise UserError(
            f"allocation.rank_rule={section.rank_rule} gives rank {section.r_target} // {by} "
            f"{what} = 0; set allocation.r_target to at least {by}."
        )
    return dataclasses.replace(
        config,
        allocation=dataclasses.replace(section, r_target=rank, rank_rule="fixed"),
        adapter=dataclasses.replace(config.adapter, rank=config.adapter.rank or section.r_target),
    )


def with_resolved_experts(config: TrainConfig, num_layers: int) -> TrainConfig:
    """Returns the config with the number of experts of every layer, so that config.json does not
    depend on a file.
    """
    text = ",".join(map(str, experts_of_layers(config.adapter, num_layers))) or None
    return dataclasses.replace(
        config, adapter=dataclasses.replace(config.adapter, experts_per_layer=text)
    )


def make_adapter(config: TrainConfig, model_config: ModelConfig) -> Placement:
    """Returns the adapter that a config attaches to a model."""
    section = config.adapter
    paths = resolve_targets(model_config, section.kind, section.targets)
    ranks = {"rank": section.rank or config.allocation.r_target, "max_rank": allocated_rank(config)}
    return PLACEMENTS[section.kind].from_section(model_config, section, paths, **ranks)


def allocated_rank(config: TrainConfig) -> int:
    """Returns the number of ranks that are allocated per expert."""
    return config.allocation.own.allocated_rank(config.allocation, config.adapter)


def capacity_shapes(model_config: ModelConfig, adapter: Placement) -> CapacityShapes:
    """Returns the axes of ranks, masks and statistics; a dense model has zero layers of them."""
    routing = adapter.routing(model_config)
    return CapacityShapes(
        layers=len(adapter.expert_layers(model_config)),
        projections=len(adapter.expert_roles()),
        experts=routing.num_experts if routing else 0,
        max_rank=adapter.max_rank,
    )


def make_policy(
    config: TrainConfig,
    shapes: CapacityShapes,
    total_steps: int,
    exponents: Callable[[], Exponents] | None = None,
) -> Policy:
    """Returns the policy that a config names, for a model's shapes and the total steps of its
    schedule; `exponents` is called if the policy needs them.
    """
    chosen, counts_L = config.allocation.own, experts_of_layers(config.adapter, shapes.layers)
    context = Context(
        shapes=shapes,
        r_target=config.allocation.r_target,
        total_steps=total_steps,
        warmup_ratio=config.train.warmup_ratio,
        seed=config.run.seed,
        counts_L=counts_L,
        has_new_experts=config.adapter.makes_experts,
        exponents=exponents,
    )
    if len(set(counts_L)) > 1 and chosen.wants_equal_layers:
        return for_counts(counts_L, shapes, lambda part: chosen.make(context._replace(shapes=part)))
    return chosen.make(context)
