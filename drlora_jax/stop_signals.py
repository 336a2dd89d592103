"""Signals that stop a run between two steps."""

import os
import signal
import threading

import jax
from jax.experimental import multihost_utils


class StopSignals:
    """SIGTERM and SIGINT ask for a stop at the next step; a second one ends the process at once.

    With several processes jax hears SIGTERM, tells the others, and all stop at the same step.
    """

    def __init__(self):
        self._numbers: list[int] = []
        self._before: dict = {}

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread may set handlers
        is_alone = jax.process_count() == 1
        numbers = (signal.SIGTERM, signal.SIGINT) if is_alone else (signal.SIGINT,)
        ask = self._ask if is_alone else self._ask_all
        self._before = {number: signal.signal(number, ask) for number in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number, _):
        self._numbers.append(number)
        signal.signal(number, self._before[number])

    def _ask_all(self, number, _):
        signal.signal(number, self._before[number])
        os.kill(os.getpid(), signal.SIGTERM)

    def reached(self, step: int) -> bool:
        """Whether the run is to stop after this step; to be asked once after every step."""
        if jax.process_count() == 1:
            return bool(self._numbers)
        return multihost_utils.reached_preemption_sync_point(step)
