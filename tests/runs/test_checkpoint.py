"""Saving: what it leaves open, which step a failure belongs to, what is kept."""

import os
import pathlib
import resource
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drlora_jax import cli
from drlora_jax.errors import RunError, UserError
from drlora_jax.parallel import processes
from drlora_jax.runs.checkpoint import Checkpoints
from drlora_jax.runs.checkpoint_read import choose_steps, saved_steps

MANY = 1000  # of the slow test
STATE = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "step": np.int32(3)}


@pytest.fixture(autouse=True)
def as_in_a_command(monkeypatch):
    hook = cli.without_closed_loops(sys.unraisablehook)
    monkeypatch.setattr(sys, "unraisablehook", hook)


def state(value: float = 0.0):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf + np.asarray(value, leaf.dtype)), STATE)


def abstract():
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state()
    )


@pytest.fixture
def checkpoints(tmp_path):
    made = Checkpoints(tmp_path / "checkpoints", keep_last=2)
    yield made
    made.close()


def save_many(checkpoints, count: int) -> tuple[int, int]:
    """Descriptors and threads that are left over, beside those of the first ten saves."""
    for step in range(1, count + 1):
        checkpoints.save(step, state(step), {"tokens": step})
        if step == 10:
            before = _open_now(checkpoints)
    return tuple(np.subtract(_open_now(checkpoints), before))


def _open_now(checkpoints) -> tuple[int, int]:
    checkpoints.finish()
    time.sleep(0.5)  # threads of a pool that is closed end a little later
    return len(os.listdir("/proc/self/fd")), threading.active_count()


@pytest.mark.parametrize("count", [60, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.skipif(not pathlib.Path("/proc/self/fd").exists(), reason="counts in /proc")
def test_saves_leave_nothing_open(checkpoints, count):
    descriptors, threads = save_many(checkpoints, count)
    assert descriptors <= 5 and threads <= 0
    found, host = checkpoints.restore(count, abstract(), ("tokens",))
    np.testing.assert_array_equal(found["a"], STATE["a"] + count)
    assert host["tokens"] == count


def test_a_failed_save_names_its_own_step(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    checkpoints.save(5, state(), {})
    checkpoints.finish()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))
    try:
        checkpoints.save(10, state(), {})
        with pytest.raises(RunError, match="checkpoint of step 10 could not be written: .*too lar"):
            checkpoints.save(15, state(), {})
        with pytest.raises(RunError, match="checkpoint of step 10 could not be written"):
            checkpoints.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved_steps(tmp_path) == [5]


def test_a_lost_peer_is_no_failed_write(checkpoints, monkeypatch):
    """Whoever saves leaves with the others then, and can be started again."""
    error = RuntimeError("UNKNOWN: Gloo AllGather failed: Connection reset by peer")
    monkeypatch.setattr(processes, "is_lost_peer", lambda found: found is error)

    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints._checkpointer, "save_async", fail, raising=False)
        with pytest.raises(RuntimeError) as raised:
            checkpoints.save(5, state(), {})
        assert raised.value is error


def test_the_newest_and_the_best_are_kept(tmp_path):
    folder = tmp_path / "checkpoints"
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: 2.5}
    for steps in ((1, 2, 3), (4, 5)):  # best or not is also known of an earlier start's
        checkpoints = Checkpoints(folder, keep_last=2)
        for step in steps:
            checkpoints.save(step, state(step), {}, eval_loss=losses[step])
        checkpoints.close()
    assert saved_steps(folder) == [2, 4, 5]
    assert choose_steps(folder, "latest") == (5, 4, 2) and choose_steps(folder, "best") == (2,)
    assert choose_steps(folder, "4") == (4,) and choose_steps(folder, (5, 2)) == (5, 2)
    with pytest.raises(
        UserError, match="--step 3: .* has the steps 2, 4, 5; give one of them, latest or best"
    ):
        choose_steps(folder, "3")


def test_a_file_with_a_step_for_a_name_is_no_checkpoint(checkpoints, tmp_path):
    checkpoints.save(1, state(), {})
    checkpoints.finish()
    (tmp_path / "checkpoints" / "99").write_text("")
    assert choose_steps(tmp_path / "checkpoints", "latest") == (1,)
    assert Checkpoints(tmp_path / "checkpoints", keep_last=2).latest_step() == 1
