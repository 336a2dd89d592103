"""Shared settings of the parts of `gpu.py`: sizes and precision, the ceilings that shares refer to,
and the rows of failed measurements.
"""

import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
from timing import copy_bound, first_line, matmul_bound, median_seconds

from drlora_jax.reporting.progress import peak_flops, peak_memory

GIB = 2**30


class Setting(NamedTuple):
    """Of one process."""

    tiny: bool
    folder: pathlib.Path  # of the whole call
    matmul: float  # FLOP/s of a large product on this device
    copy: float  # bytes/s of a large copy, read and written

    @property
    def dtype(self) -> str:
        return "float32" if self.tiny else "bfloat16"

    @property
    def repeats(self) -> int:
        return 3 if self.tiny else 10


def measured_ceilings(tiny: bool) -> tuple[float, float]:
    """Returns (FLOP/s of a large matrix product, bytes/s read and written by a pass over a large
    array).
    """
    side, dtype = (512, "float32") if tiny else (8192, "bfloat16")
    product, operations = matmul_bound(side, dtype)
    copy, moved = copy_bound(2 * side, dtype)
    return operations / median_seconds(product), moved / median_seconds(copy)


def bounds(setting: Setting, case: str):
    """Yields the ceilings that shares refer to, as measured in this process; a copy reads and
    writes.
    """
    yield {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "matmul_tflops": setting.matmul / 1e12,
        "copy_gb_s": setting.copy / 1e9,
        "of_datasheet_peak": rate_shares(setting, setting.matmul)["of_datasheet_peak"],
    }


def rate_shares(setting: Setting, flops: float) -> dict:
    """Returns FLOP/s as a share of a large product's rate here and of the vendor's figure."""
    peak = peak_flops(1)
    return {
        "tflops": flops / 1e12,
        "of_measured_matmul": flops / setting.matmul,
        "of_datasheet_peak": None if peak is None else flops / peak,
    }


def attempt(row: dict, measure: Callable[[], dict]) -> dict:
    """Returns the row with what `measure` found, or with the first line of what it raised."""
    try:
        return row | measure()
    except Exception as error:  # whatever a backend raises is a finding
        return row | {"error": first_line(error)}


def device_limit() -> int | None:
    """Returns the bytes of device memory that this process may use, if the platform reports
    them.
    """
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")


def device_peak() -> int | None:
    """Returns the peak bytes in use on the device since this process started, if the platform
    reports them.
    """
    return peak_memory().get("device_peak_bytes")


def in_gib(size: float | None) -> float | None:
    return None if size is None else size / GIB
