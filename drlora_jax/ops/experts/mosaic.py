"""Computes grouped products with jax's own Pallas kernels for NVIDIA Hopper, for `ragged.py`.

`lax.ragged_dot` multiplies every row with every expert on NVIDIA. jax provides two kernels that do
not: rows of each group times its expert's matrix, plain or transposed, and the product of two
arrays of rows over each group, which is the gradient of the weights. Both read operands in their
present layout, so no product copies weights or rows.

They require 16-bit floats, widths of whole tiles and whole blocks of rows. LoRA matrices are padded
with zeros to whole tiles of ranks; rows are padded where they do not fill a tile. Rows of no group
are undefined in a result. In the gradient of the weights, rows of other groups are multiplied by
zero, so they have to be finite: `ragged.py` masks every result, and thereby every cotangent.
"""

import functools
import inspect
import re
import types

import jax
import jax.numpy as jnp

from drlora_jax.ops.experts import ragged

CAPABILITY = "9.0"  # compute capability of Hopper
OLDEST_JAX = (0, 11, 2)  # the oldest version whose kernels were tested
KINDS = ("bfloat16", "float16")
TILE = 64  # the narrowest tile of a result, whose rows have the width of the chip's copy unit
WIDE_TILE = 128
STEPS = 4  # tiles prefetched from memory
STRIP = 16  # consecutive tiles along a row of results, so that rows stay in the cache
CORES = 132


def cannot(call) -> str | None:
    """Returns why these kernels cannot compute a `backends.Call`, or None."""
    if call.platform != "gpu":
        return f"its kernels are for NVIDIA's Hopper, not for {call.platform}"
    if jax_version() < OLDEST_JAX:
        oldest = ".".join(map(str, OLDEST_JAX))
        return f"it needs jax {oldest} or newer, which needs Python 3.12, got {jax.__version__}"
    capability = getattr(call.device, "compute_capability", "unknown")
    if capability != CAPABILITY:
        kind = getattr(call.device, "device_kind", "this device")
        return f"its kernels are for NVIDIA's Hopper (9.0), not for {kind} ({capability})"
    kind = jnp.dtype(call.dtype).name
    if kind not in KINDS:
        return f"its kernels multiply 16-bit floats, not {kind}"
    odd = [width for width in call.widths if width % TILE]
    if odd or not call.widths:
        return f"it needs widths of a multiple of {TILE}, got {', '.join(map(str, odd))}"
    return _lacks_kernels()


@functools.cache
def _lacks_kernels() -> str | None:
    """Returns how the kernels of this jax differ, or None: they are examples without any promise of
    stability.
    """
    try:
        for kernel in (_row_kernel(), _group_kernel()):
            missing = {*_tiles(TILE, TILE), "group_sizes"} - {*inspect.signature(kernel).parameters}
            if missing:
                return f"jax {jax.__version__} has a different {kernel.__name__}"
    except (ImportError, AttributeError) as error:
        return f"jax {jax.__version__} does not provide its kernels ({error})"
    return None


def jax_version() -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", jax.__version__)[:3])


def expert_mlp(spec, x_TD, expert_TK, weight_TK, weights, lora, dropout, keeps_hidden: bool):
    """Computes the same as `ops.experts.api.expert_mlp`."""
    lora = {role: _with_whole_tiles(matrices) for role, matrices in lora.items()}
    inputs = (x_TD, expert_TK, weight_TK, weights, lora, dropout)
    return ragged.expert_mlp(spec, *inputs, keeps_hidden, product)


def _with_whole_tiles(matrices):
    """Pads LoRA matrices with inactive ranks to a whole number of tiles."""
    missing = -matrices.gate_ER.shape[1] % TILE

    def fill_up(array):
        return jnp.pad(array, ((0, 0), (0, missing), *[(0, 0)] * (array.ndim - 2)))

    return jax.tree.map(fill_up, matrices) if missing else matrices


def product(rows, weights_EIO, size_E, is_transposed: bool = False):
    """Computes the same as `ragged.ragged_dot`."""
    missing = -rows.shape[0] % TILE
    if missing:
        rows = jnp.pad(rows, ((0, missing), (0, 0)))
    out = _product(rows, weights_EIO.astype(rows.dtype), size_E, is_transposed)
    return out[:-missing] if missing else out


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(rows, weights, size_E, is_transposed):
    return _multiply(rows, weights, size_E, is_transposed)


def _product_forward(rows, weights, size_E, is_transposed):
    """Saves only what the requested gradients need: frozen weights have none."""
    out = _multiply(rows.value, weights.value, size_E.value, is_transposed)
    kept = (rows.value if weights.perturbed else None, weights.value if rows.perturbed else None)
    return out, (*kept, size_E.value)


def _product_backward(is_transposed, saved, cotangent):
    rows, weights, size_E = saved
    d_rows = d_weights = None
    if weights is not None:
        d_rows = _multiply(cotangent, weights, size_E, not is_transposed)
    if rows is not None:
        sides = (cotangent, rows) if is_transposed else (rows, cotangent)
        d_weights = _multiply_over_groups(*sides, size_E)
    return d_rows, d_weights, None


_product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)


# Jitted, so that products of equal shapes are one function of a program.
@functools.partial(jax.jit, static_argnums=3)
def _multiply(rows, weights, size_E, is_transposed):
    """Multiplies [P, I] and [E, I, O], or [E, O, I] if transposed, to [P, O]."""
    width_out = weights.shape[1 if is_transposed else 2]
    return _row_kernel()(
        rows,
        weights,
        group_sizes=size_E,
        transpose_rhs=is_transposed,
        **_tiles(rows.shape[0], width_out),
    )


@jax.jit
def _multiply_over_groups(left, right, size_E):
    """Multiplies [P, M] and [P, N] to [E, M, N]."""
    tiles = _tiles(left.shape[1], right.shape[1])
    return _on_hopper(_group_kernel())(left, right, group_sizes=size_E, **tiles)


def _row_kernel():
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu

    return ragged_dot_mgpu.ragged_dot


def _group_kernel():
    from jax.experimental.pallas.ops.gpu import transposed_ragged_dot_mgpu

    return transposed_ragged_dot_mgpu.transposed_ragged_dot


def _tiles(height: int, width: int) -> dict[str, int]:
    """Returns the tiling for a result of this height and width."""
    return {
        "block_m": WIDE_TILE if height % WIDE_TILE == 0 else TILE,
        "block_n": WIDE_TILE if width % WIDE_TILE == 0 else TILE,
        "block_k": TILE,
        "max_concurrent_steps": STEPS,
        "grid_block_n": STRIP,
    }


def _on_hopper(function):
    """Returns jax's function with a patched module `jax`. The original asks the first device of
    this process for its number of cores, but programs may be compiled for devices that this process
    does not have.
    """
    own = types.SimpleNamespace(
        **vars(jax) | {"devices": lambda: [types.SimpleNamespace(core_count=CORES)]}
    )
    names = function.__globals__ | {"jax": own}
    copy = types.FunctionType(function.__code__, names, None, function.__defaults__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
