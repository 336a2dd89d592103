"""Sinks get the rows of the logs; what TensorBoard's files hold is read back by hand."""

import json
import struct
import sys
import zlib

import numpy as np
import pytest

from drlora_jax.config import RunSection
from drlora_jax.errors import UserError
from drlora_jax.reporting.palette import shade
from drlora_jax.runs import sinks
from tests.support.run_logs import EVENTS, logged, write_run


class Kept:
    """The smallest sink."""

    def __init__(self):
        self.rows, self.events, self.is_closed = [], [], False

    def metrics(self, row):
        self.rows.append(dict(row))

    def ranks(self, row):
        self.events.append(dict(row))

    def close(self):
        self.is_closed = True


def copy_logs(run, sink) -> None:
    """What a run with that sink would have sent."""
    run.sinks = [sink]
    for row in logged(run.metrics_file):
        run.log_metrics(row)
    event = logged(run.ranks_file)[-1]
    ranks_LE, saliency_LE = np.array(event["ranks"]), np.array(event["saliency"])
    run.log_ranks(31, event["layers"], ranks_LE, saliency_LE, event["budget"], {"more": 1})


def test_a_sink_gets_the_rows_of_the_logs(tmp_path):
    run, sink = write_run(tmp_path / "run"), Kept()
    before = len(logged(run.metrics_file))
    copy_logs(run, sink)
    assert sink.rows == logged(run.metrics_file)[before:]
    assert sink.events == logged(run.ranks_file)[len(EVENTS) :]


def png_pixels(data: bytes) -> np.ndarray:
    """u8 [height, width, 3] of an unfiltered RGB PNG whose checksums are right."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, place = {}, 8
    while place < len(data):
        (length,) = struct.unpack_from(">I", data, place)
        name, body = data[place + 4 : place + 8], data[place + 8 : place + 8 + length]
        (checksum,) = struct.unpack_from(">I", data, place + 8 + length)
        assert checksum == zlib.crc32(name + body)
        chunks[name], place = body, place + length + 12
    width, height, depth, kind = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    assert (depth, kind) == (8, 2)
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, -1)
    assert not lines[:, 0].any()
    return lines[:, 1:].reshape(height, width, 3)


def test_the_image_of_a_map_has_its_colours():
    values = [[0, 4, 8], [8, 2]]
    pixels = png_pixels(sinks.heat_map_png(values, 8, cell=3))
    assert pixels.shape == (6, 9, 3)
    for row, cells in enumerate(values):
        for column, value in enumerate(cells):
            square = pixels[3 * row : 3 * row + 3, 3 * column : 3 * column + 3].reshape(-1, 3)
            assert {bytes(pixel).hex() for pixel in square} == {shade(value / 8)[1:]}
    assert not pixels[3:, 6:].any()


def read_events(folder):
    """The events of the one file in a folder: records of length, checksum, message, checksum."""
    event_pb2, _, _ = sinks._tensorboard()
    (file,) = folder.iterdir()
    data, place, events = file.read_bytes(), 0, []
    while place < len(data):
        (length,) = struct.unpack_from("<Q", data, place)
        events.append(event_pb2.Event.FromString(data[place + 12 : place + 12 + length]))
        place += length + 16
    return events


def test_tensorboard_files_hold_the_logs(tmp_path):
    pytest.importorskip("tensorboard")
    run = write_run(tmp_path / "run")
    (sink,) = sinks.open_sinks(RunSection(tensorboard=True), run.path, 0)
    rows = logged(run.metrics_file)
    copy_logs(run, sink)
    sink.close()
    events = read_events(run.path / "tensorboard")
    scalars = {
        (event.step, value.tag): value.simple_value
        for event in events
        for value in event.summary.value
        if value.HasField("simple_value")
    }
    expected = {
        (row["step"], name): value
        for row in rows
        for name, value in row.items()
        if name != "step" and value is not None
    }
    assert scalars.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(scalars[key], value, rtol=1e-6)
    images = [v.image for e in events for v in e.summary.value if v.HasField("image")]
    pixels = png_pixels(images[0].encoded_image_string)
    assert pixels.shape == (images[0].height, images[0].width, 3)
    ranks = logged(run.ranks_file)[-1]["ranks"]
    colour = shade(ranks[1][2] / np.max(ranks))[1:]
    assert bytes(pixels[sinks.TensorBoard.CELL, 2 * sinks.TensorBoard.CELL]).hex() == colour


def test_a_resumed_run_tells_tensorboard_where_it_goes_on(tmp_path):
    pytest.importorskip("tensorboard")
    sinks.TensorBoard(tmp_path / "logs", 20).close()
    starts = [e for e in read_events(tmp_path / "logs") if e.HasField("session_log")]
    assert [(e.step, e.session_log.status) for e in starts] == [(21, 1)]  # 1: START


def test_a_missing_package_is_said_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError, match=r"pip install 'drlora-jax\[tensorboard\]'"):
        sinks.check_sinks(RunSection(tensorboard=True))
    sinks.check_sinks(RunSection())


def test_rows_are_json(tmp_path):
    """What a sink gets is what a reader of the file gets, not arrays."""
    run, sink = write_run(tmp_path / "run"), Kept()
    copy_logs(run, sink)
    assert json.loads(json.dumps(sink.events)) == sink.events
