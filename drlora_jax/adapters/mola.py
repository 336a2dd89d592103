"""MoLA (arXiv 2402.08562): routed LoRA experts on every adapted matrix of a dense model.

Each adapted projection has a router on its own input and E pairs of LoRA matrices,

    y = W x + sum_k w_k s B_{e_k} A_{e_k} x

with w the renormalised softmax of the best K, so that B = 0 is the base. With the matrices of all
experts side by side along the rank that is one LoRA of rank E * R whose z = A x is multiplied with
the weights: the cost of plain LoRA, whatever the routing. Layers with fewer experts than the one
with most have inactive ones beside them: see `own_experts.active_experts`.
"""

from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from drlora_jax.adapters.lora import ExpertPairs, drop_in_training, init_a
from drlora_jax.adapters.own_experts import (
    OwnExpertOptions,
    OwnExperts,
    active_experts,
    check_alike,
    choose_active,
)
from drlora_jax.models.architecture import ATTENTION, FFN, Matrix, ModelConfig
from drlora_jax.models.placement import Coverage, PlacementOptions
from drlora_jax.models.routing import Routing, routing_stats
from drlora_jax.ops.lora_deltas import from_ranks, open_ranks, ranks_of_all


@dataclass(frozen=True)
class MolaOptions(OwnExpertOptions):
    text = "LoRA experts on every adapted matrix of a dense model, each with a router"


@dataclass(frozen=True)
class Mola(OwnExperts):
    kind: ClassVar[str] = "mola"
    options: ClassVar[type[PlacementOptions]] = MolaOptions
    expert_modules: ClassVar[tuple[str, ...]] = ("attention", "mlp")

    @classmethod
    def check_paths(cls, config: ModelConfig, paths: frozenset[str]) -> None:
        check_alike(cls.kind, config, paths, (ATTENTION, FFN))

    def delta(self, module, x_BTD, product_BTF, kernel_DF, segment_ids_BT):
        # Router and LoRA matrices are beside the projection, in the module that it is part of.
        role, parent, routing = module.name, module.parent, self.own_routing
        width, features = kernel_DF.shape
        x_TD, is_valid_T = x_BTD.reshape(-1, width), segment_ids_BT.reshape(-1) > 0
        shape = (routing.num_experts, width, features, self.max_rank)
        pairs = ExpertPairs(*shape, name=f"{role}_lora", parent=parent)()
        router = Router(routing.num_experts, name=f"{role}_router", parent=parent)
        is_active_E = active_experts(pairs.gate_ER)
        logits_TE, chosen = choose_active(router(x_TD), is_active_E, routing)
        z_TER = ranks_of_all(drop_in_training(parent, x_TD, self.dropout), pairs)
        weight_TE = _dense_weights(chosen, routing.num_experts)
        z_TER = open_ranks(z_TER, weight_TE, pairs, self.scale)
        delta_BTF = from_ranks(z_TER, pairs).reshape(product_BTF.shape)
        return delta_BTF, [routing_stats(logits_TE, chosen, is_valid_T)]

    def cover(self, config: ModelConfig, matrix: Matrix, frozen: Coverage) -> list[Coverage]:
        rows = super().cover(config, matrix, frozen)
        if matrix.path in self.paths:
            rows.append(self.router_row(config, matrix, f"{matrix.path}_router"))
        return rows

    @property
    def side_ranks(self) -> int:
        return self.own_routing.num_experts * self.max_rank


class Router(nn.Module):
    """Logits f32 [T, E] of one matrix's experts."""

    num_experts: int

    @nn.compact
    def __call__(self, x_TD):
        shape_ED = (self.num_experts, x_TD.shape[-1])
        router_DE = self.variable(
            "lora", "router", lambda: init_a(self.make_rng("params"), shape_ED).T
        ).value
        return x_TD.astype(jnp.float32) @ router_DE


def _dense_weights(chosen: Routing, experts: int) -> jax.Array:
    """The weight of every expert for every token, f32 [T, E]; 0 where it was not chosen."""
    is_expert_TKE = jax.nn.one_hot(chosen.expert_TK, experts)
    return jnp.einsum("TK,TKE->TE", chosen.weight_TK, is_expert_TKE)
