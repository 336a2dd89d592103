"""Rows of metrics.jsonl: each has the rate of its own steps, whatever computes and whatever comes
between. A device with a clock of its own takes the place of the compiled step.
"""

import dataclasses
import functools
import json
from types import SimpleNamespace
from unittest import mock

import jax
import pytest

from drlora_jax import train as train_lib
from drlora_jax.reporting.progress import Throughput
from drlora_jax.runs.directory import RunDirectory
from drlora_jax.training.job import prepare
from drlora_jax.training.metrics_rows import rate_at
from drlora_jax.training.optimizer import make_schedule
from drlora_jax.training.state import start
from tests.support.tiny import tiny_config

SECONDS, BETWEEN = 4.0, 1000.0  # of a step; of every event, evaluation and checkpoint


class Device:
    """Takes SECONDS for each step: at once, as a CPU does, or in the background."""

    def __init__(self, *, in_background: bool):
        self.now = 0.0  # of the host
        self.busy_until = 0.0
        self._in_background = in_background

    def compiled(self, params, state, batch):
        self.busy_until = max(self.busy_until, self.now) + SECONDS
        if not self._in_background:
            self.now = self.busy_until
        loss = Value(self, self.busy_until, 1.0)
        metrics = {"loss": loss, "grad_norm": loss, "weight_LE": None, "load_LE": None}
        return state._replace(step=Value(self, self.busy_until, int(state.step) + 1)), metrics

    def wait(self, seconds=BETWEEN):
        self.now = max(self.now, self.busy_until) + seconds


class Value:
    """A number that is there at some time, and waits for it when it is read."""

    def __init__(self, device, at, value):
        self._device, self._at, self._value = device, at, value

    def is_ready(self):
        return self._device.now >= self._at

    def block_until_ready(self):
        self._device.now = max(self._device.now, self._at)
        return self

    def __float__(self):
        self.block_until_ready()
        return float(self._value)

    def __int__(self):  # of the count of steps: known without the device
        return self._value


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    return train_lib.build(prepare(tiny_config(folder))), folder


@pytest.fixture
def rows_of(built, monkeypatch):
    """The rows of a run that starts after `done` steps."""
    run, folder = built

    def take(name, device, done=0, batch_seconds=0.0, **options):
        config = run.job.config
        config = dataclasses.replace(config, run=dataclasses.replace(config.run, **options))
        directory = RunDirectory(str(folder / name))
        directory.path.mkdir(exist_ok=True)
        position = start(run)
        position = position._replace(state=position.state._replace(step=done))
        clock = functools.partial(Throughput, clock=lambda: device.now)

        def between(result):
            device.wait()
            return result

        def batches(make, indices):
            if not batch_seconds:
                yield from list(map(make, indices))  # all there before they are asked for
            for index in indices if batch_seconds else ():
                device.now += batch_seconds
                yield make(index)

        fakes = {
            "Throughput": clock,
            "evaluate": lambda *_: between(2.0),
            "save": lambda *_: between(None),
            "grow": lambda run, position, *_: between(position),
            "made_ahead": batches,
        }
        for each, value in fakes.items():
            monkeypatch.setattr(train_lib, each, value)
        job = run.job._replace(config=config, run_dir=directory)
        loop = train_lib.Loop(
            run._replace(job=job),
            params={},
            position=position,
            checkpoints=mock.Mock(),
            stop=SimpleNamespace(reached=lambda step: False),
            report=mock.Mock(),
            progress=mock.Mock(),
            watchdog=mock.Mock(),
        )
        loop.take_steps(device.compiled)
        file = directory.metrics_file
        lines = file.read_text().splitlines() if file.exists() else []
        return [row for row in map(json.loads, lines) if row["step"]]

    return take


@pytest.mark.parametrize("done", [0, 2, 5])
@pytest.mark.parametrize(("log_every", "checkpoint_every"), [(1, 5), (10, 5), (4, 3), (5, 100)])
@pytest.mark.parametrize("in_background", [False, True])
def test_every_row_has_the_rate_of_its_own_steps(
    rows_of, in_background, log_every, checkpoint_every, done
):
    name = f"{in_background}_{log_every}_{checkpoint_every}_{done}"
    device = Device(in_background=in_background)
    rows = rows_of(name, device, done=done, log_every=log_every, checkpoint_every=checkpoint_every)
    assert {row["step"] for row in rows} >= {step for step in (6, 12) if step > done}
    before, counted = done, 0
    for row in rows:
        seconds = SECONDS * (row["step"] - before)
        rate = (row["tokens"] - counted) / seconds
        assert row["tokens_per_second"] == pytest.approx(rate, abs=0.06), row
        before, counted = row["step"], row["tokens"]


@pytest.mark.parametrize("in_background", [False, True])
def test_a_wait_for_a_batch_is_the_time_of_the_step_that_uses_it(rows_of, in_background):
    device = Device(in_background=in_background)
    rows = rows_of(f"slow_{in_background}", device, batch_seconds=100.0, log_every=1)
    tokens = [0, *(row["tokens"] for row in rows)]
    for row, before in zip(rows, tokens, strict=False):
        rate = (row["tokens"] - before) / (SECONDS + 100.0)
        assert row["tokens_per_second"] == pytest.approx(rate, abs=0.06), row


def test_in_the_background_a_row_does_not_hold_the_next_step_up(rows_of, monkeypatch):
    """The device pauses for a row only where something else waits for the step anyway."""
    device = Device(in_background=True)

    def slow(self, values):
        device.now += 1.0

    monkeypatch.setattr(RunDirectory, "log_metrics", slow)
    rows_of("busy", device, log_every=1, checkpoint_every=100)
    # Evaluations before step 1 and, with its checkpoint, after 6; events after 3 and 7.
    assert device.busy_until == 12 * SECONDS + 5 * BETWEEN + 4 * 1.0


def test_the_rate_in_a_row_is_not_computed_behind_the_steps_in_the_queue(built, monkeypatch):
    """On an accelerator it would wait for the step that was dispatched last."""
    run, _ = built
    used = []
    schedule = make_schedule(run.job.config.train, 12, 1e-2)

    def watched(step):
        used.append(jax.config.jax_default_device)
        return schedule(step)

    assert rate_at(watched, 5) == float(schedule(5))
    assert used[0].platform == "cpu"
    monkeypatch.setattr(jax, "local_devices", mock.Mock(side_effect=RuntimeError("no cpu")))
    assert rate_at(watched, 5) == float(schedule(5)) and used[1] is None
