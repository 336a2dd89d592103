"""Signals from the first moment: one line, exit code 75, never swallowed, whatever is going on."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from drlora_jax.errors import EXIT_RESUMABLE

ROOT = pathlib.Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
SIGNALS = 50  # of the slow test
WAIT = 60  # seconds, on a busy machine


def run_code(code: str, **more) -> subprocess.CompletedProcess:
    """Runs Python that has the handlers, `kill(number)` and no jax."""
    head = """
        import contextlib, gc, hashlib, os, signal, sys, threading, time
        from drlora_jax.system import early
        early.install()
        def kill(number=signal.SIGINT): os.kill(os.getpid(), number)
    """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(code)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=WAIT,
        **more,
    )


def check_stopped(code: int, errors: str) -> None:
    (line,) = errors.splitlines()
    assert line.startswith("stopped ") and "run the same command again" in line, errors
    assert code == EXIT_RESUMABLE


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_it_ends_with_one_line(number):
    done = run_code(f"print('before'); kill(signal.{number}); time.sleep(60)")
    check_stopped(done.returncode, done.stderr)
    assert number in done.stderr and done.stdout == "before\n"


def test_standard_streams_that_are_closed_are_no_other_file(tmp_path):
    file = tmp_path / "file"
    code = f"""
        import os; [os.close(number) for number in range(3)]
        import sys; sys.stdin = sys.stdout = sys.stderr = None
        from drlora_jax.system import early
        early.install()
        handle = open({str(file)!r}, "w")
        assert handle.fileno() > 2
        print("printed"); print("printed", file=sys.stderr); sys.stdout.flush()
        os.write(1, b"written"); handle.write(sys.stdin.read() + "mine")
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    assert subprocess.run(command, env=ENVIRONMENT, timeout=WAIT).returncode == 0
    assert file.read_text() == "mine"


def test_a_callback_can_not_swallow_it():
    """Python prints and forgets what is raised there: jax has such a callback."""
    done = run_code("gc.callbacks.append(lambda *_: kill()); gc.collect(); time.sleep(60)")
    check_stopped(done.returncode, done.stderr)


def test_a_long_call_into_c_does_not_delay_it():
    """Handlers written in Python wait for the main thread, which is in a compiler for minutes."""
    done = run_code("""
        threading.Timer(0.2, kill).start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # some twenty minutes
        print("returned", flush=True)
    """)
    check_stopped(done.returncode, done.stderr)
    assert done.stdout == ""


def test_held_the_first_is_left_to_others_and_the_second_ends_it():
    done = run_code("""
        signal.signal(signal.SIGINT, lambda *_: print("noted", flush=True))
        with early.hold():
            kill()
            time.sleep(1.5)
            print("still here", flush=True)
            kill()
            time.sleep(60)
    """)
    assert done.stdout == "noted\nstill here\nnoted\n"
    check_stopped(done.returncode, done.stderr)
    assert "second signal" in done.stderr


def test_what_is_begun_is_undone(tmp_path):
    done = run_code("""
        with early.undoing(lambda: os.rmdir("draft")):
            os.mkdir("draft")
            kill()
            time.sleep(60)
    """, cwd=tmp_path)  # fmt: skip
    check_stopped(done.returncode, done.stderr)
    assert not any(tmp_path.iterdir())


def test_where_a_question_is_asked_ctrl_c_is_an_exception():
    done = run_code("""
        with contextlib.suppress(KeyboardInterrupt), early.raising():
            kill()
            time.sleep(60)
        print("caught", flush=True)
        time.sleep(1)  # longer than the thread's patience
        kill()
        time.sleep(60)
    """)
    assert done.stdout == "caught\n"
    check_stopped(done.returncode, done.stderr)


def test_a_run_notes_the_first_and_ends_at_the_second():
    done = run_code("""
        from drlora_jax.system.stop_signals import StopSignals
        with StopSignals() as stop:
            assert not stop.reached(0)
            kill(signal.SIGTERM)
            print(stop.reached(1), flush=True)
            kill()
            time.sleep(60)
    """)
    assert done.stdout == "True\n"
    check_stopped(done.returncode, done.stderr)
    assert "at once by a second signal (SIGINT) without saving" in done.stderr


def test_the_package_alone_sets_no_handlers():
    code = "import signal, drlora_jax; print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.PIPE).stdout == b"True\n"


def start(module: str, *arguments, cwd) -> subprocess.Popen:
    """A command, as soon as the first line of this package has run."""
    process = subprocess.Popen(
        [sys.executable, "-m", f"drlora_jax.{module}", *arguments],
        env=ENVIRONMENT,
        cwd=cwd,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not _answers_sigterm(process.pid):
        time.sleep(0.001)
    return process


def _answers_sigterm(pid: int) -> bool:
    """Python answers SIGINT from its own start, SIGTERM never."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def check_signal(tmp_path, module, arguments, number, delay) -> None:
    process = start(module, *arguments, cwd=tmp_path)
    time.sleep(delay)
    process.send_signal(number)
    errors = process.communicate(timeout=WAIT)[1]
    check_stopped(process.returncode, errors)


TRAIN = ("--config", "bundled:tiny", "run.dir=run", "mesh.data=1")
linux = pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="reads /proc")


@linux
@pytest.mark.parametrize(
    "module, arguments, number, delay",
    [
        ("train", TRAIN, signal.SIGINT, 0),
        ("train", TRAIN, signal.SIGTERM, 0.5),
        ("evaluate", ["--model", "bundled:tiny_moe", "--tasks", "gsm8k"], signal.SIGINT, 1),
    ],
)
def test_a_command_in_its_first_seconds(tmp_path, module, arguments, number, delay):
    check_signal(tmp_path, module, arguments, number, delay)


@linux
@pytest.mark.slow
def test_fifty_signals_in_the_first_five_seconds(tmp_path):
    draw = np.random.default_rng(0)
    for _ in range(SIGNALS):
        number = (signal.SIGINT, signal.SIGTERM)[draw.integers(2)]
        check_signal(tmp_path, "train", TRAIN, number, draw.uniform(0, 5))
