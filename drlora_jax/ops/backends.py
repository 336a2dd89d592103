"""Which implementation of an operation a device runs.

The choice is by the platform that a program is compiled for, which need not be one of this
process: a TPU program can be compiled ahead of time on a CPU machine. `lax.ragged_dot` is a grouped
matrix product on TPU. On NVIDIA it is one behind a compiler option, for 16-bit results, on some
devices and versions, and everywhere else it multiplies every row with every expert; so on a GPU a
small case is compiled first and its text is read.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp

RAGGED_FUSION = "xla_gpu_experimental_use_ragged_dot_fusion"


def compiler_options(platform: str, dtype) -> dict[str, bool]:
    """What `jax.jit` of a step on `platform` gets, so that `expert_backend` may choose ragged."""
    if platform == "gpu" and _is_fused_on_gpu(jnp.dtype(dtype).name):
        return {RAGGED_FUSION: True}
    return {}


def expert_backend(platform: str, options: dict | None = None) -> str:
    """block | ragged | dense: how experts are computed in a program compiled with `options`."""
    if platform == "cpu":
        return "block"
    return "ragged" if platform == "tpu" or RAGGED_FUSION in (options or {}) else "dense"


def dense_expansions(text: str, *, experts: int, rows: int, widths: tuple[int, ...]) -> list[str]:
    """Arrays in a compiled module's text that hold every row once for every expert.

    Args:
      rows: of the grouped product, on one device. widths: of its operands.
    """
    sizes = {experts * rows * width for width in widths}
    found = {
        match[0]
        for match in re.finditer(r"\b[a-z]+\d+\[([\d,]+)\]", text)
        if math.prod(int(size) for size in match[1].split(",")) in sizes
    }
    return sorted(found)


def ragged_probe(dtype: str, options: dict, device=None) -> list[str]:
    """Dense expansions in a small grouped product with its gradients, compiled for `device`."""
    experts, rows, width, hidden = 5, 384, 128, 256
    sharding = None if device is None else jax.sharding.SingleDeviceSharding(device)

    def both(x_PD, w_EDF, sizes_E):
        out, pull = jax.vjp(
            lambda *args: jax.lax.ragged_dot(
                *args, sizes_E, preferred_element_type=jnp.dtype(dtype)
            ),
            x_PD,
            w_EDF,
        )
        return pull(out)

    shapes = (((rows, width), dtype), ((experts, width, hidden), dtype), ((experts,), "int32"))
    inputs = [
        jax.ShapeDtypeStruct(shape, jnp.dtype(kind), sharding=sharding) for shape, kind in shapes
    ]
    text = jax.jit(both, compiler_options=options).lower(*inputs).compile().as_text()
    return dense_expansions(text, experts=experts, rows=rows, widths=(width, hidden))


@functools.cache
def _is_fused_on_gpu(dtype: str) -> bool:
    if dtype not in ("bfloat16", "float16"):
        return False
    try:
        expansions = ragged_probe(dtype, {RAGGED_FUSION: True}, jax.devices("gpu")[0])
    except (RuntimeError, ValueError):  # no such option in this version, or no kernel for the chip
        return False
    return not expansions
