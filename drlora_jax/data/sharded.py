"""Batches on a mesh: every process makes the rows of its own devices, and no others."""

import functools

import jax
import numpy as np

from drlora_jax.data.loader import Batch, Loader
from drlora_jax.data.packing import RowArrays


def sharded_batch(
    loader: Loader, row_index: int, micro_batches: int, sharding: jax.sharding.Sharding
) -> Batch:
    """The batch from a global row index on as device arrays [micro_batches, B, T]; consecutive rows
    share a micro-batch. A process makes the rows of its own devices only.
    """
    rows = loader.batch_size // micro_batches
    shape = (micro_batches, rows, loader.sequence_length)

    @functools.cache  # several devices, and all five arrays, want the same rows
    def row(micro: int, index: int) -> RowArrays:
        return loader.row(row_index + micro * rows + index)

    def part(field: int, index: tuple[slice, ...]) -> np.ndarray:
        micros, indices, positions = (
            range(*at.indices(n)) for at, n in zip(index, shape, strict=True)
        )
        assert len(positions) == shape[2], "rows are never cut"
        return np.stack([[row(micro, each)[field] for each in indices] for micro in micros])

    return Batch(
        *(
            jax.make_array_from_callback(shape, sharding, functools.partial(part, field))
            for field in range(len(Batch._fields))
        )
    )
