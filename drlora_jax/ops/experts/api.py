"""Computes gated expert MLPs over ragged groups of tokens, with LoRA, rank gates and dropout.

One call computes, for every token t and each of its K experts e with combine weight p,

    gu = x [W_gate | W_up] + s * (gate_r * (drop(x) A_r^T)) B_r      for each input role r
    h  = p * act(gu_gate) * gu_up
    y  = h W_down + s * (gate_down * (drop(h) A_down^T)) B_down      summed over the K experts

The combine weight is folded into h, so the sum over experts is a plain sum and the weight's
gradient needs no stored expert output. The base weights are frozen unless `base_grad`. The
cotangent of a rank gate is sum_rows z * dz: with a gate of one it is DR-LoRA's per-rank importance
before the absolute value (sum_j A_kj dA_kj = sum_i B_ik dB_ik).

The backends compute the same function, each in a file of its own:

    native   CPU: sorted assignments, in compiled code for frozen float32 weights
    block    CPU: sorted assignments, each group processed in blocks of rows
    ragged   TPU: sorted assignments, `lax.ragged_dot`
    mosaic   NVIDIA Hopper: like ragged, with kernels that jax provides
    tokamax  like ragged, with the grouped products of that package, on request
    dense    every expert on every token, E / K times the work

Letters: T tokens, K experts per token, P = T * K (token, expert) assignments, E experts, D model, F
expert hidden, R ranks. A `slot` is the number of an assignment, t * K + k.
"""

import jax
import jax.numpy as jnp
from jax import lax

from drlora_jax.ops.experts import block, dense, mosaic, native, ragged, tokamax
from drlora_jax.ops.experts.shared import Dropout, ExpertSpec, RoleLora

READS_STACKS = ("native", "block")  # backends that read the stacked weights of all layers


def expert_mlp(
    x_TD: jax.Array,
    expert_TK: jax.Array,
    weight_TK: jax.Array,
    w_gate_up_EDF: jax.Array,
    w_down_EFD: jax.Array,
    lora: dict[str, RoleLora],
    spec: ExpertSpec,
    *,
    dropout: Dropout | None = None,
    backend: str = "auto",
    platform: str | None = None,
    keeps_hidden: bool = True,
    layer: jax.Array | None = None,
) -> jax.Array:
    """Sums the LoRA-adapted gated MLPs of each token's K experts.

    Args:
      x_TD: Tokens, f32 or bf16 [T, D].
      expert_TK: i32 [T, K]; an index outside [0, E) is not computed here (padding, or an expert of
        another device).
      weight_TK: Combine weights, f32 [T, K].
      w_gate_up_EDF: [E, D, 2F], gate columns first.
      w_down_EFD: [E, F, D].
      lora: Role -> LoRA matrices; roles `gate`, `up` (or `gate_up`) and `down`; may be empty. B is
        zero where a gate is zero.
      spec: Static options.
      dropout: Required when `spec.dropout` > 0 in training; None in evaluation.
      backend: native | block | ragged | mosaic | tokamax | dense | auto (on CPU native if it can
        compute the call, otherwise block; elsewhere dense).
      platform: Platform that the program is compiled for; None: this process's.
      keeps_hidden: Lets `models.remat` save pre-activations (by the names `moe_gu`, `moe_z`). True
        where most assignments are computed here, False on an expert shard, where most rows of these
        arrays belong to other devices.
      layer: i32 scalar; the weights are then stacks [L, E, ...] of frozen layers, and this one is
        used. `native` and `block` read them expert by expert and copy no layer.

    Returns:
      y_TD in the dtype of x_TD.
    """
    platform = platform or jax.default_backend()
    kinds = [array.dtype for array in (x_TD, w_gate_up_EDF, w_down_EFD)]
    backend = _choose_backend(backend, platform, kinds, spec)
    if not spec.base_grad:
        w_gate_up_EDF, w_down_EFD = lax.stop_gradient((w_gate_up_EDF, w_down_EFD))
    if dropout is None:
        spec, dropout = spec._replace(dropout=0.0), Dropout(jax.random.key(0))
    weights, layer = _stacked_or_not(backend, (w_gate_up_EDF, w_down_EFD), layer)
    weight_TK = weight_TK.astype(jnp.float32)
    spec = spec._replace(repeats=spec.repeats or not keeps_hidden)
    arguments = (spec, x_TD, expert_TK, weight_TK, weights, lora, dropout)
    if backend in READS_STACKS:
        module = native if backend == "native" else block
        return module.expert_mlp(*arguments, jnp.asarray(layer, jnp.int32))
    if backend == "dense":
        return dense.expert_mlp(*arguments)
    if backend == "mosaic":
        return mosaic.expert_mlp(*arguments, keeps_hidden)
    product = tokamax.product_for(platform) if backend == "tokamax" else ragged.ragged_dot
    return ragged.expert_mlp(*arguments, keeps_hidden, product)


def _stacked_or_not(backend: str, weights: tuple, layer):
    """Returns the weights as the backend reads them, and the index of the layer."""
    if backend in READS_STACKS and layer is None:
        return tuple(each[None] for each in weights), 0
    if backend not in READS_STACKS and layer is not None:
        return tuple(each[layer] for each in weights), layer
    return weights, layer


def _choose_backend(backend: str, platform: str, kinds: list, spec: ExpertSpec) -> str:
    """Resolves `auto`, and refuses `native` where it cannot compute the call.

    Args:
      kinds: Dtypes of the tokens and the base weights.
    """
    if backend != "native" and (backend != "auto" or platform != "cpu"):
        return "dense" if backend == "auto" else backend
    other = next((kind for kind in kinds if kind != jnp.float32), jnp.float32)
    reason = native.cannot(platform, other, spec.base_grad)
    if backend == "native" and reason:
        raise ValueError(f"expert backend native: {reason}.")
    return "block" if reason else "native"
