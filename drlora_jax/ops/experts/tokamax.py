"""Computes grouped products with the package `tokamax` instead of `lax.ragged_dot`.

The package is optional and is imported when a program that uses it is traced. Its kernels (Pallas
Mosaic) are for TPU v5 and later and for NVIDIA GPUs; elsewhere it calls `lax.ragged_dot`. As with
the latter, rows of no group are undefined, and `group_sizes` may sum to fewer rows. It defines its
own gradients: one product each for rows and weights, of which the compiler drops unused ones.
"""

import importlib.util

from drlora_jax.ops.experts.ragged import TILE_ROWS, ragged_dot

PACKAGE = "tokamax"
LEAST_WIDTH = 128  # the smallest dimension that its kernel for TPU supports


def is_installed() -> bool:
    return importlib.util.find_spec(PACKAGE) is not None


def compiling_elsewhere():
    """Returns a context in which its kernels compile for devices that this process lacks."""
    import tokamax

    return tokamax.config.cross_compile(True)


def product_for(platform: str):
    """Returns a replacement of `ragged.ragged_dot` for programs compiled for `platform`."""

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
            # The default may fall back to a dense expansion, or choose by this process's device.
            implementation="mosaic" if platform in ("tpu", "gpu") else "xla",
        )

    return product


def takes(platform: str, rows_shape: tuple[int, ...], weights_shape: tuple[int, ...]) -> bool:
    """Returns whether its kernels support a product. On TPU they support neither thin products
    (LoRA matrices of few ranks) nor odd numbers of rows; there `lax.ragged_dot` is a kernel too.
    """
    is_wide = min(rows_shape + weights_shape[1:]) >= LEAST_WIDTH
    return platform != "tpu" or (is_wide and rows_shape[0] % TILE_ROWS == 0)
