"""Packed causal attention: a NumPy loop, inputs, and cases."""

import jax.numpy as jnp
import numpy as np

from drlora_jax.ops.attention.api import attend

SCALE = 0.4


# Two documents and padding; one document; three documents that fill the row.
SEGMENTS = np.array(
    [[1, 1, 1, 1, 2, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1], [1, 2, 2, 2, 2, 3, 3, 3, 3]],
    np.int32,
)


def positions_of(segment_ids):
    """Positions restart in every document; padding has 0."""
    positions = np.zeros_like(segment_ids)
    for row, column in np.ndindex(*segment_ids.shape):
        if column and segment_ids[row, column] == segment_ids[row, column - 1] != 0:
            positions[row, column] = positions[row, column - 1] + 1
    return positions


POSITIONS = positions_of(SEGMENTS)


def loop_attention(q, k, v, *, window=None, soft_cap=None, sinks=None):
    """One query and one head at a time, float64; padding queries are left at zero."""
    q, k, v = (np.asarray(value, np.float64) for value in (q, k, v))
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    repeats = q.shape[2] // k.shape[2]
    for row, t, head in np.ndindex(*q.shape[:3]):
        if SEGMENTS[row, t] == 0:
            continue
        seen = [
            s
            for s in range(t + 1)
            if SEGMENTS[row, s] == SEGMENTS[row, t] and (window is None or t - s < window)
        ]
        scores = SCALE * np.array([q[row, t, head] @ k[row, s, head // repeats] for s in seen])
        if soft_cap is not None:
            scores = soft_cap * np.tanh(scores / soft_cap)
        weights = np.exp(scores)
        total = weights.sum() + (0 if sinks is None else np.exp(float(sinks[head])))
        values = np.array([v[row, s, head // repeats] for s in seen])
        out[row, t, head] = weights @ values / total
    return out


def make_inputs(kv_heads=2, value_width=5, heads=4, width=6, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((heads, width), (kv_heads, width), (kv_heads, value_width))
    return [
        jnp.asarray(rng.normal(size=(*SEGMENTS.shape, *shape)), jnp.float32) for shape in shapes
    ]


def run(q, k, v, sinks=None, **options):
    packed = {"segment_ids_BT": jnp.asarray(SEGMENTS), "positions_BT": jnp.asarray(POSITIONS)}
    sinks = None if sinks is None else jnp.asarray(sinks, jnp.float32)
    return attend(q, k, v, **packed, scale=SCALE, sinks_N=sinks, **options)


CASES = {
    "plain": {},
    "window": {"window": 3},
    "window_of_one": {"window": 1},
    "soft_cap": {"soft_cap": 0.7},
    "sinks": {"sinks": np.array([-1.0, 0.0, 2.0, 30.0])},
    "all": {"window": 2, "soft_cap": 1.3, "sinks": np.array([0.5, -40.0, 1.0, 0.0])},
}
