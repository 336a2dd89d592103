"""Chooses the implementation of the experts for a device.

The choice depends on the device that a program is compiled for, which need not belong to this
process: a step for a TPU or a GPU can be compiled ahead of time on a machine without one.
`lax.ragged_dot` is a grouped matrix product on TPU; on NVIDIA GPUs and CPUs it multiplies every row
with every expert.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from drlora_jax.ops.experts import mosaic, native, tokamax
from drlora_jax.system.text import first_line

Experts = Literal["auto", "native", "block", "ragged", "mosaic", "dense", "tokamax"]
PROBE_HIDDEN, THIN_HIDDEN = 256, 16  # widths like those of an expert, and of its LoRA matrices


class Call(NamedTuple):
    """Describes an expert call, as far as it decides which backends can compute it."""

    platform: str
    dtype: Any = jnp.float32  # dtype of activations
    widths: tuple[int, ...] = ()  # width of tokens, and of an expert's hidden vectors
    device: Any = None  # device that the program is compiled for


def choose_backend(call: Call) -> Experts:
    """Returns the backend that `auto` selects for frozen experts; never tokamax."""
    if call.platform == "cpu":
        return "block" if cannot("native", call) else "native"
    if call.platform == "tpu":
        return "ragged"
    return "dense" if cannot("mosaic", call) else "mosaic"


def cannot(backend: Experts, call: Call) -> str | None:
    """Returns why a backend cannot compute a call, or should not; None if it can."""
    if backend == "native":
        return native.cannot(call.platform, call.dtype)
    if backend == "block" and call.platform != "cpu":
        return f"it computes blocks of rows one by one, for CPUs, not for {call.platform}"
    if backend == "ragged" and call.platform != "tpu":
        dtype = jnp.dtype(call.dtype).name
        where = f"{dtype} on {call.platform}"
        return f"XLA has no grouped kernel for {where} and multiplies every row with every expert"
    if backend == "mosaic":
        return mosaic.cannot(call)
    return _cannot_use_tokamax(call) if backend == "tokamax" else None


def _cannot_use_tokamax(call: Call) -> str | None:
    """Decides by compiling a small case on a GPU, and by the generation of a TPU."""
    if call.platform not in ("tpu", "gpu"):
        return f"it has kernels for TPU and NVIDIA, not for {call.platform}"
    if not tokamax.is_installed():
        return "it is not installed; with Python 3.12 or newer: pip install 'drlora-jax[tokamax]'"
    kind = "" if call.device is None else call.device.device_kind
    if kind.startswith(("TPU v2", "TPU v3", "TPU v4")):
        return f"its kernels are for TPU v5 and later, not for {kind}"
    if call.platform == "tpu":
        return None
    try:
        for hidden in (PROBE_HIDDEN, THIN_HIDDEN):
            _compile_product(tokamax.product_for("gpu"), call.dtype, call.device, hidden)
    except Exception as error:  # of several types, depending on what the kernel lacks
        return f"a small case does not compile for {kind}: {first_line(error)[:200]}"
    return None


def _compile_product(product, dtype, device, hidden: int) -> None:
    """Compiles a small grouped product with its gradients."""
    experts, rows, width = 5, 384, 128
    sharding = None if device is None else jax.sharding.SingleDeviceSharding(device)

    def both(x_PD, w_EDF, sizes_E):
        out, pull = jax.vjp(lambda *args: product(*args, sizes_E), x_PD, w_EDF)
        return pull(out)

    shapes = (((rows, width), dtype), ((experts, width, hidden), dtype), ((experts,), "int32"))
    inputs = [
        jax.ShapeDtypeStruct(shape, jnp.dtype(kind), sharding=sharding) for shape, kind in shapes
    ]
    jax.jit(both).lower(*inputs).compile()
