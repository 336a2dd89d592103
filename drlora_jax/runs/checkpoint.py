"""Saves and restores the checkpoints of a run with Orbax.

A checkpoint is one pytree of arrays (the train state, or parameters and optimizer state in
pretraining) and one small JSON of host values: the history of ranks is in `ranks.jsonl`, positions
and counters are here. Saving is asynchronous; Orbax renames a finished checkpoint into place, so a
killed run keeps the previous one.

The JSON also names the run and step of the checkpoint, and has the checksums of all arrays
(`checksums.py`). Every restore verifies them. A damaged checkpoint is skipped in favour of the next
older one; a training also renames it to `damaged-STEP`.
"""

import contextlib
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from drlora_jax.errors import RunError, UserError
from drlora_jax.parallel import processes
from drlora_jax.runs import checksums
from drlora_jax.runs.checkpoint_read import (
    Damaged,
    Restored,
    best_step,
    eval_loss,
    first_good,
    read,
    reason_of,
    saved_steps,
    say,
    without_empty,
)
from drlora_jax.runs.identity import identity_of
from drlora_jax.system.paths import ABSENT, kind_of, read_json

# Raised by Orbax and TensorStore when a disk is full or a file cannot be written.
WRITE_ERRORS = (OSError, ValueError, RuntimeError)


class Checkpoints:
    """The checkpoints of one run: the newest `keep_last` and the best by eval loss are kept.

    The run's directory, with its config.json, is the parent of `directory`.
    """

    def __init__(self, directory: pathlib.Path, *, keep_last: int):
        self._directory, self._keep_last = directory, keep_last
        self._saving: Any = None  # Orbax's response for the save in flight
        self._last: int | None = None  # the last step that was saved
        self._losses = {step: eval_loss(directory, step) for step in saved_steps(directory)}
        self._checkpointer = self._open()

    def _open(self):
        try:
            _hide_unreadable_metrics(self._directory)
            return ocp.training.Checkpointer(
                self._directory.absolute(),
                preservation_policy=_Preservation(self._keep_last, self._losses),
                cleanup_tmp_directories=True,
            )
        except WRITE_ERRORS as error:
            reason = reason_of(error)
            raise RunError(
                f"Cannot open the checkpoint directory {self._directory}: {reason}"
            ) from error

    def latest_step(self) -> int | None:
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def steps(self) -> list[int]:
        return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

    def save(self, step: int, state: Any, host: dict, *, eval_loss: float | None = None) -> None:
        """Copies the state to the host, then writes it in the background. First waits for the
        previous save and reports its failure.
        """
        if step in self.steps():
            return
        self.finish()
        state = without_empty(state)
        with _reporting(step):
            values = {**host, "step": step, **identity_of(self._directory.parent)}
            values |= {"eval_loss": eval_loss, "arrays": checksums.hash_arrays(state)}
            self._losses[step], self._last = eval_loss, step
            self._saving = self._checkpointer.save_async(
                step, state, custom_metadata=checksums.seal(values), force=True
            )

    def finish(self) -> None:
        """Waits for the save in flight and reports its failure."""
        saving, self._saving = self._saving, None
        if saving is not None:
            with _reporting(self._last):
                saving.result()  # also ends Orbax's thread and event loop of this save

    def restore(self, step: int, abstract: Any, host_names: Sequence[str] = ()) -> tuple[Any, dict]:
        """Restores the state onto the shardings of `abstract` (tree of `jax.ShapeDtypeStruct`), and
        the host values, which must include `host_names`.
        """
        self.finish()
        found, _ = self._first_good([step], abstract, host_names, lambda state: step)
        return found.state, found.host

    def restore_newest(
        self,
        abstract: Any,
        host_names: Sequence[str] = (),
        step_of: Callable[[Any], int] | None = None,
    ) -> Restored | None:
        """Restores the newest checkpoint that is intact; returns None if there is no checkpoint.
        Newer ones that are damaged are renamed.

        Args:
          step_of: reads the step from a state, if the state has it.
        """
        steps = self.steps()[::-1]
        if not steps:
            return None
        found, damaged = self._first_good(steps, abstract, host_names, step_of)
        if damaged:
            self._set_aside(damaged, found.step)
        return found

    def _first_good(self, steps, abstract, host_names, step_of) -> tuple[Restored, dict[int, str]]:
        def read_step(step):
            found = read(self._directory, step, abstract, host_names)
            if step_of is not None and step_of(found.state) != step:
                raise Damaged(f"it holds step {step_of(found.state)}")
            return found

        return first_good(self._directory, steps, read_step)

    def _set_aside(self, damaged: dict[int, str], used: int) -> None:
        for step, reason in damaged.items():
            self._losses.pop(step, None)
            if processes.is_main():
                name = _rename_damaged(self._directory, step)
                say(
                    f"checkpoint {step} of {self._directory} is damaged ({reason}) and renamed to "
                    f"{name}; the run resumes from checkpoint {used}"
                )
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are set aside")
        self._checkpointer.close()
        self._checkpointer = self._open()

    def close(self) -> None:
        """Waits for the save in flight and reports its failure."""
        try:
            self.finish()
        finally:
            with _reporting(self._last):  # Orbax reports a failure once more
                self._checkpointer.close()


class _Preservation(NamedTuple):
    """Orbax's protocol for which checkpoints are kept."""

    keep_last: int
    losses: dict[int, float | None]

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        del context
        steps = sorted(checkpoint.step for checkpoint in checkpoints)
        kept = {*steps[-self.keep_last :], best_step(steps, self.losses)}
        return [checkpoint.step in kept for checkpoint in checkpoints]


@contextlib.contextmanager
def _reporting(step: int | None) -> Iterator[None]:
    """Turns a failed write into one message that names the step it belongs to."""
    try:
        yield
    except WRITE_ERRORS as error:
        if processes.is_lost_peer(error):  # not a failed write: the caller ends with the others
            raise
        reason = reason_of(error)
        raise RunError(f"The checkpoint of step {step} could not be written: {reason}") from error


def _rename_damaged(directory: pathlib.Path, step: int) -> str:
    """Renames a checkpoint to a name that is no step; returns the name."""
    place, count = directory / f"damaged-{step}", 1
    while place.exists():
        count += 1
        place = directory / f"damaged-{step}-{count}"
    try:
        (directory / str(step)).rename(place)
    except OSError as error:
        raise RunError(
            f"The damaged checkpoint {directory / str(step)} could not be renamed to "
            f"{place.name}: {error.strerror}."
        ) from error
    return place.name


def _hide_unreadable_metrics(directory: pathlib.Path) -> None:
    """Renames files of older versions that Orbax would fail to read: they are not needed."""
    if not processes.is_main():
        return
    for place in directory.glob("*/metrics"):
        if kind_of(place / "metrics") == ABSENT:
            continue
        try:
            read_json(place / "metrics")
        except UserError:
            place.rename(place.with_name("damaged-metrics"))
