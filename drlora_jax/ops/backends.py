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
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from drlora_jax.ops import grouped_native, grouped_ragged, grouped_tokamax

Experts = Literal["auto", "native", "block", "ragged", "dense", "tokamax"]
PROBE_HIDDEN, THIN_HIDDEN = 256, 16  # as of an expert, and as of its factors
RAGGED_FUSION = "xla_gpu_experimental_use_ragged_dot_fusion"


def compiler_options(platform: str, dtype) -> dict[str, bool]:
    """What `jax.jit` of a step on `platform` gets, so that `expert_backend` may choose ragged."""
    if platform == "gpu" and _is_fused_on_gpu(jnp.dtype(dtype).name):
        return {RAGGED_FUSION: True}
    return {}


def expert_backend(
    platform: str, options: dict | None = None, wanted: Experts = "auto", dtype=jnp.float32
) -> Experts:
    """How experts with a frozen base are computed in a program compiled with `options`; `auto` is
    never tokamax.
    """
    if wanted != "auto":
        return wanted
    if platform == "cpu":
        return "native" if grouped_native.cannot(platform, dtype) is None else "block"
    return "ragged" if _has_kernel(platform, options) else "dense"


def cannot_compute_experts(
    backend: Experts, platform: str, options: dict | None, dtype, device=None
) -> str | None:
    """Why a backend can not do this, or should not, or None.

    On a GPU a small case is compiled to find out; on TPU the generation of `device` decides.
    """
    if backend == "native":
        return grouped_native.cannot(platform, dtype)
    if backend == "block" and platform != "cpu":
        return f"it walks blocks of rows one after another, which is for CPUs, not for {platform}"
    if backend == "ragged" and not _has_kernel(platform, options):
        dtype = jnp.dtype(dtype).name
        return f"for {dtype} on {platform} it is no kernel, but multiplies rows with every expert"
    return _cannot_use_tokamax(platform, dtype, device) if backend == "tokamax" else None


def _has_kernel(platform: str, options: dict | None) -> bool:
    return platform == "tpu" or RAGGED_FUSION in (options or {})


def _cannot_use_tokamax(platform: str, dtype, device) -> str | None:
    if platform not in ("tpu", "gpu"):
        return f"it has kernels for TPU and NVIDIA, not for {platform}"
    if not grouped_tokamax.is_installed():
        return "it is not installed; with Python 3.12 or newer: pip install 'drlora-jax[tokamax]'"
    kind = "" if device is None else device.device_kind
    if kind.startswith(("TPU v2", "TPU v3", "TPU v4")):
        return f"its kernels are for TPU v5 and later, not for {kind}"
    if platform == "tpu":
        return None
    product = grouped_tokamax.product_for(platform)
    try:
        for hidden in (PROBE_HIDDEN, THIN_HIDDEN):
            ragged_probe(jnp.dtype(dtype).name, {}, _own_gpu(), product, hidden)
    except Exception as error:  # of several kinds, by what its kernel misses
        lines = str(error).splitlines() or [type(error).__name__]
        return f"a small case does not compile for {kind}: {lines[0][:200]}"
    return None


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


def ragged_probe(
    dtype: str,
    options: dict,
    device=None,
    product: Callable = grouped_ragged.ragged_dot,
    hidden: int = PROBE_HIDDEN,
) -> list[str]:
    """Dense expansions in a small grouped product with its gradients, compiled for `device`."""
    experts, rows, width = 5, 384, 128
    sharding = None if device is None else jax.sharding.SingleDeviceSharding(device)

    def both(x_PD, w_EDF, sizes_E):
        out, pull = jax.vjp(lambda *args: product(*args, sizes_E), x_PD, w_EDF)
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
    options, device = {RAGGED_FUSION: True}, _own_gpu()
    try:
        return not any(
            ragged_probe(dtype, options, device, hidden=hidden)
            for hidden in (PROBE_HIDDEN, THIN_HIDDEN)
        )
    except (RuntimeError, ValueError):  # no such option in this version, or no kernel for the chip
        return False


def _own_gpu():
    """Of this process: it compiles for no device of another one."""
    return jax.local_devices(backend="gpu")[0]
