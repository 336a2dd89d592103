"""Computes every expert on every token, E / K times the work: the reference of the tests, and the
fallback where no other backend is available.
"""

import jax
import jax.numpy as jnp
from jax import lax

from drlora_jax.ops.experts.shared import ACTIVATIONS, drop, matmul


def expert_mlp(spec, x_TD, expert_TK, weight_TK, weights, lora, dropout):
    """Computes the same as `ops.experts.api.expert_mlp`."""
    num_experts, num_slots = weights[0].shape[0], expert_TK.shape[1]
    tokens_T = jnp.arange(x_TD.shape[0]) * num_slots

    @jax.checkpoint
    def one_expert(y_TD, inputs):
        expert, weights_e, lora_e = inputs
        chosen_TK = expert_TK == expert
        p_T = jnp.sum(weight_TK * chosen_TK, axis=1)
        slots_T = dropout.slots(tokens_T + jnp.argmax(chosen_TK, axis=1), num_slots)
        return y_TD + _expert_rows(spec, slots_T, dropout, x_TD, p_T, weights_e, lora_e), None

    experts = (jnp.arange(num_experts), weights, lora)
    return lax.scan(one_expert, jnp.zeros_like(x_TD), experts)[0]


def _low_rank(x_TD, slots_T, role, matrices, spec, dropout):
    """Returns s * (gate * (drop(x) A^T)) B for one expert."""
    a_RD, b_RF, gate_R = matrices
    z_TR = matmul(drop(x_TD, slots_T, role, spec, dropout), a_RD.astype(x_TD.dtype).T)
    z_TR = (z_TR * (spec.scale * gate_R)[None]).astype(x_TD.dtype)
    return matmul(z_TR, b_RF.astype(x_TD.dtype))


def _expert_rows(spec, slots_T, dropout, x_TD, p_T, weights, lora):
    """Computes one expert on all rows; `p_T` = 0 makes a row's output exactly zero."""
    w_gate_up_DF, w_down_FD = weights
    gate_TF, up_TF = jnp.split(matmul(x_TD, w_gate_up_DF), 2, axis=-1)
    for role, matrices in lora.items():
        if role == "down":
            continue
        delta = _low_rank(x_TD, slots_T, role, matrices, spec, dropout)
        if role == "gate_up":
            delta_gate, delta_up = jnp.split(delta, 2, axis=-1)
            gate_TF, up_TF = gate_TF + delta_gate, up_TF + delta_up
        elif role == "gate":
            gate_TF = gate_TF + delta
        else:
            up_TF = up_TF + delta
    h_TF = (ACTIVATIONS[spec.activation](gate_TF) * up_TF * p_T[:, None]).astype(x_TD.dtype)
    y_TD = matmul(h_TF, w_down_FD)
    if "down" in lora:
        y_TD = y_TD + _low_rank(h_TF, slots_T, "down", lora["down"], spec, dropout)
    return y_TD
