"""Plain LoRA: gives every expert `r_target` active ranks from the first step to the last."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from drlora_jax.allocation.base import Context, Policy, PolicyFields, static_policy
from drlora_jax.system.fields import option


@dataclass(frozen=True)
class Uniform(PolicyFields):
    name = "uniform"
    text = "plain LoRA: gives every expert rank r_target from the first step to the last"
    needs_experts = False

    rank_rule: Literal["fixed", "per_top_k", "per_expert"] = option(
        "fixed", "use r_target as it is, or divide it by the experts per token or per layer"
    )

    def refuses(self, section, adapter) -> str | None:
        if self.rank_rule != "fixed" and adapter.kind == "lora":
            return (
                f"allocation.rank_rule={self.rank_rule} divides by a number of experts, which "
                "adapter.kind=lora does not have."
            )
        if self.rank_rule == "per_top_k" and adapter.top_p is not None:
            return (
                "allocation.rank_rule=per_top_k divides by the number of experts per token, which "
                f"differs between tokens with adapter.top_p={adapter.top_p}."
            )
        return None

    def allocated_rank(self, section, adapter) -> int:
        return section.r_target

    def make(self, context: Context) -> Policy:
        shapes, rank = context.shapes, context.r_target
        return static_policy(
            self.name,
            np.full((shapes.layers, shapes.experts), rank, np.int32),
            budget=shapes.experts * rank,
            describe=f"uniform: every expert has rank {rank}",
        )
