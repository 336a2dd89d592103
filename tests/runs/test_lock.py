"""One writer at a time: live, dead and foreign holders, with and without locks of the kernel."""

import errno
import json
import os
import socket
import subprocess
import sys

import pytest

from drlora_jax.errors import UserError
from drlora_jax.runs import lock
from drlora_jax.runs.directory import RunDirectory
from drlora_jax.runs.lock import LOCK_NAME, hold_lock
from tests.error_cases.run import locked_by_another_process


@pytest.fixture
def without_kernel_locks(monkeypatch):
    def refuse(descriptor, how):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)


def _leave(directory, **changes):
    owner = {"pid": os.getpid(), "host": socket.gethostname()}
    owner["started"] = lock._start_time(os.getpid())
    (directory / LOCK_NAME).write_text(json.dumps(owner | changes))


def _dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_it_is_held_once_and_leaves_nothing(tmp_path):
    directory = tmp_path / "runs" / "a"
    with hold_lock(directory):
        message = f"in use by process {os.getpid()} on {socket.gethostname()}; wait for it"
        with pytest.raises(UserError, match=message):
            with hold_lock(directory):
                pass
        assert (directory / LOCK_NAME).exists()
    assert list(directory.iterdir()) == []
    with hold_lock(directory):
        pass


def test_a_killed_holder_lets_go(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with locked_by_another_process() as process:
        with pytest.raises(UserError, match=f"in use by process {process.pid} on"):
            with hold_lock(tmp_path / "run"):
                pass
        process.kill()
        process.wait()
        assert (tmp_path / "run" / LOCK_NAME).exists()
        assert RunDirectory("run").stored() is None  # the leftover does not count as content
        with hold_lock(tmp_path / "run"):
            pass


def test_readers_are_not_kept_out(tmp_path):
    directory = RunDirectory(str(tmp_path))
    with directory.locked():
        assert directory.stored() is None and not directory.has_checkpoint()


def test_a_live_holder_where_there_are_no_locks(tmp_path, without_kernel_locks):
    _leave(tmp_path)
    with pytest.raises(UserError, match=f"in use by process {os.getpid()} on"):
        with hold_lock(tmp_path):
            pass


@pytest.mark.parametrize("content", ["dead", "reused", "elsewhere", "junk", "empty"])
def test_leftovers_where_there_are_no_locks(tmp_path, without_kernel_locks, content):
    if content == "dead":
        _leave(tmp_path, pid=_dead_process())
    elif content == "reused":  # the number, by a process that started at another time
        _leave(tmp_path, started="0")
    elif content == "elsewhere":
        _leave(tmp_path, host="another-host")
    else:
        (tmp_path / LOCK_NAME).write_text({"junk": "[1]", "empty": ""}[content])
    with hold_lock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_directory_in_the_place_of_the_lock(tmp_path):
    (tmp_path / LOCK_NAME).mkdir()
    with pytest.raises(UserError, match="cannot be written: Is a directory"):
        with hold_lock(tmp_path):
            pass
