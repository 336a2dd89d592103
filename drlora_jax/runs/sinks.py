"""Sends a run's figures to other places besides its own logs.

The logs of the run directory are authoritative; a sink receives copies of their rows as they are
written. To add a logger, write a class with the three methods of `Sink`, and add it to
`open_sinks`:

    class Printer:
        def metrics(self, row):
            print(row["step"], row.get("loss"))

        def ranks(self, row):
            print(row["step"], row["ranks"])

        def close(self):
            pass

Rows are the objects of metrics.jsonl and ranks.jsonl. A resumed run sends the steps after its last
checkpoint again; `open_sinks` tells a sink that cannot overwrite a step where the run resumes.
"""

import math
import pathlib
import struct
import time
import zlib
from collections.abc import Mapping
from typing import Any, Protocol

from drlora_jax.config import RunSection
from drlora_jax.errors import UserError
from drlora_jax.reporting.palette import shade


class Sink(Protocol):
    def metrics(self, row: Mapping[str, Any]) -> None:
        """Receives a row of metrics.jsonl: a step and its figures."""

    def ranks(self, row: Mapping[str, Any]) -> None:
        """Receives a row of ranks.jsonl: a step, ranks, saliency and budget."""

    def close(self) -> None:
        """Writes out anything that is buffered."""


def open_sinks(section: RunSection, directory: pathlib.Path, step: int) -> list[Sink]:
    """Opens the sinks that the config requests, for a run that continues after `step`."""
    return [TensorBoard(directory / "tensorboard", step)] if section.tensorboard else []


def check_sinks(section: RunSection) -> None:
    """Refuses a sink whose package is not installed, before anything starts."""
    if section.tensorboard:
        _tensorboard()


def _tensorboard():
    try:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError as error:
        raise UserError(
            f"run.tensorboard=true needs the package tensorboard ({error}): pip install "
            "'drlora-jax[tensorboard]', or set run.tensorboard=false."
        ) from error
    return event_pb2, summary_pb2, EventFileWriter


class TensorBoard:
    """Scalars of every row, and the map of ranks as an image at every event."""

    CELL = 12  # pixels

    def __init__(self, directory: pathlib.Path, step: int):
        self._events, self._summaries, writer = _tensorboard()
        self._writer = writer(str(directory))
        # Tells TensorBoard to discard what an ended run had written after its checkpoint.
        start = self._events.SessionLog(status=self._events.SessionLog.START)
        self._write(step + 1, session_log=start)

    def metrics(self, row: Mapping[str, Any]) -> None:
        values = [
            self._summaries.Summary.Value(tag=name, simple_value=value)
            for name, value in row.items()
            if name != "step" and isinstance(value, int | float) and math.isfinite(value)
        ]
        self._write(row["step"], summary=self._summaries.Summary(value=values))

    def ranks(self, row: Mapping[str, Any]) -> None:
        ranks = row["ranks"]
        highest = max((max(layer) for layer in ranks if layer), default=0)
        image = self._summaries.Summary.Image(
            width=max(map(len, ranks)) * self.CELL,
            height=len(ranks) * self.CELL,
            colorspace=3,
            encoded_image_string=heat_map_png(ranks, max(highest, 1), self.CELL),
        )
        value = self._summaries.Summary.Value(tag="ranks", image=image)
        self._write(row["step"], summary=self._summaries.Summary(value=[value]))

    def close(self) -> None:
        self._writer.close()

    def _write(self, step: int, **content) -> None:
        self._writer.add_event(self._events.Event(wall_time=time.time(), step=step, **content))


def heat_map_png(values: list[list[float]], highest: float, cell: int) -> bytes:
    """Draws a PNG of layers x experts in squares of `cell` pixels; short rows end in black."""
    columns = max(map(len, values))
    lines = []
    for row in values:
        pixels = b"".join(bytes.fromhex(shade(value / highest)[1:]) * cell for value in row)
        line = b"\0" + pixels.ljust(columns * cell * 3, b"\0")  # filter 0
        lines += [line] * cell
    header = struct.pack(">IIBBBBB", columns * cell, len(values) * cell, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"".join(lines))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )
