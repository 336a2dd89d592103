"""The files of a run directory that are not checkpoints: config.json, metrics.jsonl, ranks.jsonl.

The logs are append-only, one JSON object a line, readable after a kill at any moment. On resume
they are cut back to the restored step, so that a resumed run leaves the same lines as an
uninterrupted one.
"""

import json
import os
import pathlib

import numpy as np

import drlora_jax
from drlora_jax.config import TrainConfig, to_dict
from drlora_jax.errors import RunError, UserError

# What may change between the runs of one directory: where things are and how fast, not what is
# learned.
MAY_CHANGE = {
    "train.steps",
    "train.epochs",
    "model.path",
    "run.dir",
    "run.log_every",
    "run.checkpoint_every",
}
MAY_CHANGE |= {"run.keep_last", "mesh.data", "mesh.fsdp", "mesh.expert", "mesh.tensor"}


class RunDirectory:
    def __init__(self, path: str):
        self.path = pathlib.Path(path)
        self.config_file = self.path / "config.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.ranks_file = self.path / "ranks.jsonl"
        self.checkpoints = self.path / "checkpoints"

    def stored(self) -> dict | None:
        """The content of config.json, if a run was created here."""
        if not self.config_file.is_file():
            if self.path.is_dir() and any(file.suffix != ".tmp" for file in self.path.iterdir()):
                raise UserError(
                    f"run.dir={self.path} holds other files and no config.json; give a new "
                    f"directory."
                )
            return None
        try:
            stored = json.loads(self.config_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            message = f"{self.config_file} can not be read: {error}. Give a new run.dir."
            raise UserError(message) from error
        needed = {"config", "base_fingerprint", "data_fingerprint", "schedule_steps"}
        if not isinstance(stored, dict) or not needed <= stored.keys():
            raise UserError(f"run.dir={self.path} is not a run directory; give a new one.")
        # A run that was ended before its first checkpoint has nothing to be continued with.
        return stored if self.has_checkpoint() else None

    def has_checkpoint(self) -> bool:
        names = [entry.name for entry in self.checkpoints.glob("*")]
        return any(name.isdigit() for name in names)

    def check_same(self, stored: dict, config: TrainConfig, origin: dict[str, str]) -> None:
        """Refuses to resume a run of another config, base or data."""
        before, now = _flat(stored["config"]), _flat(to_dict(config))
        changed = sorted(name for name in now if before.get(name) != now[name])
        changed = [name for name in changed if name not in MAY_CHANGE]
        if changed:
            name = changed[0]
            more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
            raise UserError(
                f"run.dir={self.path} was made with {name}={before.get(name)}, got "
                f"{now[name]}{more}; "
                "on resume only train.steps, the mesh and places may change: undo it or give a new "
                "run.dir."
            )
        for name, what in (("base_fingerprint", "model.path"), ("data_fingerprint", "data.path")):
            if stored[name] != origin[name]:
                value = getattr(config, what.split(".")[0]).path
                raise UserError(
                    f"run.dir={self.path} was made with other content than {what}={value} has now "
                    f"({name} {stored[name][:12]}, got {origin[name][:12]}): another base or other "
                    "rows; give the same or a new run.dir."
                )

    def create(self, config: TrainConfig, origin: dict[str, str], schedule_steps: int) -> None:
        """Writes config.json; `schedule_steps` fixes the growth schedule for good."""
        values = {
            "config": to_dict(config),
            **origin,
            "schedule_steps": schedule_steps,
            "version": drlora_jax.__version__,
        }
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            _write_atomically(self.config_file, json.dumps(values, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"run.dir={self.path} can not be written: {error.strerror}.") from error

    def cut_back(self, step: int) -> None:
        """Drops the lines of both logs that are later than `step`; all of them for a start at 0."""
        last = step if step else -1
        for file in (self.metrics_file, self.ranks_file):
            if file.is_file():
                lines = file.read_text(encoding="utf-8").splitlines()
                kept = [line for line in lines if _is_kept(line, last)]
                _write_atomically(file, "".join(line + "\n" for line in kept))

    def log_metrics(self, values: dict) -> None:
        _append(self.metrics_file, values)

    def log_ranks(
        self, step: int, layers, ranks_LE: np.ndarray, saliency_LE: np.ndarray, budget: int
    ) -> None:
        values = {
            "step": step,
            "layers": list(layers),
            "ranks": ranks_LE.tolist(),
            "saliency": [[float(f"{value:.6g}") for value in row] for row in saliency_LE],
            "budget": budget,
        }
        _append(self.ranks_file, values)


def _flat(config: dict) -> dict:
    flat = {f"{s}.{name}": value for s, fields in config.items() for name, value in fields.items()}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in flat.items()}


def _is_kept(line: str, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, KeyError):  # the line that a kill cut short
        return False


def _append(file: pathlib.Path, values: dict) -> None:
    try:
        with file.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(values, allow_nan=False) + "\n")
    except OSError as error:
        raise RunError(f"{file} can not be written: {error.strerror}.") from error


def _write_atomically(file: pathlib.Path, text: str) -> None:
    draft = file.with_suffix(file.suffix + ".tmp")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, file)
