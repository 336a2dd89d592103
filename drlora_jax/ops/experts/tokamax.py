"""Grouped products of the package `tokamax` in the place of `lax.ragged_dot`, for `grouped_ragged`.

The package is optional and imported when a program is traced that uses it. Its kernels (Pallas
Mosaic) are those of TPU v5 and later and of NVIDIA GPUs; what it does elsewhere is
`lax.ragged_dot`. Rows of no group are undefined, as with that, and `group_sizes` may sum up to
fewer rows. Its gradients are its own: one product each for rows and weights, of which the compiler
drops the one that nobody reads.
"""

import importlib.util

from drlora_jax.ops.experts.ragged import TILE_ROWS, ragged_dot

PACKAGE = "tokamax"
LEAST_WIDTH = 128  # of every dimension in its kernel for TPU


def is_installed() -> bool:
    return importlib.util.find_spec(PACKAGE) is not None


def compiling_elsewhere():
    """A context in which its kernels compile for devices that this process does not have."""
    import tokamax

    return tokamax.config.cross_compile(True)


def product_for(platform: str):
    """`grouped_ragged.ragged_dot` of programs compiled for `platform`."""

    def product(rows, weights_EIO, size_E, is_transposed=False):
        weights_EIO = weights_EIO.swapaxes(1, 2) if is_transposed else weights_EIO
        if not takes(platform, rows.shape, weights_EIO.shape):
            return ragged_dot(rows, weights_EIO, size_E)
        import tokamax

        return tokamax.ragged_dot(
            rows,
            weights_EIO,
            size_E,
            preferred_element_type=rows.dtype,
            # By default it would fall back to an expansion, or choose by this process's device.
            implementation="mosaic" if platform in ("tpu", "gpu") else "xla",
        )

    return product


def takes(platform: str, rows_shape: tuple[int, ...], weights_shape: tuple[int, ...]) -> bool:
    """On TPU it has neither thin products (factors of few ranks) nor odd numbers of rows; there
    `lax.ragged_dot` is a kernel, too.
    """
    is_wide = min(rows_shape + weights_shape[1:]) >= LEAST_WIDTH
    return platform != "tpu" or (is_wide and rows_shape[0] % TILE_ROWS == 0)
