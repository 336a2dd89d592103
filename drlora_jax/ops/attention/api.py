"""Computes causal attention over packed rows.

A query attends to keys of its own document (`segment_ids`) at or before its position, inside the
window if there is one. Positions restart in every document, so comparing them is the causal mask.
Padding has segment 0 and attends only to padding.

The backends compute the same function:
  xla      scores of a whole row, [N, T, S]: on CPU row by row, elsewhere batched
  native   compiled code for float32 on CPU (`native.py`)
  chunked  blocks with an online softmax (`chunked.py`), for long rows
  splash   jax's kernel for TPU (`splash.py`)
  cudnn    NVIDIA's kernel through jax, with the documents as a mask [B, T, S]

Letters: B batch, T query, S key, N query heads, G key-value heads, H head width, V value width.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from drlora_jax.ops.attention import chunked, native, splash
from drlora_jax.ops.native import library

Backend = Literal["auto", "xla", "native", "chunked", "cudnn", "splash"]
# Longer rows are computed in blocks: on CPU because that is faster, elsewhere because the scores of
# 4 rows of 2,048 tokens and 16 heads would need 5 GiB in a backward pass.
LONG_ROW = {"cpu": chunked.BLOCK}
LONG_ROW_ELSEWHERE = 512


class Call(NamedTuple):
    """Describes an attention call, as far as it decides which backends can compute it."""

    length: int
    head_width: int
    value_width: int
    dtype: jnp.dtype
    soft_cap: float | None = None
    has_sinks: bool = False


def cannot(backend: str, platform: str, call: Call) -> str | None:
    """Returns why a backend cannot compute a call in programs compiled for `platform`, or None."""
    if backend == "native":
        return library.cannot(platform, call.dtype)
    if backend in ("cudnn", "splash") and call.has_sinks:
        return "it does not support attention sinks"
    if backend == "splash" and call.length % splash.LANES:
        return f"it needs rows of a multiple of {splash.LANES} tokens, got {call.length}"
    if backend != "cudnn":
        return None
    if call.soft_cap is not None:
        return "it does not support a soft cap"
    if call.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in 16-bit floats, not in {jnp.dtype(call.dtype).name}"
    if call.head_width != call.value_width or call.head_width > 128 or call.head_width % 8:
        return f"it needs heads of at most 128, a multiple of 8, got {call.head_width}"
    if call.length % 2:
        return f"its gradient needs rows of an even number of tokens, got {call.length}"
    return None


def choose_backend(platform: str, call: Call) -> str:
    """Returns the backend that `auto` selects in programs compiled for `platform`."""
    own = {"cpu": "native", "tpu": "splash", "gpu": "cudnn"}.get(platform)
    if own and cannot(own, platform, call) is None:
        return own
    is_long = call.length > LONG_ROW.get(platform, LONG_ROW_ELSEWHERE)
    return "chunked" if is_long else "xla"


def _resolve(backend: Backend, platform: str, call: Call) -> str:
    """Resolves `auto`, and refuses a backend that cannot compute the call."""
    if backend == "auto":
        return choose_backend(platform, call)
    if reason := cannot(backend, platform, call):
        raise ValueError(f"attention backend {backend}: {reason}.")
    return backend


def attend(
    q_BTNH: jax.Array,
    k_BSGH: jax.Array,
    v_BSGV: jax.Array,
    *,
    segment_ids_BT: jax.Array,
    positions_BT: jax.Array,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks_N: jax.Array | None = None,
    backend: Backend = "auto",
    platform: str | None = None,
) -> jax.Array:
    """Computes softmax attention, internally in f32, and returns it in the dtype of the queries.

    Args:
      window: Number of keys that a query attends to, itself included; None: all.
      soft_cap: Scores become cap * tanh(scores / cap) before the mask.
      sinks_N: One extra logit per head, which receives probability and has no value.
      platform: Platform that the program is compiled for; None: this process's.

    Returns:
      [B, T, N, V].
    """
    platform = platform or jax.default_backend()
    sizes = (q_BTNH.shape[1], q_BTNH.shape[3], v_BSGV.shape[3])
    call = Call(*sizes, q_BTNH.dtype, soft_cap, sinks_N is not None)
    backend = _resolve(backend, platform, call)
    rows = (q_BTNH, k_BSGH, v_BSGV, segment_ids_BT, positions_BT)
    options = {"scale": scale, "window": window, "soft_cap": soft_cap}
    if backend == "splash":
        return splash.attend_splash(*rows[:4], **options, interpret=platform != "tpu")
    if backend == "cudnn":
        return _attend_cudnn(*rows, scale, window)  # saved by `models.remat` with its statistics
    if backend == "chunked":
        return _attend_chunked(rows, sinks_N, platform, chunked.Options(**options))
    if backend == "native":
        sinks_N = _sinks_or_none(rows, sinks_N)
        return native.attend_native(*rows, sinks_N, native.Options(**options))
    return _attend_xla(rows, sinks_N, platform, options)


def _attend_xla(rows, sinks_N, platform: str, options: dict):
    def attend_row(inputs):
        return _attend_row(*inputs, **options, sinks_N=sinks_N)

    if platform == "cpu":
        # Row by row, the scores stay in the cache and the backward pass recomputes them: 1.8 times
        # as fast as batched.
        return checkpoint_name(jax.lax.map(jax.checkpoint(attend_row), rows), "attn_out")
    return checkpoint_name(jax.vmap(attend_row)(rows), "attn_out")


def _attend_chunked(rows, sinks_N, platform: str, options: chunked.Options):
    sinks_N = _sinks_or_none(rows, sinks_N)

    def attend_row(inputs):
        return chunked.attend_row(*inputs, sinks_N, options)

    return jax.lax.map(attend_row, rows) if platform == "cpu" else jax.vmap(attend_row)(rows)


def _sinks_or_none(rows, sinks_N) -> jax.Array:
    """Returns the sinks of all heads, f32; -inf where there is none."""
    if sinks_N is None:
        return jnp.full(rows[0].shape[2], -jnp.inf, jnp.float32)
    return sinks_N.astype(jnp.float32)


def _attend_cudnn(
    q_BTNH, k_BSGH, v_BSGV, segment_ids_BT, positions_BT, scale, window, implementation="cudnn"
):
    seen_BTS = jax.vmap(lambda ids_T, at_T: _is_seen(ids_T, at_T, window))(
        segment_ids_BT, positions_BT
    )
    # The flag lets the kernel skip the upper half; the mask covers the rest.
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BSGH,
        v_BSGV,
        mask=seen_BTS[:, None],
        scale=scale,
        is_causal=True,
        implementation=implementation,
    )


def _is_seen(segment_ids_T, positions_T, window: int | None):
    """Returns which keys each query of a row attends to, bool [T, S]."""
    age_TS = positions_T[:, None] - positions_T[None, :]
    is_seen_TS = (segment_ids_T[:, None] == segment_ids_T[None, :]) & (age_TS >= 0)
    return is_seen_TS if window is None else is_seen_TS & (age_TS < window)


def attend_cached(
    q_BNH: jax.Array,
    k_BGSH: jax.Array,
    v_BGSV: jax.Array,
    positions_B: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks_N: jax.Array | None = None,
) -> jax.Array:
    """Computes attention of one new token per row over a cache whose slot s holds position s.

    Slots beyond the row's position are masked, whatever they hold. Options as in `attend`.

    Returns:
      [B, N, V].
    """
    batch, heads, _ = q_BNH.shape
    kv_heads, slots = k_BGSH.shape[1:3]
    q_BGMH = q_BNH.reshape(batch, kv_heads, heads // kv_heads, -1)
    scores = scale * jnp.einsum(
        "BGMH,BGSH->BGMS", q_BGMH, k_BGSH, preferred_element_type=jnp.float32
    )
    age_BS = positions_B[:, None] - jnp.arange(slots)[None]
    is_seen_BS = age_BS >= 0
    if window is not None:
        is_seen_BS &= age_BS < window
    sinks_GM = None if sinks_N is None else sinks_N.reshape(1, kv_heads, -1, 1)
    weights = _softmax(scores, is_seen_BS[:, None, None], soft_cap, sinks_GM)
    out = jnp.einsum("BGMS,BGSV->BGMV", weights.astype(v_BGSV.dtype), v_BGSV)
    return out.reshape(batch, heads, -1)


def _softmax(scores, is_seen, soft_cap: float | None, sinks) -> jax.Array:
    """Returns probabilities over the last axis in f32, after cap and mask, less a sink's share.

    `is_seen` and `sinks` broadcast against the scores.
    """
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    scores = scores + jnp.where(is_seen, 0.0, -jnp.inf)
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    sinks = sinks.astype(jnp.float32)
    top = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sinks)
    weights = jnp.exp(scores - top)
    return weights / (jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(sinks - top))


def _attend_row(
    q_TNH, k_SGH, v_SGV, segment_ids_T, positions_T, *, scale, window, soft_cap, sinks_N
):
    """Computes attention within one row, [T, N, V]."""
    repeats = q_TNH.shape[1] // k_SGH.shape[1]
    # Heads are repeated and lead: XLA's CPU products over (group, member) pairs take twice as long.
    k_NSH, v_NSV = (jnp.repeat(x.transpose(1, 0, 2), repeats, axis=0) for x in (k_SGH, v_SGV))
    scores = (
        jnp.einsum(
            "NTH,NSH->NTS", q_TNH.transpose(1, 0, 2), k_NSH, preferred_element_type=jnp.float32
        )
        * scale
    )
    is_seen_TS = _is_seen(segment_ids_T, positions_T, window)
    sinks = None if sinks_N is None else sinks_N[:, None, None]
    weights_NTS = _softmax(scores, is_seen_TS[None], soft_cap, sinks)
    return jnp.einsum("NTS,NSV->TNV", weights_NTS.astype(v_NSV.dtype), v_NSV)
