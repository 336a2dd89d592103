"""Decides which documents share a row. Pure functions of their arguments."""

import numpy as np

OPEN_ROWS = 64  # rows with room that are searched; bounds the time to plan


def pack(lengths: np.ndarray, sequence_length: int, order: np.ndarray) -> list[np.ndarray]:
    """Assigns documents to rows, greedily: the first open row with room, or a new one.

    Args:
      lengths: tokens of every document.
      sequence_length: tokens per row.
      order: document indices in the order in which they are placed.
    """
    rows: list[list[int]] = []
    room: dict[int, int] = {}  # free tokens of the open rows, oldest first
    for index in order.tolist():
        length = int(lengths[index])
        if length > sequence_length:
            raise ValueError(f"Document {index} has {length} tokens, but a row {sequence_length}.")
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
