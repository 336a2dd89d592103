"""Which documents share a row, and the arrays of a row. Pure functions of their arguments."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from drlora_jax.data.tokenize import Document

OPEN_ROWS = 64  # rows that may still take a document; bounds the search, and the time to plan


class RowArrays(NamedTuple):
    """One row, each array of shape [T]."""

    tokens: np.ndarray  # int32
    targets: np.ndarray  # int32: the next token of the same document
    segment_ids: np.ndarray  # int32: 1, 2, ... by document; 0 is padding
    positions: np.ndarray  # int32: from 0 in every document
    target_mask: np.ndarray  # float32: 1 where the target is to be predicted


def pack(lengths: np.ndarray, sequence_length: int, order: np.ndarray) -> list[np.ndarray]:
    """Assigns documents to rows, greedily: the first open row with room, else a new one.

    Args:
      lengths: tokens of every document.
      sequence_length: tokens a row takes.
      order: document indices in the order in which they are placed.
    """
    rows: list[list[int]] = []
    room: dict[int, int] = {}  # of the open rows, oldest first
    for index in order.tolist():
        length = int(lengths[index])
        if length > sequence_length:
            raise ValueError(f"Document {index} has {length} tokens, a row {sequence_length}.")
        row = next((row for row, free in room.items() if free >= length), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room[row] = sequence_length
        rows[row].append(index)
        room[row] -= length
        if room[row] == 0:
            del room[row]
        if len(room) > OPEN_ROWS:
            del room[min(room, key=room.get)]  # the fullest one has the least to lose
    return [np.array(row, np.int64) for row in rows]


def one_a_row(order: np.ndarray) -> list[np.ndarray]:
    """The plan without packing."""
    return list(order.reshape(-1, 1))


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
