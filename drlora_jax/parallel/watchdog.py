"""Ends a process of a run whose peers are alive but stuck.

A collective waits for all its processes without a limit: one host that hangs in a read blocks all
others, while jax's own heartbeat finds every process alive. Each process therefore reports what it
is doing to its own watchdog and to its peers. When nothing has progressed for `timeout` seconds,
the watchdog prints what every process was doing and this process's stacks, and ends the process.
"""

import faulthandler
import os
import sys
import threading
import time

import jax
from jax._src import distributed  # the store of the coordination service has no public name

from drlora_jax.errors import EXIT_RESUMABLE

PREFIX = "drlora_jax/doing"


class Watchdog:
    """Runs a thread that ends the process when `beat` has not been called for `timeout` seconds.

    A context manager. It does nothing if there is only one process.
    """

    def __init__(self, timeout: float):
        self._timeout = timeout
        self._doing, self._since = "starting", time.monotonic()
        self._told = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self):
        if jax.process_count() > 1:
            self._thread.start()
        return self

    def __exit__(self, *_):
        self._ended.set()

    def beat(self, doing: str) -> None:
        """Reports that the last activity has finished and `doing` comes next."""
        self._doing, self._since = doing, time.monotonic()

    def again(self) -> None:
        """Reports progress of the current activity."""
        self._since = time.monotonic()

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._timeout / 4)):
            self._tell()
            waited = time.monotonic() - self._since
            if waited > self._timeout:
                self._end(waited)

    def _tell(self) -> None:
        doing = self._doing
        if doing != self._told:
            key = f"{PREFIX}/{jax.process_index()}"
            distributed.global_state.client.key_value_set(key, doing, allow_overwrite=True)
            self._told = doing

    def _end(self, waited: float) -> None:
        others = distributed.global_state.client.key_value_dir_get(PREFIX)
        places = sorted((int(key.rsplit("/", 1)[1]), doing) for key, doing in others)
        where = ", ".join(f"process {index}: {doing}" for index, doing in places)
        print(
            f"failed: no progress for {waited:.0f} s (run.stall_timeout) in process "
            f"{jax.process_index()}. Last reports: {where}. The stacks below are this process's. "
            "The same command, started on all hosts, resumes from the last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(file=sys.stderr)
        os._exit(EXIT_RESUMABLE)
