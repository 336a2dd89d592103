"""Placement `expert_lora`: every routed expert of a pretrained MoE has LoRA matrices of the maximum
rank, of which a prefix is active; other adapted matrices have plain LoRA.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from drlora_jax.adapters.lora import BesideOptions, ExpertPairs, WithExperts
from drlora_jax.errors import UserError
from drlora_jax.models.architecture import ATTENTION, EXPERTS, ROUTER, Matrix, ModelConfig
from drlora_jax.models.placement import Coverage, ExpertMatrices, PlacementOptions
from drlora_jax.ops.experts.shared import ROLES, RoleLora
from drlora_jax.system.fields import option, require


@dataclass(frozen=True)
class ExpertLoraOptions(BesideOptions):
    text = "LoRA matrices for every routed expert of an MoE, at a rank of its own"

    router: Literal["frozen", "after_warmup"] = option(
        "frozen", "whether the routers of the MoE train, from the end of warm-up"
    )

    def check(self, section) -> None:
        super().check(section)
        require(
            self.router_learning_rate is None or self.router == "after_warmup",
            "adapter.router_learning_rate is for routers that train: set "
            "adapter.router=after_warmup, or leave it out.",
        )


@dataclass(frozen=True)
class ExpertLora(WithExperts):
    train_router: bool = False

    kind: ClassVar[str] = "expert_lora"
    options: ClassVar[type[PlacementOptions]] = ExpertLoraOptions
    expert_modules: ClassVar[tuple[str, ...]] = ("moe",)

    @classmethod
    def accepts(cls, matrix: Matrix) -> bool:
        return matrix.kind in (ATTENTION, EXPERTS)

    @classmethod
    def check_paths(cls, config: ModelConfig, paths: frozenset[str]) -> None:
        per_layer = {}
        for matrix in config.matrices():
            if matrix.kind == ROUTER:
                layer = matrix.path.removesuffix("router")
                own = (path for path in paths if path.startswith(layer))
                per_layer[layer] = {path.removeprefix(layer) for path in own}
        roles = list(per_layer.values())
        if not any(roles):
            raise UserError(
                f"adapter.targets: adapter.kind={cls.kind} adapts no expert; add gate, up, down or "
                f"gate_up, or set adapter.kind=lora (model: {config.family}, "
                f"{len(config.moe_layers)} MoE layers)."
            )
        if any(found != roles[0] for found in roles):
            raise UserError(
                "adapter.targets must adapt the same expert projections in every MoE layer, got "
                f"{per_layer}."
            )
        if "gate_up" in roles[0] and roles[0] & {"gate", "up"}:
            raise UserError(
                "adapter.targets: gate_up next to gate or up on the experts; one or the other."
            )

    @classmethod
    def from_section(cls, config, section, paths, *, rank, max_rank):
        return cls(
            paths=paths,
            max_rank=max_rank,
            scale=section.scale,
            dropout=section.dropout,
            rank=rank,
            expert_scale=section.expert_scale,
            expert_dropout=section.expert_dropout,
            train_router=section.router == "after_warmup",
        )

    def expert_matrices(self, module, num_experts, shapes):
        roles = {
            role: self.pairs(role, num_experts, *shapes[role])
            for role in ROLES
            if role in self.paths
        }
        return ExpertMatrices(roles, self.of_experts)

    def pairs(self, role: str, num_experts: int, in_features: int, out_features: int) -> RoleLora:
        """Makes the LoRA matrices of one projection in the module that is running."""
        shape = (num_experts, in_features, out_features)
        return ExpertPairs(*shape, self.max_rank, name=f"{role}_lora")()

    def router_delta(self, module: nn.Module, shape: tuple[int, int]) -> jax.Array | None:
        if not self.train_router:
            return None
        return module.variable("lora", "router_delta", lambda: jnp.zeros(shape)).value

    def cover(self, config: ModelConfig, matrix: Matrix, frozen: Coverage) -> list[Coverage]:
        if matrix.kind == ROUTER and self.train_router:
            status = "trained after warm-up (adapter.router)"
            return [frozen._replace(trained=matrix.parameters, status=status)]
        if matrix.kind != EXPERTS:
            return super().cover(config, matrix, frozen)
        sizes, place = (matrix.in_features, matrix.out_features), matrix.path.rpartition("/")[0]
        if matrix.path in self.paths:
            status = f"LoRA, rank up to {self.max_rank}"
            trained = self.trained(config, matrix, *sizes)
            return [frozen._replace(trained=trained, status=status)]
        if matrix.role in ("gate", "up") and f"{place}/gate_up" in self.paths:
            # The fused pair is counted with gate; up shares it.
            both = self.trained(config, matrix, sizes[0], 2 * sizes[1])
            trained = both if matrix.role == "gate" else 0
            status = f"LoRA on gate_up, rank up to {self.max_rank}"
            return [frozen._replace(trained=trained, status=status)]
        return [frozen]

    def trained(
        self, config: ModelConfig, matrix: Matrix, in_features: int, out_features: int
    ) -> int:
        """Returns the allocated LoRA parameters of all experts at `matrix`, of these widths."""
        return matrix.count * self.max_rank * (in_features + out_features)

    @property
    def trains_routers(self) -> bool:
        return self.train_router
