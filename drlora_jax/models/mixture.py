"""MixLoRA: E LoRA experts on the shared, frozen FFN of a dense model, with a router of their own.

Expert e of a token x computes the whole FFN with its own factors,

    h_e = act(W1 x + s B1_e A1_e x) * (W3 x + s B3_e A3_e x)
    y_e = W2 h_e + s B2_e A2_e h_e            y = sum_k w_k y_{e_k}

with w the renormalised softmax of the best K, so that an adapter with B = 0 is its base. W1 and W3
are shared and linear in x: once per token. W2 is shared and linear in h: once per token, after the
hidden vectors are combined. The factors of all experts lie side by side along the rank, so a slot
is a mask on z = A x: no sorting, no gather, whatever the routing.

Dropout draws one mask for a projection's input, shared by the experts (one for every slot on the
down projection, whose input differs by slot). Letters as in `models.layers`.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from drlora_jax.adapters.expert_lora import ExpertLora
from drlora_jax.adapters.lora import NO_ADAPTER, AdapterSpec, drop_inputs
from drlora_jax.models.architecture import DenseFfnConfig
from drlora_jax.models.layers import Projection
from drlora_jax.models.moe import RoutingStats, choose_experts, routing_stats
from drlora_jax.models.remat import keep
from drlora_jax.ops.grouped_parts import ACTIVATIONS, RoleLora

ROLES = ("gate", "up", "down")
ROUTER_INIT = 0.02  # standard deviation


def ranks_of_all(x_TD: jax.Array, factors: RoleLora) -> jax.Array:
    """z = x A^T of every expert, [T, E, R] in the dtype of x."""
    return jnp.einsum("TD,ERD->TER", x_TD, factors.a_ERD.astype(x_TD.dtype))


def from_ranks(z_TER: jax.Array, factors: RoleLora) -> jax.Array:
    """sum over experts and ranks of z B, [T, F] in the dtype of z."""
    return jnp.einsum("TER,ERF->TF", z_TER, factors.b_ERF.astype(z_TER.dtype))


class MixtureFfn(nn.Module):
    config: DenseFfnConfig
    location: str
    dtype: jnp.dtype
    adapter: AdapterSpec

    @nn.compact
    def __call__(self, x_BTD, segment_ids_BT) -> tuple[jax.Array, RoutingStats]:
        width, hidden, routing = x_BTD.shape[-1], self.config.hidden_dim, self.config.routing
        x_TD, is_valid_T = x_BTD.reshape(-1, width), segment_ids_BT.reshape(-1) > 0
        router_DE = self.variable("lora", "router", self._init_router, width).value
        logits_TE = x_TD.astype(jnp.float32) @ router_DE
        chosen = choose_experts(logits_TE, routing)
        stats = routing_stats(logits_TE, chosen, is_valid_T)

        shapes = {role: (width, hidden) for role in ("gate", "up")} | {"down": (hidden, width)}
        lora = {
            role: ExpertLora(
                routing.num_experts, *shapes[role], self.adapter, name=f"{role}_lora"
            )()
            for role in ROLES
            if f"{self.location}/{role}" in self.adapter.paths
        }

        def base(role, features, rows_TX):
            place = f"{self.location}/{role}"
            return Projection(features, place, self.dtype, NO_ADAPTER, name=role)(rows_TX)

        inputs = {
            role: (
                keep(base(role, hidden, x_TD), "mlp_gu"),
                ranks_of_all(self._drop(x_TD), lora[role]) if role in lora else None,
            )
            for role in ("gate", "up")
        }
        h_TF = jnp.zeros((x_TD.shape[0], hidden), jnp.float32)
        z_TER = 0.0
        for slot in range(chosen.expert_TK.shape[1]):
            is_expert_TE = jax.nn.one_hot(chosen.expert_TK[:, slot], routing.num_experts)
            weight_T = chosen.weight_TK[:, slot]
            gate_TF, up_TF = (
                rows_TF
                if z is None
                else rows_TF + from_ranks(self._open(z, is_expert_TE, lora[role]), lora[role])
                for role, (rows_TF, z) in inputs.items()
            )
            slot_TF = ACTIVATIONS[self.config.activation](gate_TF) * up_TF
            h_TF = h_TF + weight_T[:, None] * slot_TF
            if "down" in lora:
                z = ranks_of_all(self._drop(slot_TF), lora["down"])
                z_TER = z_TER + weight_T[:, None, None] * self._open(z, is_expert_TE, lora["down"])
        y_TD = base("down", width, h_TF.astype(x_TD.dtype))
        if "down" in lora:
            y_TD = y_TD + from_ranks(z_TER.astype(x_TD.dtype), lora["down"])
        return y_TD.reshape(x_BTD.shape), stats

    def _open(self, z_TER, is_expert_TE, factors: RoleLora):
        """s * z where the slot's expert has an open rank, else 0, in the dtype of z."""
        open_TER = is_expert_TE[:, :, None] * (self.adapter.scale * factors.gate_ER)[None]
        return (z_TER * open_TER).astype(z_TER.dtype)

    def _drop(self, rows_TX):
        rate = self.adapter.dropout
        if rate == 0 or not self.has_rng("dropout"):
            return rows_TX
        return drop_inputs(rows_TX, rate, self.make_rng("dropout"))

    def _init_router(self, width: int):
        shape = (width, self.config.routing.num_experts)
        return ROUTER_INIT * jax.random.normal(self.make_rng("params"), shape)
