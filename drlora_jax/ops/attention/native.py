"""Calls packed causal attention in compiled code on CPU: `ops/native/attention.cc`, in float32.

Letters as in `ops.attention.api`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from drlora_jax.ops.native import library


class Options(NamedTuple):
    scale: float
    window: int | None = None
    soft_cap: float | None = None


def attend_native(
    q_BTNH, k_BSGH, v_BSGV, segment_ids_BT, positions_BT, sinks_N, options: Options
) -> jax.Array:
    """Computes attention, [B, T, N, V]; `sinks_N` is f32, -inf means no sink."""
    heads = (array.astype(jnp.float32) for array in (q_BTNH, k_BSGH, v_BSGV))
    packed = (array.astype(jnp.int32) for array in (segment_ids_BT, positions_BT))
    return _attend(options, *heads, *packed, sinks_N)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, *inputs):
    return _forward(options, *inputs)[0]


def _forward(options, q_BTNH, k_BSGH, v_BSGV, segment_ids_BT, positions_BT, sinks_N):
    """Returns the output, and the logsumexp of every query's scores, [B, N, T]."""
    batch, length, heads, _ = q_BTNH.shape
    results = ((batch, length, heads, v_BSGV.shape[3]), (batch, heads, length))
    rows = (q_BTNH, k_BSGH, v_BSGV, segment_ids_BT, positions_BT)
    return _call("AttentionForward", options, results, *rows, sinks_N)


def _attend_forward(options, *inputs):
    # Named, so that a rematerialisation policy can save them instead of recomputing them.
    out, lse = (checkpoint_name(x, "attn_lse") for x in _forward(options, *inputs))
    return out, (inputs, out, lse)


def _attend_backward(options, saved, d_out_BTNV):
    (*rows, sinks_N), out_BTNV, lse_BNT = saved
    results = [array.shape for array in rows[:3]]
    arguments = (*rows, out_BTNV, lse_BNT, d_out_BTNV)
    cotangents = _call("AttentionBackward", options, results, *arguments)
    # The gradient through the softmax's normalisation, common to all scores of a query and a sink.
    mean_BTN = jnp.sum(d_out_BTNV * out_BTNV, axis=-1)
    share_BNT = jnp.exp(sinks_N[None, :, None] - lse_BNT)
    d_sinks_N = -jnp.sum(share_BNT * mean_BTN.transpose(0, 2, 1), axis=(0, 2))
    return *cotangents, None, None, d_sinks_N


_attend.defvjp(_attend_forward, _attend_backward)


def _call(name: str, options: Options, results, *arguments):
    length = arguments[0].shape[1]
    window = length if options.window is None else min(options.window, length)
    out = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in results]
    return jax.ffi.ffi_call(library.kernels().targets[name], out, vmap_method="sequential")(
        *arguments,
        scale=np.float32(options.scale),
        cap=np.float32(options.soft_cap or 0),
        window=np.int64(window),
    )
