"""The shared part of placements that bring their own experts to a dense model.

An adapter's own expert may be inactive: without an active rank it is never chosen and has no part
in the softmax, as if it were not there.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from drlora_jax.adapters.expert_counts import experts_of_layers
from drlora_jax.adapters.lora import ExpertOptions, WithExperts
from drlora_jax.errors import UserError
from drlora_jax.models.architecture import FFN, Matrix, ModelConfig, RoutingConfig
from drlora_jax.models.placement import Coverage
from drlora_jax.models.routing import Routing, choose_experts
from drlora_jax.system.fields import option, positive, require


@dataclass(frozen=True)
class OwnExpertOptions(ExpertOptions):
    """The fields of placements with experts of their own."""

    num_experts: int = option(8, "experts per layer of mixlora, per matrix of mola")
    experts_per_layer: str | None = option(
        None,
        "of every layer, instead of num_experts: 2468 (by quarters of the depth), 2,4,4 (by layer) "
        "or FILE.json of drlora_jax.alpha",
        is_path=True,
    )
    experts_per_token: int = option(
        2, "experts per token; a layer with fewer experts uses all it has"
    )
    top_p: float | None = option(
        None, "instead of experts_per_token: the best experts up to this sum of probabilities"
    )

    def check(self, section) -> None:
        super().check(section)
        positive("adapter", {"num_experts": self.num_experts})
        chosen = self.experts_per_token
        require(
            0 < chosen and (chosen <= self.num_experts or self.experts_per_layer is not None),
            "adapter.experts_per_token must be from 1 to adapter.num_experts "
            f"({self.num_experts}), got {chosen}.",
        )
        require(
            self.top_p is None or 0 < self.top_p <= 1,
            f"adapter.top_p must be in (0, 1] or None, got {self.top_p}.",
        )


@dataclass(frozen=True)
class OwnExperts(WithExperts):
    """Experts that the adapter brings to a dense model, in every layer."""

    own_routing: RoutingConfig | None = None  # never None in a model
    experts_per_layer: tuple[int, ...] = ()  # that exist; (): the same number in all layers

    makes_experts: ClassVar[bool] = True

    @classmethod
    def check_model(cls, config: ModelConfig) -> None:
        if config.moe_layers:
            raise UserError(
                f"adapter.kind={cls.kind} makes experts on dense layers, and this {config.family} "
                "model has experts of its own; use adapter.kind=expert_lora."
            )

    @classmethod
    def from_section(cls, config, section, paths, *, rank, max_rank):
        counts = experts_of_layers(section, config.num_layers)
        experts = max(counts, default=section.num_experts)
        chosen = min(section.experts_per_token, experts)
        return cls(
            paths=paths,
            max_rank=max_rank,
            scale=section.scale,
            dropout=section.dropout,
            rank=rank,
            own_routing=RoutingConfig(experts, chosen, normalize=True, top_p=section.top_p),
            experts_per_layer=counts,
        )

    def expert_layers(self, config: ModelConfig) -> tuple[int, ...]:
        return tuple(range(config.num_layers))

    def routing(self, config: ModelConfig) -> RoutingConfig | None:
        return self.own_routing

    def counts(self, config: ModelConfig, path: str) -> list[int]:
        """Returns the experts that exist at a module path, for each repeat of its segment."""
        counts = self.experts_per_layer or (self.own_routing.num_experts,) * config.num_layers
        return [
            counts[layer.number] for layer in config.layers() if path.startswith(f"{layer.place}/")
        ]

    def cover(self, config: ModelConfig, matrix: Matrix, frozen: Coverage) -> list[Coverage]:
        if matrix.path not in self.paths or not self.is_expert(matrix.path):
            return super().cover(config, matrix, frozen)
        counts = self.counts(config, matrix.path)
        span = f"{min(counts)} to {max(counts)}" if len(set(counts)) > 1 else counts[0]
        trained = sum(counts) * self.max_rank * (matrix.in_features + matrix.out_features)
        status = f"{span} LoRA experts, rank up to {self.max_rank}"
        return [frozen._replace(trained=trained, status=status)]

    @classmethod
    def why_no_export(cls, run_dir: str) -> str | None:
        return (
            "peft and transformers have no form for LoRA experts with a router, and a merge would "
            f"lose the routing. {cls.instead_of_export(run_dir)}"
        )

    @classmethod
    def instead_of_export(cls, run_dir: str) -> str:
        """Returns which other program can have the adapter."""
        return "python -m drlora_jax.convert takes mixlora only"

    def router_row(self, config: ModelConfig, matrix: Matrix, path: str) -> Coverage:
        """The line of a router that reads what `matrix` reads."""
        trained = sum(self.counts(config, matrix.path)) * matrix.in_features
        return Coverage(path, matrix.count, 0, trained, "new, trained")


def check_alike(
    kind: str, config: ModelConfig, paths: frozenset[str], kinds: tuple[str, ...] = (FFN,)
) -> list[set[str]]:
    """Returns the adapted roles of each layer, among matrices of these kinds; raises UserError
    where layers differ.
    """
    per_layer: dict[str, set[str]] = {}
    for matrix in config.matrices():
        if matrix.kind in kinds:
            roles = per_layer.setdefault(matrix.path.rsplit("/", 2)[0], set())
            roles |= {matrix.role} if matrix.path in paths else set()
    found = list(per_layer.values())
    if any(roles != found[0] for roles in found):
        raise UserError(
            "adapter.targets must adapt the same projections in every layer for "
            f"adapter.kind={kind}, got {per_layer}."
        )
    return found


def active_experts(gate_ER: jax.Array) -> jax.Array:
    """Which of an adapter's own experts can be chosen, bool [E]: those with an active rank; where
    none has one, all of them, which then add nothing.
    """
    has_rank_E = gate_ER[:, 0] > 0
    return has_rank_E | ~jnp.any(has_rank_E)


def choose_active(
    logits_TE: jax.Array, is_active_E: jax.Array, config: RoutingConfig
) -> tuple[jax.Array, Routing]:
    """The logits, minus infinity for inactive experts, and the choice among the active ones.

    A layer with fewer active experts than a token may have uses all of them: min(K, active).
    """
    logits_TE = jnp.where(is_active_E[None], logits_TE, -jnp.inf)
    expert_TK, weight_TK = choose_experts(logits_TE, config)
    is_chosen_TK = jnp.append(is_active_E, False)[expert_TK]
    expert_TK = jnp.where(is_chosen_TK, expert_TK, is_active_E.size)
    return logits_TE, Routing(expert_TK, jnp.where(is_chosen_TK, weight_TK, 0.0))
