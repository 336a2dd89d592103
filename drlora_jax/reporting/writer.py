"""Rewrites a run's report during training without delaying its steps."""

import pathlib
import sys
import threading

from drlora_jax.errors import RunError, UserError
from drlora_jax.reporting.page import write_report


class ReportWriter:
    """A thread that writes `report.html` on request; requests during a write cause one more write.
    Leaving its context finishes the last request.

    A report that cannot be written never ends a run: it is reported once, on standard error.

    Args:
      writes: False if another process of the run writes it.
    """

    def __init__(self, directory: pathlib.Path, *, writes: bool = True):
        self._directory, self._writes = directory, writes
        self._wanted, self._ended, self._has_failed = threading.Event(), False, False
        self._thread = threading.Thread(target=self._work, name="report", daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._ended = True
        self._wanted.set()
        self._thread.join()

    def request(self) -> None:
        self._wanted.set()

    def _work(self) -> None:
        is_last = False
        while not is_last:
            self._wanted.wait()
            self._wanted.clear()
            is_last = self._ended  # read before writing: later requests cause one more write
            self._write()

    def _write(self) -> None:
        if not self._writes:
            return
        try:
            write_report([self._directory], self._directory / "report.html")
        except (OSError, UserError, RunError) as error:
            if not self._has_failed:
                print(f"the report could not be written: {error}", file=sys.stderr, flush=True)
            self._has_failed = True
