"""Measures attention on one device, for `gpu.py`: every backend of the platform, forward and
backward, in long rows of one document and of several, and whether documents see each other.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gpu_setting import Setting, attempt, rate_shares
from timing import median_seconds

from drlora_jax.ops.attention.api import Call, attend, cannot, choose_backend

BACKENDS = ("xla", "native", "chunked", "cudnn", "splash")
OWN_PLATFORM = {"cudnn": "gpu", "splash": "tpu"}  # elsewhere they are interpreted, or missing
LONGEST_SCORES = 4096  # tokens of a row whose scores are held as a whole
BACKWARD = 2.5  # products of the backward pass to those of the forward pass
CHANGED = 2  # the document that becomes another one


class Shape(NamedTuple):
    rows: int
    length: int
    documents: int  # of a row
    heads: int
    kv_heads: int
    width: int


SHAPES = {
    "olmoe": (Shape(4, 4096, 1, 16, 16, 128), Shape(4, 4096, 8, 16, 16, 128)),
    "olmoe, long": (Shape(1, 16384, 1, 16, 16, 128), Shape(1, 16384, 8, 16, 16, 128)),
    "qwen3": (Shape(4, 4096, 8, 32, 4, 128),),
}
TINY_SHAPES = {"tiny": (Shape(2, 256, 1, 4, 2, 16), Shape(2, 256, 3, 4, 2, 16))}


def attention(setting: Setting, case: str):
    """Yields a row per shape and backend."""
    platform = jax.default_backend()
    for name, shapes in (TINY_SHAPES if setting.tiny else SHAPES).items():
        for shape in shapes:
            call = Call(shape.length, shape.width, shape.width, jnp.dtype(setting.dtype))
            for backend in BACKENDS:
                is_elsewhere = OWN_PLATFORM.get(backend, platform) != platform
                if is_elsewhere or cannot(backend, platform, call):
                    continue
                row = {"shape": name} | shape._asdict() | {"backend": backend}
                row["is_default"] = choose_backend(platform, call) == backend
                if backend == "xla" and shape.length > LONGEST_SCORES:
                    yield row | {"skipped": f"it holds scores of {shape.length} x {shape.length}"}
                else:
                    yield attempt(row, functools.partial(_measure, setting, shape, backend))


def _measure(setting: Setting, shape: Shape, backend: str) -> dict:
    segments_BT, positions_BT = packed(shape)
    attended = functools.partial(
        attend,
        segment_ids_BT=jnp.asarray(segments_BT),
        positions_BT=jnp.asarray(positions_BT),
        scale=shape.width**-0.5,
    )
    forward = jax.jit(functools.partial(attended, backend=backend))

    @jax.jit
    def both(q_BTNH, k_BSGH, v_BSGH, dy_BTNH):
        out, pull = jax.vjp(functools.partial(attended, backend=backend), q_BTNH, k_BSGH, v_BSGH)
        return out, *pull(dy_BTNH)

    inputs, dy_BTNH = random_inputs(setting, shape, 0), random_inputs(setting, shape, 1)[0]
    # Scores and values of the keys that a query sees: 2 of 2 S^2 / 2 products a document.
    lengths = np.concatenate([np.bincount(row)[1:] for row in segments_BT]).astype(float)
    operations = 2 * shape.heads * shape.width * float(np.sum(lengths**2))
    alone = median_seconds(forward, *inputs, repeats=setting.repeats)
    together = median_seconds(both, *inputs, dy_BTNH, repeats=setting.repeats)
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(functools.partial(attended, backend="chunked"))
        expected = exact(*(array.astype(jnp.float32) for array in inputs))
    got = forward(*inputs).astype(jnp.float32)
    found = {
        "forward_ms": 1e3 * alone,
        "forward": rate_shares(setting, operations / alone),
        "both_ms": 1e3 * together,
        "both": rate_shares(setting, (1 + BACKWARD) * operations / together),
        "error_to_f32": float(jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected)),
    }
    if shape.documents > 1:
        others = random_inputs(setting, shape, 2)
        found |= leaks(both, inputs, others, dy_BTNH, segments_BT)
    return found


def leaks(both, inputs, others, dy_BTNH, segments_BT) -> dict:
    """Measures how the other documents change when one document of their row is replaced.

    Outputs may not change by a bit. Nor may gradients, unless the kernel adds them up in whatever
    order: then by no more than between two calls with equal inputs.
    """
    is_changed_BT11 = jnp.asarray(segments_BT == CHANGED)[:, :, None, None]
    mixed = [jnp.where(is_changed_BT11, b, a) for a, b in zip(inputs, others, strict=True)]
    before, again, after = (
        [np.asarray(array, np.float32) for array in both(*values, dy_BTNH)]
        for values in (inputs, inputs, mixed)
    )
    kept = segments_BT != CHANGED

    def largest(left, right, where):
        return max(float(np.abs(a - b)[where].max()) for a, b in zip(left, right, strict=True))

    outputs = largest(before[:1], after[:1], kept)
    gradients = largest(before[1:], after[1:], kept)
    noise = largest(before[1:], again[1:], kept)
    found = {
        "others_outputs_change": outputs,
        "others_gradients_change": gradients,
        "gradients_vary_between_calls": noise,
        "changed_document_changes": largest(before[:1], after[:1], ~kept),
    }
    if outputs > 0 or gradients > 2 * noise or not found["changed_document_changes"] > 0:
        found["error"] = "a document sees another"
    return found


def packed(shape: Shape):
    """Returns segment ids and positions [B, T] of rows whose documents begin and end anywhere."""
    draw, segments, positions = np.random.default_rng(0), [], []
    for _ in range(shape.rows):
        cuts = draw.choice(np.arange(1, shape.length), shape.documents - 1, replace=False)
        sizes = np.diff([0, *sorted(cuts), shape.length])
        segments.append(np.repeat(np.arange(1, shape.documents + 1), sizes))
        positions.append(np.concatenate([np.arange(size) for size in sizes]))
    return np.stack(segments).astype(np.int32), np.stack(positions).astype(np.int32)


def random_inputs(setting: Setting, shape: Shape, seed: int) -> list[jax.Array]:
    """Returns random queries, keys and values."""
    keys = jax.random.split(jax.random.key(seed), 3)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    sizes = [(shape.rows, shape.length, count, shape.width) for count in heads]
    return [
        jax.random.normal(key, size, setting.dtype) for key, size in zip(keys, sizes, strict=True)
    ]
