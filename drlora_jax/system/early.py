"""Signals from the first moment on: SIGINT and SIGTERM end the process with one line, at once.

Left to Python, Ctrl-C is an exception wherever the main thread happens to be: a traceback inside an
import, ignored inside a callback of jax's, late while C++ compiles. So each command installs these
handlers before it imports anything large (see `drlora_jax/__init__.py`). They raise nothing: they
say in one line what to do and leave. A thread does the same when the main thread is inside C++,
where Python's handlers wait. Nothing is lost by that: a run directory survives kill -9 at any
moment.

Who can do better with a first signal (`stop_signals.py`: save, then stop) takes it with `hold`.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

EXIT_RESUMABLE = 75  # as in errors.py: the same command can be started again
NUMBERS = (signal.SIGTERM, signal.SIGINT)
PATIENCE = 0.5  # seconds that the main thread has to answer a signal itself
ADVICE = "the same command starts again; a training goes on from its last checkpoint"

_is_installed = False
_first: list[int] | None = None  # signals that the thread has left to the holder; None: no holder
_undo: list[Callable[[], None]] = []
_ending = threading.Lock()  # held for good by the thread that ends the process


def install() -> None:
    """Makes SIGINT and SIGTERM end this process with one line, whatever it is doing."""
    global _is_installed
    _open_standard_streams()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for number in NUMBERS:
        signal.signal(number, _hear)
    # Written to at once, in C; the handlers above run when the main thread comes back from there.
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), name="signals", daemon=True).start()
    _is_installed = True


def _open_standard_streams() -> None:
    """What is closed becomes /dev/null: else the next files to be opened, checkpoints among them,
    get these numbers, and whatever is printed ends up in them.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8"))  # noqa: SIM115


def handler() -> Callable | None:
    """The handler, for whoever has replaced it and puts it back; None if it was not installed."""
    return _hear if _is_installed else None


@contextlib.contextmanager
def hold() -> Iterator[None]:
    """Inside, the thread leaves the first signal to the caller's own handlers."""
    global _first
    _first = []
    try:
        yield
    finally:
        _first = None


@contextlib.contextmanager
def undoing(undo: Callable[[], None]) -> Iterator[None]:
    """Inside, a signal calls `undo` before it ends the process."""
    _undo.append(undo)
    try:
        yield
    finally:
        _undo.remove(undo)


@contextlib.contextmanager
def raising() -> Iterator[None]:
    """Inside, Ctrl-C is a KeyboardInterrupt, as where these handlers are not installed."""
    if not _is_installed:
        yield
        return
    with hold():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, _hear)


def end(number: int, *, is_second: bool = False) -> None:
    """Ends this process with one line, unless another thread is about to."""
    if not _ending.acquire(blocking=False):
        return
    name = signal.Signals(number).name
    if is_second:
        line = f"stopped at once by a second signal ({name}), without saving: {ADVICE}\n"
    else:
        line = f"stopped by {name}: {ADVICE}\n"
    with contextlib.suppress(OSError):
        if os.isatty(2):
            line = f"\r\n{line}"  # behind the ^C that the terminal shows
        if os.isatty(1):
            os.write(1, b"\x1b[?25h")  # a progress display hides the cursor
        os.write(2, line.encode())
    for undo in _undo:
        with contextlib.suppress(Exception):
            undo()
    os._exit(EXIT_RESUMABLE)


def _hear(number: int, _frame: object) -> None:
    with contextlib.suppress(Exception):  # the signal may have come inside of a write
        sys.stdout.flush()
    end(number)


def _watch(reader: int) -> None:
    while True:
        for number in os.read(reader, 64):
            if number in NUMBERS:
                _watch_one(number)


def _watch_one(number: int) -> None:
    is_held = _first is not None
    if is_held and not _first:
        _first.append(number)
        return
    time.sleep(PATIENCE)
    end(number, is_second=is_held)
