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
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    age_TS = positions_T[:, None] - positions_T[None, :]
    is_seen_TS = (segment_ids_T[:, None] == segment_ids_T[None, :]) & (age_TS >= 0)
    if window is not None:
        is_seen_TS &= age_TS < window
    scores = scores + jnp.where(is_seen_TS, 0.0, -jnp.inf)[None]
    if sinks_N is None:
        weights_NTS = jax.nn.softmax(scores, axis=-1)
    else:
        sinks = sinks_N.astype(jnp.float32)[:, None, None]
        top = jnp.maximum(jnp.max(scores, axis=-1, keepdims=True), sinks)
        weights_NTS = jnp.exp(scores - top)
        weights_NTS = weights_NTS / (
            jnp.sum(weights_NTS, axis=-1, keepdims=True) + jnp.exp(sinks - top)
        )
    return jnp.einsum("NTS,NSV->TNV", weights_NTS.astype(v_NSV.dtype), v_NSV)
