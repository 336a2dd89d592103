"""Placement `shared_expert_lora`: the experts of a layer share the LoRA matrices on the side of the
residual stream.

For gate and up (or gate_up) A reads the residual stream and is shared, B is each expert's own; for
down B writes to the residual stream and is shared, A is each expert's own:

    gate, up:  W_e' = W_e + s A^T diag(c_e) B_e        down:  W_e' = W_e + s A_e^T diag(c_e) B

with the gates c_e of the expert's active ranks. An expert then has parameters on its hidden side
alone, so that at equal parameters the rank is about (D + F) / F times that of `expert_lora`
(`Placement.notes` prints it).

The matrix that an expert has for itself starts at zero, the shared one at random: Kaiming-uniform
over its width, as A always does. So a rank that becomes active changes nothing, although the shared
matrix has been trained by other experts by then. A shared row is held while no expert of the layer
has its rank active. Every export repeats the shared matrix for each expert.
"""

from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from drlora_jax.adapters.expert_lora import ExpertLora, ExpertLoraOptions
from drlora_jax.adapters.lora import init_a, rank_gate
from drlora_jax.models.architecture import EXPERTS, INTO_RESIDUAL, Matrix, ModelConfig
from drlora_jax.models.placement import Coverage, PlacementOptions
from drlora_jax.ops.experts.shared import RoleLora
from drlora_jax.system.fields import require


@dataclass(frozen=True)
class SharedExpertLoraOptions(ExpertLoraOptions):
    text = "as expert_lora, with A of gate and up and B of down shared by the experts of a layer"

    def check(self, section) -> None:
        super().check(section)
        require(
            not self.freeze_a,
            "adapter.freeze_a=True trains B only, and with adapter.kind=shared_expert_lora an "
            "expert's own matrix of down is A, which starts at zero: it would stay zero. Leave it "
            "out.",
        )


@dataclass(frozen=True)
class SharedExpertLora(ExpertLora):
    kind: ClassVar[str] = "shared_expert_lora"
    options: ClassVar[type[PlacementOptions]] = SharedExpertLoraOptions
    shares_matrices: ClassVar[bool] = True

    def gated_side(self, role: str) -> str:
        return "a" if role in INTO_RESIDUAL else "b"

    def pairs(self, role: str, num_experts: int, in_features: int, out_features: int) -> RoleLora:
        shape = (num_experts, in_features, out_features, self.max_rank)
        return SharedPairs(*shape, shares_a=self.gated_side(role) == "b", name=f"{role}_lora")()

    def trained(
        self, config: ModelConfig, matrix: Matrix, in_features: int, out_features: int
    ) -> int:
        experts = config.moe.routing.num_experts
        own, shared = out_features, in_features
        if self.gated_side(matrix.role) == "a":
            own, shared = shared, own
        return self.max_rank * matrix.count * own + self.max_rank * matrix.count // experts * shared

    def notes(self, config: ModelConfig) -> list[str]:
        """Returns the rank at which `expert_lora` has as many parameters for the experts."""
        separate = ExpertLora(self.paths, max_rank=1)
        ours, theirs = (_expert_parameters(each, config) for each in (self, separate))
        return [
            f"shared      {ours:,} parameters for the experts at rank {self.max_rank}; expert_lora "
            f"has as many at rank {ours / theirs:.2f}"
        ]


def _expert_parameters(adapter: ExpertLora, config: ModelConfig) -> int:
    experts = (matrix for matrix in config.matrices() if matrix.kind == EXPERTS)
    frozen = Coverage("", 0, 0, 0, "")
    rows = (row for matrix in experts for row in adapter.cover(config, matrix, frozen))
    return sum(row.trained for row in rows)


class SharedPairs(nn.Module):
    """LoRA matrices and gate of one projection for all experts, one of the two matrices shared."""

    num_experts: int
    in_features: int
    out_features: int
    max_rank: int
    shares_a: bool  # else B

    @nn.compact
    def __call__(self) -> RoleLora:
        a_ERD = self._matrix("a", self.in_features, is_shared=self.shares_a)
        b_ERF = self._matrix("b", self.out_features, is_shared=not self.shares_a)
        return RoleLora(a_ERD, b_ERF, rank_gate(self, (self.num_experts, self.max_rank)))

    def _matrix(self, name: str, width: int, *, is_shared: bool) -> jax.Array:
        """The matrix for every expert, f32 [E, R, width]; a shared one is kept as [1, R, width]."""
        shape = (1 if is_shared else self.num_experts, self.max_rank, width)

        def start():
            return init_a(self.make_rng("params"), shape) if is_shared else jnp.zeros(shape)

        rows = self.variable("lora", name, start).value
        return jnp.broadcast_to(rows, (self.num_experts, *shape[1:]))
