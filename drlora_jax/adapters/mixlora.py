"""MixLoRA: E LoRA experts on the shared, frozen FFN of a dense model, with a router of their own.

Expert e of a token x computes the whole FFN with its own LoRA matrices,

    h_e = act(W1 x + s B1_e A1_e x) * (W3 x + s B3_e A3_e x)
    y_e = W2 h_e + s B2_e A2_e h_e            y = sum_k w_k y_{e_k}

with w the renormalised softmax of the best K, so that an adapter with B = 0 is its base. W1 and W3
are shared and linear in x: once per token. W2 is shared and linear in h: once per token, after the
hidden vectors are combined. What the experts add is in `ops.lora_deltas`.

Dropout draws one mask for a projection's input, shared by the experts (for the down projection,
whose input differs by expert, one for each of a token's experts). Letters as in `models.layers`.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from drlora_jax.adapters.lora import BesideOptions, ExpertPairs, drop_in_training
from drlora_jax.adapters.own_experts import (
    OwnExpertOptions,
    OwnExperts,
    active_experts,
    check_alike,
    choose_active,
)
from drlora_jax.errors import UserError
from drlora_jax.models.architecture import FFN, FFN_ROLES, DenseFfnConfig, Matrix, ModelConfig
from drlora_jax.models.layers import Projection
from drlora_jax.models.options import DecoderOptions, keep
from drlora_jax.models.placement import NO_ADAPTER, Coverage, PlacementOptions
from drlora_jax.models.routing import RoutingStats, routing_stats
from drlora_jax.ops.experts.shared import ACTIVATIONS

ROUTER_INIT = 0.02  # standard deviation


@dataclass(frozen=True)
class MixLoraOptions(OwnExpertOptions, BesideOptions):
    text = "LoRA experts on the FFNs of a dense model, with a router per layer"


@dataclass(frozen=True)
class MixLora(OwnExperts):
    """The placement; other adapted matrices (attention) have plain LoRA."""

    kind: ClassVar[str] = "mixlora"
    options: ClassVar[type[PlacementOptions]] = MixLoraOptions
    expert_modules: ClassVar[tuple[str, ...]] = ("mlp",)

    @classmethod
    def from_section(cls, config, section, paths, *, rank, max_rank):
        adapter = super().from_section(config, section, paths, rank=rank, max_rank=max_rank)
        own = {"expert_scale": section.expert_scale, "expert_dropout": section.expert_dropout}
        return replace(adapter, **own)

    @classmethod
    def check_paths(cls, config: ModelConfig, paths: frozenset[str]) -> None:
        if not any(check_alike(cls.kind, config, paths)):
            raise UserError(
                "adapter.targets: adapter.kind=mixlora adapts no FFN; add gate, up or down, or set "
                "adapter.kind=lora."
            )

    def ffn(self, config: DenseFfnConfig, options: DecoderOptions) -> nn.Module:
        return MixtureFfn(config, options, name="mlp")

    def cover(self, config: ModelConfig, matrix: Matrix, frozen: Coverage) -> list[Coverage]:
        rows = super().cover(config, matrix, frozen)
        if (matrix.kind, matrix.role) == (FFN, "gate"):
            path = matrix.path.replace("/gate", "/router")
            rows.append(self.router_row(config, matrix, path))
        return rows

    @property
    def ffn_passes(self) -> int:
        return self.own_routing.experts_per_token

    @classmethod
    def instead_of_export(cls, run_dir: str) -> str:
        return f"For MoE-PEFT: python -m drlora_jax.convert export --run {run_dir} --out DIR"


class MixtureFfn(nn.Module):
    config: DenseFfnConfig
    options: DecoderOptions  # whose adapter is a `MixLora`

    @nn.compact
    def __call__(self, x_BTD, segment_ids_BT) -> tuple[jax.Array, list[RoutingStats]]:
        """The output [B, T, D], and the statistics of the router."""
        adapter = self.options.adapter
        width, hidden, routing = x_BTD.shape[-1], self.config.hidden_dim, adapter.own_routing
        x_TD, is_valid_T = x_BTD.reshape(-1, width), segment_ids_BT.reshape(-1) > 0
        router_DE = self.variable("lora", "router", self._init_router, width).value
        shapes = {role: (width, hidden) for role in ("gate", "up")} | {"down": (hidden, width)}
        lora = {
            role: ExpertPairs(
                routing.num_experts, *shapes[role], adapter.max_rank, name=f"{role}_lora"
            )()
            for role in FFN_ROLES
            if role in adapter.paths
        }
        any_lora = next(iter(lora.values()))
        is_active_E = active_experts(any_lora.gate_ER)  # all projections have the same ranks
        logits_TE = x_TD.astype(jnp.float32) @ router_DE
        logits_TE, chosen = choose_active(logits_TE, is_active_E, routing)
        stats = routing_stats(logits_TE, chosen, is_valid_T)
        deltas = self.options.ops.expert_deltas(
            chosen.expert_TK, any_lora, adapter.of_experts.scale
        )

        def base(role, features, rows_TX):
            projection = Projection(features, replace(self.options, adapter=NO_ADAPTER), name=role)
            return projection(rows_TX, segment_ids_BT)[0]

        hidden_TF = {role: keep(base(role, hidden, x_TD), "mlp_gu") for role in ("gate", "up")}
        choices = chosen.expert_TK.shape[1]
        added = {
            role: deltas.of_tokens(self._drop(x_TD), lora[role])
            if role in lora
            else [0.0] * choices
            for role in hidden_TF
        }
        rows, h_TF = [], jnp.zeros((x_TD.shape[0], hidden), jnp.float32)
        for choice in range(choices):
            gate_TF, up_TF = (hidden_TF[role] + added[role][choice] for role in hidden_TF)
            h_e_TF = ACTIVATIONS[self.config.activation](gate_TF) * up_TF
            h_TF = h_TF + chosen.weight_TK[:, choice, None] * h_e_TF
            rows.append(h_e_TF)
        y_TD = base("down", width, h_TF.astype(x_TD.dtype))
        if "down" in lora:
            rows = [self._drop(h_e_TF) for h_e_TF in rows]
            y_TD = y_TD + deltas.of_slots(rows, chosen.weight_TK, lora["down"])
        return y_TD.reshape(x_BTD.shape), [stats]

    def _drop(self, rows_TX):
        return drop_in_training(self, rows_TX, self.options.adapter.of_experts.dropout)

    def _init_router(self, width: int):
        shape = (width, self.options.adapter.own_routing.num_experts)
        return ROUTER_INIT * jax.random.normal(self.make_rng("params"), shape)
