"""Reads and writes the files of a run directory except checkpoints: config.json, metrics.jsonl,
ranks.jsonl.

The logs are append-only, one JSON object per line, readable after a kill at any moment. On resume
they are cut back to the restored step, so that a resumed run leaves the same lines as an
uninterrupted one.
"""

import contextlib
import json
import os
import pathlib
import re
import secrets
import shutil
from collections.abc import Sequence

import numpy as np

import drlora_jax
from drlora_jax.config import TrainConfig, to_dict
from drlora_jax.errors import RunError, UserError
from drlora_jax.interop.directories import is_run
from drlora_jax.runs import resume
from drlora_jax.runs.lock import hold_lock
from drlora_jax.runs.sinks import Sink
from drlora_jax.system.paths import (
    ABSENT,
    DIRECTORY,
    FILE,
    kind_of,
    local_path,
    numbered_folders,
    read_json,
    replace_text,
)
from drlora_jax.system.text import format_bytes

# Files that a run writes besides config.json, and would overwrite or mix with existing ones.
WRITTEN = ("metrics.jsonl", "ranks.jsonl", "checkpoints", "report.html", "eval.json", "tensorboard")


class RunDirectory:
    """Reads and writes the files of a run.

    Args:
      writes: whether this process writes; in the others methods that write do nothing.
    """

    def __init__(self, path: str, *, writes: bool = True):
        self.path = local_path(path, "run.dir")
        self._writes = writes
        self.config_file = self.path / "config.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.ranks_file = self.path / "ranks.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.sinks: list[Sink] = []  # receive copies of the rows

    def stored(self) -> dict | None:
        """Returns the content of config.json if this run was started before and has a
        checkpoint.
        """
        kind = kind_of(self.path)
        if kind not in (ABSENT, DIRECTORY):
            raise UserError(f"run.dir={self.path} is {kind}; give a directory, or a new name.")
        if kind_of(self.config_file) == ABSENT:
            self._check_unused()
            return None
        try:
            stored = read_json(self.config_file)
        except UserError as error:
            raise UserError(f"{error} Fix the file, or give a new run.dir.") from error
        if not is_run(stored):
            raise UserError(
                f"run.dir={self.path} is not a run directory: its config.json belongs to something "
                "else or is damaged; give a new directory."
            )
        if kind_of(self.checkpoints) not in (ABSENT, DIRECTORY):
            raise UserError(f"{self.checkpoints} must be a directory; give a new run.dir.")
        # A run that ended before its first checkpoint cannot be resumed.
        return stored if self.has_checkpoint() else None

    def _check_unused(self) -> None:
        """Refuses files that a new run would overwrite. Anything else may stay: logs of the
        launcher, files of a file system or a desktop.
        """
        found = [name for name in WRITTEN if not _is_empty(self.path / name)]
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise UserError(
                f"run.dir={self.path} has {', '.join(found[:3])}{more}, but no config.json of a "
                "run; give a new directory, or move them away."
            )

    def check_place(self) -> None:
        """Refuses a directory that cannot be written."""
        place = self._place()
        kind, is_open = kind_of(place), os.access(place, os.W_OK | os.X_OK)
        if kind != DIRECTORY or not is_open:
            reason = "no permission" if kind == DIRECTORY else f"{place} is {kind}"
            raise UserError(
                f"run.dir={self.path} cannot be written: {reason}; give another directory."
            )

    def check_room(self, checkpoint_bytes: int, keep_last: int) -> None:
        """Refuses a disk without room for the checkpoints: those kept, the best one, and the one
        being written.
        """
        present = len(numbered_folders(self.checkpoints))
        count = max(keep_last + 2 - present, 1)
        free, needed = shutil.disk_usage(self._place()).free, count * checkpoint_bytes
        if free < needed:
            raise UserError(
                f"run.dir={self.path} has {format_bytes(free)} of free space, but the run needs "
                f"{format_bytes(needed)} for {count} checkpoints of "
                f"{format_bytes(checkpoint_bytes)} each. Make room, lower run.keep_last or give "
                "another run.dir."
            )

    def _place(self) -> pathlib.Path:
        """Returns the directory, or the nearest existing one above it."""
        return next(each for each in (self.path, *self.path.parents) if kind_of(each) != ABSENT)

    def locked(self) -> contextlib.AbstractContextManager:
        """Holds the lock for writing; refuses while another live process holds it."""
        return hold_lock(self.path) if self._writes else contextlib.nullcontext()

    def has_checkpoint(self) -> bool:
        return bool(numbered_folders(self.checkpoints))

    def newest_step(self) -> int:
        """Returns the newest step with a checkpoint; 0 if there is none."""
        return max(numbered_folders(self.checkpoints), default=0)

    def check_settings(self, stored: dict, config: TrainConfig) -> None:
        """Refuses to resume with settings that would make it another run; reads no data."""
        resume.check_settings(self.path, stored, config)

    def check_first_ranks(self, stored: dict, config: TrainConfig, ranks_LE: np.ndarray) -> None:
        """Refuses to resume with a file of ranks or exponents that gives other initial ranks."""
        resume.check_first_ranks(self.path, stored, config, ranks_LE.tolist())

    def check_same(
        self,
        stored: dict,
        config: TrainConfig,
        origin: dict[str, str],
        devices: dict | None = None,
    ) -> list[str]:
        """Refuses to resume a run with another config, base model or data; returns lines about
        changes that are allowed.
        """
        resume.check_settings(self.path, stored, config)
        resume.check_content(self.path, stored, config, origin)
        return resume.changed_lines(stored, config, origin, devices)

    def last_rate(self, step: int) -> tuple[int, float] | None:
        """Returns the newest step up to `step` whose learning rate is logged, and the rate."""
        with contextlib.suppress(OSError):
            if kind_of(self.metrics_file) == FILE:
                text = self.metrics_file.read_text(encoding="utf-8", errors="replace")
                for line in reversed(text.splitlines()):
                    row = json.loads(line) if _is_kept(line, step) else {}
                    if isinstance(row.get("learning_rate"), float):
                        return row["step"], row["learning_rate"]
        return None

    def create(
        self,
        config: TrainConfig,
        origin: dict[str, str],
        schedule_steps: int,
        made_with: dict | None = None,
    ) -> None:
        """Writes config.json; `schedule_steps` fixes the growth schedule for good, `made_with` is
        only a record.
        """
        if not self._writes:
            return
        values = {
            "config": to_dict(config),
            **origin,
            "run_id": secrets.token_hex(8),  # distinguishes the checkpoints of other runs
            "schedule_steps": schedule_steps,
            "version": drlora_jax.__version__,
            **(made_with or {}),
        }
        if self.has_checkpoint():  # written after our check
            raise UserError(
                f"run.dir={self.path} has meanwhile been started by another process; run the same "
                "command again to resume from its checkpoint."
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            text = json.dumps(values, indent=2) + "\n"
            # Lists of numbers become one line; JSON strings never contain a line break.
            text = re.sub(r"\[\n[\d\s,]+\]", lambda found: " ".join(found[0].split()), text)
            replace_text(self.config_file, text)
        except OSError as error:
            raise UserError(f"run.dir={self.path} cannot be written: {error.strerror}.") from error

    def cut_back(self, step: int, log_every: int) -> list[str]:
        """Drops the lines of both logs that are later than `step`; all of them if `step` is 0.

        Returns:
          Notes about lines that are lost.
        """
        if not self._writes:
            return []
        last, notes, steps_before = step if step else -1, [], []
        for file in (self.metrics_file, self.ranks_file):
            kind = kind_of(file)
            if kind == ABSENT:
                continue
            if kind != FILE:  # reading a device might never end
                raise RunError(f"{file} must be a file, but it is {kind}; give a new run.dir.")
            try:
                lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
                kept = [line for line in lines if _is_kept(line, last)]
                steps_before += filter(None, map(_step_of, lines))
                if step and (count := sum(_step_of(line) is None for line in lines)):
                    what = "lines that cannot be read are" if count > 1 else "unreadable line is"
                    notes.append(f"{file}: {count} {what} dropped")
                replace_text(file, "".join(line + "\n" for line in kept))
            except OSError as error:
                message = f"{file} cannot be cut back to step {step}: {error.strerror}."
                raise RunError(message) from error
        if not step and steps_before:
            notes.append(
                f"{self.path} has no checkpoint: its log up to step {max(steps_before)} is dropped"
            )
        first = self._newest_row() + 1
        if step - first + 1 >= log_every:
            steps = f"steps {first} to {step}" if first < step else f"step {step}"
            notes.append(f"{self.metrics_file} has no row of {steps}")
        return notes

    def _newest_row(self) -> int:
        """Returns the newest step of metrics.jsonl after it was cut back; 0 if there is none."""
        if kind_of(self.metrics_file) == ABSENT:
            return 0
        lines = self.metrics_file.read_text(encoding="utf-8").splitlines()
        return _step_of(lines[-1]) or 0 if lines else 0

    def log_metrics(self, values: dict) -> None:
        if not self._writes:
            return
        _append(self.metrics_file, values)
        for sink in self.sinks:
            sink.metrics(values)

    def log_ranks(
        self,
        step: int,
        layers,
        ranks_LE: np.ndarray,
        saliency_LE: np.ndarray,
        budget: int | Sequence[int],
        more: dict | None = None,
    ) -> None:
        """Appends a row to ranks.jsonl; the fields of `more` are added unchanged."""
        if not self._writes:
            return
        values = {
            "step": step,
            "layers": list(layers),
            "ranks": ranks_LE.tolist(),
            "saliency": [[float(f"{value:.6g}") for value in row] for row in saliency_LE],
            "budget": budget,
            **(more or {}),
        }
        _append(self.ranks_file, values)
        for sink in self.sinks:
            sink.ranks(values)


def _is_empty(path: pathlib.Path) -> bool:
    """Returns whether nothing is there, or only what a run leaves that is killed before it writes
    its config.
    """
    kind = kind_of(path)
    if kind != DIRECTORY:
        return kind == ABSENT
    try:
        return not any(path.iterdir())
    except OSError:  # no permission to list it
        return False


def _is_kept(line: str, step: int) -> bool:
    found = _step_of(line)
    return found is not None and found <= step


def _step_of(line: str) -> int | None:
    """Returns the step of a line; None for a line that a kill cut short or that is not ours."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if type(step) is int else None


def _append(file: pathlib.Path, values: dict) -> None:
    try:
        with file.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(values, allow_nan=False) + "\n")
    except OSError as error:
        raise RunError(f"{file} cannot be written: {error.strerror}.") from error
