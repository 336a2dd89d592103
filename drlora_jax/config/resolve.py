"""What a config means for a model: settings that are to be worked out, the model with the experts
that an adapter brings, the adapter, the shapes of ranks, and the policy. Pure functions.
"""

import dataclasses
from collections.abc import Callable

from drlora_jax.adapters.lora import AdapterSpec
from drlora_jax.adapters.rank_trees import expert_roles
from drlora_jax.adapters.targets import resolve_targets
from drlora_jax.allocation import CapacityShapes, Context, Policy
from drlora_jax.allocation.by_expert_count import for_counts
from drlora_jax.allocation.spectra import Exponents
from drlora_jax.config import AdapterSection, TrainConfig
from drlora_jax.config.expert_counts import experts_of_layers
from drlora_jax.errors import UserError
from drlora_jax.models.architecture import DenseFfnConfig, ModelConfig, RoutingConfig
from drlora_jax.system.precision import resolve_dtype


def with_resolved_dtype(config: TrainConfig) -> TrainConfig:
    """So that config.json says what was computed in, and a resume elsewhere computes in the same
    or is refused.
    """
    dtype = resolve_dtype(config.model.dtype)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))


def with_resolved_rank(config: TrainConfig, model_config: ModelConfig) -> TrainConfig:
    """The config with the rank that `allocation.rank_rule` makes of r_target in its place.

    The undivided r_target stays the rank of plain LoRA, where that is not set: the rules make the
    experts of a token, or of a layer, together as large as one adapter of rank r. `model_config`
    has the experts that `with_adapter_experts` gives.
    """
    section, routing = config.allocation, model_config.routing
    if section.rank_rule == "fixed" or routing is None:  # without experts, targets say so
        return config
    counts = set(experts_of_layers(config.adapter, model_config.num_layers))
    if len(counts) > 1:
        raise UserError(
            f"allocation.rank_rule={section.rank_rule} divides by a number of experts, and with "
            "adapter.experts_per_layer layers have different ones; set allocation.r_target to the "
            "rank that you want, and rank_rule=fixed."
        )
    by, what = {
        "per_top_k": (routing.experts_per_token, "experts a token"),
        "per_expert": (routing.num_experts, "experts"),
    }[section.rank_rule]
    rank = section.r_target // by
    if not rank:
        raise UserError(
            f"allocation.rank_rule={section.rank_rule} makes rank {section.r_target} // {by} "
            f"{what} = 0; set allocation.r_target to {by} or more."
        )
    return dataclasses.replace(
        config,
        allocation=dataclasses.replace(section, r_target=rank, rank_rule="fixed"),
        adapter=dataclasses.replace(config.adapter, rank=config.adapter.rank or section.r_target),
    )


def with_resolved_experts(config: TrainConfig, num_layers: int) -> TrainConfig:
    """So that config.json says how many experts every layer has, whatever becomes of a file."""
    text = ",".join(map(str, experts_of_layers(config.adapter, num_layers))) or None
    return dataclasses.replace(
        config, adapter=dataclasses.replace(config.adapter, experts_per_layer=text)
    )


def with_adapter_experts(model_config: ModelConfig, section: AdapterSection) -> ModelConfig:
    """The model as its adapter makes it: MixLoRA puts routed experts on every dense FFN, MoLA on
    every matrix that it adapts.
    """
    if not section.makes_experts:
        return model_config
    counts = experts_of_layers(section, model_config.num_layers)
    experts = max(counts, default=section.num_experts)
    chosen = min(section.experts_per_token, experts)
    routing = RoutingConfig(experts, chosen, normalize=True, top_p=section.top_p)

    def layer(config):
        if not isinstance(config.ffn, DenseFfnConfig):
            return config
        if section.kind == "mola":
            return dataclasses.replace(config, linear_routing=routing)
        return dataclasses.replace(config, ffn=dataclasses.replace(config.ffn, routing=routing))

    segments = tuple(
        dataclasses.replace(segment, unit=tuple(map(layer, segment.unit)))
        for segment in model_config.segments
    )
    return dataclasses.replace(model_config, segments=segments)


def make_adapter(config: TrainConfig, model_config: ModelConfig) -> AdapterSpec:
    section: AdapterSection = config.adapter
    return AdapterSpec(
        paths=resolve_targets(model_config, section.kind, section.targets),
        scale=section.scale,
        dropout=section.dropout,
        expert_scale=section.expert_scale,
        expert_dropout=section.expert_dropout,
        rank=section.rank or config.allocation.r_target,
        dora=section.dora,
        factor_dropout=section.factor_dropout,
        max_rank=allocated_rank(config),
        train_router=section.router == "after_warmup" and bool(model_config.moe_layers),
        experts_module={"mixlora": "mlp", "mola": "*"}.get(section.kind, "moe"),
        experts_per_layer=experts_of_layers(section, model_config.num_layers),
    )


def allocated_rank(config: TrainConfig) -> int:
    """Returns the ranks that experts have memory for."""
    return config.allocation.own.allocated_rank(config.allocation, config.adapter)


def capacity_shapes(
    config: TrainConfig, model_config: ModelConfig, adapter: AdapterSpec
) -> CapacityShapes:
    """The axes of ranks, masks and statistics; a dense model has no layers of them."""
    routing = model_config.routing
    return CapacityShapes(
        layers=len(model_config.moe_layers),
        projections=len(expert_roles(adapter)),
        experts=routing.num_experts if routing else 0,
        max_rank=allocated_rank(config),
    )


def make_policy(
    config: TrainConfig,
    shapes: CapacityShapes,
    total_steps: int,
    exponents: Callable[[], Exponents] | None = None,
) -> Policy:
    """Returns the policy that a config names, for a model's shapes and the number of steps its
    schedule is made for; `exponents` is called if it asks for them.
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
