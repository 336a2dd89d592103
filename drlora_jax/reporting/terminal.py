"""Draws the map of ranks, layers x experts, as text.

A map that fits shows its numbers. A larger one shows means over groups of neighbouring experts and
layers, one cell per group, with a legend. Without colour a cell is its number or a character that
is darker for higher ranks.
"""

from typing import NamedTuple

import numpy as np
from rich.text import Text

from drlora_jax.reporting.palette import ink, shade
from drlora_jax.system.numbers import ceil_div

MAX_ROWS = 14
MAX_COLUMNS = 64
RAMP = ".:-=+*#%@"


class Grid(NamedTuple):
    """Group means of a map, and the sizes of the groups; the last groups may be smaller."""

    mean_LE: np.ndarray
    layers: int  # per row
    experts: int  # per column


def group_means(values_LE: np.ndarray, max_rows: int, max_columns: int) -> Grid:
    """Averages `values_LE` into at most `max_rows` x `max_columns` cells."""
    sizes = [
        _group_size(*pair) for pair in zip(values_LE.shape, (max_rows, max_columns), strict=True)
    ]
    mean_LE = np.asarray(values_LE, np.float64)
    for axis, size in enumerate(sizes):
        length = mean_LE.shape[axis]
        starts = np.arange(0, length, size)
        counts = np.diff(np.append(starts, length))
        total = np.add.reduceat(mean_LE, starts, axis=axis)
        mean_LE = total / np.expand_dims(counts, 1 - axis)
    return Grid(mean_LE, *sizes)


def _group_size(length: int, most: int) -> int:
    """Returns the smallest group that gives at most `most` cells, or a near one that divides
    evenly.
    """
    needed = ceil_div(length, most)
    even = (size for size in range(needed, 2 * needed + 1) if length % size == 0)
    return next(even, needed)


def heat_map(
    ranks_LE: np.ndarray,
    max_rank: int,
    layers: tuple[int, ...],
    *,
    width: int,
    max_rows: int = MAX_ROWS,
    has_colour: bool = True,
) -> Text:
    """Draws one row per layer (or group of layers), labelled with the model's layer index, and a
    legend.

    Args:
      ranks_LE: active ranks of every expert, or any values from 0 to `max_rank`.
      width: characters of the terminal; no line is longer.
    """
    label = max(len(str(index)) for index in layers) + 6  # "layer 12"
    digits = len(str(max_rank)) + 2
    room = max(width - label - 2, 8)
    grid = group_means(ranks_LE, max_rows, min(MAX_COLUMNS, room))
    is_whole = grid.layers == grid.experts == 1
    has_numbers = is_whole and ranks_LE.shape[1] * digits <= room
    cell = digits if has_numbers else min(2, room // grid.mean_LE.shape[1])
    text = Text(no_wrap=True)
    for row, values in enumerate(grid.mean_LE):
        text.append(f"layer {layers[row * grid.layers]:<{label - 6}}  ", "dim")
        for value in values:
            text.append(*_cell(value, max_rank, cell, has_numbers, has_colour))
        text.append("\n")
    text.append(" " * (label + 2))
    return text.append_text(_legend(grid, max_rank, has_numbers, has_colour))


def _cell(value: float, max_rank: int, width: int, has_number: bool, has_colour: bool):
    """Returns text and style of one cell."""
    part = value / max(max_rank, 1)
    number = f"{value:.0f} ".rjust(width)
    if has_colour:
        return (number if has_number else " " * width), f"{ink(part)} on {shade(part)}"
    return (number if has_number else RAMP[round(part * (len(RAMP) - 1))] * width), ""


def _legend(grid: Grid, max_rank: int, has_numbers: bool, has_colour: bool) -> Text:
    if has_numbers:
        return Text("active ranks of each expert", "dim")
    scale = [(" ", f"on {shade(part / 11)}") for part in range(12)] if has_colour else [RAMP]
    sizes = {"experts": grid.experts, "layers": grid.layers}
    groups = " x ".join(f"{size} {name}" for name, size in sizes.items() if size > 1)
    mean = f", each cell is the mean over {groups}" if groups else ""
    return Text.assemble(("0 ", "dim"), *scale, (f" {max_rank} active ranks{mean}", "dim"))
