"""Handles signals from the start: SIGINT and SIGTERM end the process at once, with one line.

By default, Ctrl-C raises an exception wherever the main thread happens to be: a traceback inside an
import, ignored inside a jax callback, late while C++ compiles. So each command installs these
handlers before it imports anything large (see `drlora_jax/__init__.py`). They raise nothing: they
print one line on what to do and exit. A thread does the same when the main thread is inside C++,
where Python's handlers wait. Nothing is lost: a run directory survives kill -9 at any moment.

Code that can do better with a first signal (`stop_signals.py`: save, then stop) uses `hold`.
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
ADVICE = "run the same command again; training resumes from the last checkpoint"

_is_installed = False
_first: list[int] | None = None  # signals that the thread left to the holder; None: no holder
_undo: list[Callable[[], None]] = []
_ending = threading.Lock()  # acquired by the thread that ends the process, never released


def install() -> None:
    """Makes SIGINT and SIGTERM end this process with one line, whatever it is doing."""
    global _is_installed
    _open_standard_streams()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for number in NUMBERS:
        signal.signal(number, _hear)
    # C writes to it at once; the handlers above run only when the main thread is back in Python.
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), name="signals", daemon=True).start()
    _is_installed = True


def _open_standard_streams() -> None:
    """Opens closed standard streams on /dev/null: otherwise the next files to be opened,
    checkpoints among them, would get their numbers and receive whatever is printed.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # receives the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8"))  # noqa: SIM115


def handler() -> Callable | None:
    """Returns the handler, for callers that replace it and put it back; None if it is not
    installed.
    """
    return _hear if _is_installed else None


@contextlib.contextmanager
def hold() -> Iterator[None]:
    """Leaves the first signal to the caller's own handlers."""
    global _first
    _first = []
    try:
        yield
    finally:
        _first = None


@contextlib.contextmanager
def undoing(undo: Callable[[], None]) -> Iterator[None]:
    """Calls `undo` if a signal ends the process inside this context."""
    _undo.append(undo)
    try:
        yield
    finally:
        _undo.remove(undo)


@contextlib.contextmanager
def raising() -> Iterator[None]:
    """Raises KeyboardInterrupt on Ctrl-C inside this context, as without these handlers."""
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
        line = f"stopped at once by a second signal ({name}) without saving: {ADVICE}\n"
    else:
        line = f"stopped by {name}: {ADVICE}\n"
    with contextlib.suppress(OSError):
        if os.isatty(2):
            line = f"\r\n{line}"  # below the ^C that the terminal shows
        if os.isatty(1):
            os.write(1, b"\x1b[?25h")  # a progress display hides the cursor
        os.write(2, line.encode())
    for undo in _undo:
        with contextlib.suppress(Exception):
            undo()
    os._exit(EXIT_RESUMABLE)


def _hear(number: int, _frame: object) -> None:
    with contextlib.suppress(Exception):  # the signal may have arrived inside a write
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
