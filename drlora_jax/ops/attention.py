"""Causal attention over packed rows.

A query sees keys of its own document (`segment_ids`) at or before its position, inside the window
if there is one. Positions restart in every document, so comparing them is the causal mask. Padding
has segment 0 and sees padding only. Letters: B batch, T query, S key, N query heads, G key-value
heads, H head width, V value width.
"""

import jax
import jax.numpy as jnp


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
) -> jax.Array:
    """Softmax attention, f32 inside, in the dtype of the queries outside.

    Args:
      window: keys a query sees, itself included; None sees all.
      soft_cap: scores become cap * tanh(scores / cap) before the mask.
      sinks_N: one extra logit per head that takes probability and has no value.

    Returns:
      [B, T, N, V].
    """
    options = {"scale": scale, "window": window, "soft_cap": soft_cap, "sinks_N": sinks_N}

    def attend_row(inputs):
        return _attend_row(*inputs, **options)

    rows = (q_BTNH, k_BSGH, v_BSGV, segment_ids_BT, positions_BT)
    if jax.default_backend() == "cpu":
        # Row by row the scores stay in cache, and the backward pass recomputes them: 1.8 times
        # faster than batched.
        return jax.lax.map(jax.checkpoint(attend_row), rows)
    return jax.vmap(attend_row)(rows)


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
    """Attention of one new token a row over a cache whose slot s holds position s, [B, N, V].

    Slots behind the row's position are not seen, whatever they hold. Options as in `attend`.
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
    """Probabilities over the last axis in f32; capped, masked, and with a sink's share taken out.

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
    """Attention within one row, [T, N, V]."""
    repeats = q_TNH.shape[1] // k_SGH.shape[1]
    # Heads repeated and in front: XLA's CPU products over (group, member) pairs take twice as long.
    k_NSH, v_NSV = (jnp.repeat(x.transpose(1, 0, 2), repeats, axis=0) for x in (k_SGH, v_SGV))
    scores = (
        jnp.einsum(
            "NTH,NSH->NTS", q_TNH.transpose(1, 0, 2), k_NSH, preferred_element_type=jnp.float32
        )
        * scale
    )
    age_TS = positions_T[:, None] - positions_T[None, :]
    is_seen_TS = (segment_ids_T[:, None] == segment_ids_T[None, :]) & (age_TS >= 0)
    if window is not None:
        is_seen_TS &= age_TS < window
    sinks = None if sinks_N is None else sinks_N[:, None, None]
    weights_NTS = _softmax(scores, is_seen_TS[None], soft_cap, sinks)
    return jnp.einsum("NTS,NSV->TNV", weights_NTS.astype(v_NSV.dtype), v_NSV)
