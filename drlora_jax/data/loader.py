"""Batches by global row index.

The rows of an epoch are a pure function of (documents, seed, epoch), and the only position is one
row index that counts on over the epochs. So a run resumes at any row, on any number of processes,
without any state of its own.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from drlora_jax.data.packing import one_a_row, pack
from drlora_jax.data.tokenize import Document
from drlora_jax.errors import UserError

KEPT_EPOCHS = 2  # plans in memory: a batch can touch the end of one epoch and the start of the next


class RowArrays(NamedTuple):
    """One row, each array of shape [T]."""

    tokens: np.ndarray  # int32
    targets: np.ndarray  # int32: the next token of the same document
    segment_ids: np.ndarray  # int32: 1, 2, ... by document; 0 is padding
    positions: np.ndarray  # int32: from 0 in every document
    target_mask: np.ndarray  # float32: 1 where the target is to be predicted


class Batch(NamedTuple):
    """Stacked rows; meaning and dtypes are those of `RowArrays`."""

    tokens_BT: np.ndarray
    targets_BT: np.ndarray
    segment_ids_BT: np.ndarray
    positions_BT: np.ndarray
    target_mask_BT: np.ndarray


BATCH_DTYPES = Batch(np.int32, np.int32, np.int32, np.int32, np.float32)


class Loader:
    """Training batches out of documents; stateless but for cached plans."""

    def __init__(
        self,
        documents: Sequence[Document],
        *,
        sequence_length: int,
        batch_size: int,
        seed: int,
        pad_id: int,
        shuffle: bool = True,
        pack: bool = True,
    ):
        if not documents:
            raise UserError("There is no document to train on.")
        self.documents = documents
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.pad_id = pad_id
        self.is_packed = pack
        self._seed = seed
        self._shuffle = shuffle
        self._lengths = np.array([len(document.tokens) for document in documents])
        self._plans: dict[int, list[np.ndarray]] = {}
        self._starts = [0]  # global row index at which each epoch starts, as far as known

    def epoch_rows(self, epoch: int) -> list[np.ndarray]:
        """The plan of an epoch: the document indices of every row."""
        if epoch not in self._plans:
            plan = _plan(
                self._lengths,
                self.sequence_length,
                _order(len(self._lengths), self._seed, epoch, shuffle=self._shuffle),
                pack_rows=self.is_packed,
            )
            while len(self._plans) >= KEPT_EPOCHS:
                self._plans.pop(next(iter(self._plans)))
            self._plans[epoch] = plan
        return self._plans[epoch]

    def total_rows(self, epochs: int) -> int:
        """Rows in that many epochs; packed epochs differ a little in length."""
        while len(self._starts) <= epochs:
            last = len(self._starts) - 1
            rows = len(self.epoch_rows(last)) if self.is_packed else len(self._lengths)
            self._starts.append(self._starts[last] + rows)
        return self._starts[epochs]

    def batch(self, row_index: int) -> Batch:
        """The rows from a global row index on, running into the next epoch where one ends."""
        return stack_rows(
            self.documents,
            [self._row(index) for index in range(row_index, row_index + self.batch_size)],
            self.sequence_length,
            self.pad_id,
        )

    def row(self, row_index: int) -> RowArrays:
        """The arrays of one row."""
        return fill_row(self.documents, self._row(row_index), self.sequence_length, self.pad_id)

    def token_count(self, row_index: int) -> int:
        """Tokens of the batch from a global row index on, without making it."""
        rows = range(row_index, row_index + self.batch_size)
        return sum(int(self._lengths[self._row(index)].sum()) for index in rows)

    def _row(self, row_index: int) -> np.ndarray:
        if row_index < 0:
            raise ValueError(f"A row index is 0 or more, got {row_index}.")
        while self._starts[-1] <= row_index:
            self.total_rows(len(self._starts))
        epoch = int(np.searchsorted(self._starts, row_index, side="right")) - 1
        return self.epoch_rows(epoch)[row_index - self._starts[epoch]]


def eval_batches(
    documents: Sequence[Document],
    *,
    sequence_length: int,
    batch_size: int,
    pad_id: int,
    pack: bool = True,
    limit: int | None = None,
) -> Iterator[Batch]:
    """Every document once, in order; the last batch is filled up with rows of padding.

    Args:
      limit: batches at most; None: all.
    """
    lengths = np.array([len(document.tokens) for document in documents], np.int64)
    rows = _plan(lengths, sequence_length, np.arange(len(documents)), pack_rows=pack)
    rows += [np.array([], np.int64)] * (-len(rows) % batch_size)
    starts = range(0, len(rows), batch_size)
    for start in starts if limit is None else starts[:limit]:
        part = rows[start : start + batch_size]
        yield stack_rows(documents, part, sequence_length, pad_id)


def fill_row(
    documents: Sequence[Document], indices: Sequence[int], sequence_length: int, pad_id: int
) -> RowArrays:
    """Writes documents one after the other into the arrays of a row; no indices give padding."""
    row = RowArrays(
        tokens=np.full(sequence_length, pad_id, np.int32),
        targets=np.full(sequence_length, pad_id, np.int32),
        segment_ids=np.zeros(sequence_length, np.int32),
        positions=np.zeros(sequence_length, np.int32),
        target_mask=np.zeros(sequence_length, np.float32),
    )
    start = 0
    for segment, index in enumerate(indices, start=1):
        document = documents[index]
        end = start + len(document.tokens)
        row.tokens[start:end] = document.tokens
        row.segment_ids[start:end] = segment
        row.positions[start:end] = np.arange(end - start)
        # One short: the last token of a document has no target, whatever stands behind it.
        row.targets[start : end - 1] = document.tokens[1:]
        row.target_mask[start : end - 1] = document.is_target[1:]
        start = end
    return row


def stack_rows(
    documents: Sequence[Document], rows: Sequence[np.ndarray], sequence_length: int, pad_id: int
) -> Batch:
    """The arrays of planned rows, stacked."""
    filled = [fill_row(documents, row, sequence_length, pad_id) for row in rows]
    return Batch(*(np.stack(arrays) for arrays in zip(*filled, strict=True)))


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


def split_micro_batches(batch: Batch, count: int) -> Batch:
    """Arrays of shape [count, B / count, T]; part i holds consecutive rows."""
    size = len(batch.tokens_BT)
    if size % count:
        raise UserError(
            f"The rows of a batch ({size}) must be a multiple of train.micro_batches ({count})."
        )
    return Batch(*(array.reshape(count, size // count, *array.shape[1:]) for array in batch))


def count_tokens(batch: Batch) -> int:
    """Tokens that are not padding."""
    return int((batch.segment_ids_BT > 0).sum())


def count_targets(batch: Batch) -> int:
    """Tokens to be predicted."""
    return int(batch.target_mask_BT.sum(dtype=np.float64))


def _order(size: int, seed: int, epoch: int, *, shuffle: bool) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size) if shuffle else np.arange(size)


def _plan(
    lengths: np.ndarray, sequence_length: int, order: np.ndarray, *, pack_rows: bool
) -> list[np.ndarray]:
    return pack(lengths, sequence_length, order) if pack_rows else one_a_row(order)
