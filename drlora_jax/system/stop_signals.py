"""Signals that stop a run between two steps."""

import contextlib
import os
import signal
import threading

import jax
from jax.experimental import multihost_utils

from drlora_jax.system import early


class StopSignals:
    """SIGTERM and SIGINT request a stop at the next step; a second one ends the process at once.

    It is used while there is something to save; before and after that `early` handles signals.
    With several processes jax receives SIGTERM, tells the others, and all stop at the same step.
    """

    def __init__(self):
        self._numbers: list[int] = []
        self._before: dict = {}
        self._held = contextlib.ExitStack()

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread may set handlers
        self._held.enter_context(early.hold())
        is_alone = jax.process_count() == 1
        numbers = early.NUMBERS if is_alone else (signal.SIGINT,)
        self._before = {number: signal.signal(number, self._ask) for number in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._held.close()

    def _ask(self, number, _):
        self._numbers.append(number)
        if len(self._numbers) > 1:
            self._end(number)
        elif jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def _end(self, number):
        if early.handler():
            early.end(number, is_second=True)
        signal.signal(number, self._before[number])
        os.kill(os.getpid(), number)

    def reached(self, step: int) -> bool:
        """Returns whether the run stops after this step; call it once after every step."""
        if jax.process_count() == 1:
            return bool(self._numbers)
        return multihost_utils.reached_preemption_sync_point(step)
