"""Finds a run on disk: config, base model, resolved settings and checkpoint, loading nothing."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from drlora_jax.config import TrainConfig, from_dict
from drlora_jax.config.resolve import make_adapter
from drlora_jax.errors import UserError
from drlora_jax.interop.directories import read_run
from drlora_jax.interop.hf_files import find_model, fingerprint, read_model_config, same_base
from drlora_jax.models.architecture import ModelConfig
from drlora_jax.models.placement import Placement
from drlora_jax.runs.checkpoint_read import choose_steps
from drlora_jax.runs.directory import RunDirectory
from drlora_jax.runs.resolved import Resolved
from drlora_jax.system.paths import ABSENT, DIRECTORY, kind_of, local_path


class RunSource(NamedTuple):
    """The parts of a run's model, found and checked, but not loaded."""

    run_dir: pathlib.Path
    config: TrainConfig
    directory: pathlib.Path  # of the base model
    base_fingerprint: str
    model_config: ModelConfig
    adapter: Placement
    checkpoints: pathlib.Path
    steps: tuple[int, ...]  # the first that is not damaged is used
    data_fingerprint: str
    resolved: Resolved | None  # None: written by a version that did not store it

    @property
    def step(self) -> int:
        return self.steps[0]

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """The model layer index of every layer with experts, the base model's or the adapter's."""
        return self.adapter.expert_layers(self.model_config)


def find_run(
    run_dir: str, *, step: str | Sequence[int] = "latest", model_path: str | None = None
) -> RunSource:
    """Finds a run and its base model; refuses a base model that it was not trained with."""
    stored = read_stored(run_dir)
    config = from_dict(stored["config"])
    resolved = Resolved.from_json(stored["resolved"]) if "resolved" in stored else None
    directory = _find_base(run_dir, resolved, config.model.path, model_path)
    if not same_base(stored, directory):
        raise UserError(
            f"{directory} is not the base model of {run_dir}: the run's base model has fingerprint "
            f"{stored['base_fingerprint'][:12]}, this one {fingerprint(directory)[:12]}. Give the "
            "right directory with --model-path."
        )
    checkpoints = RunDirectory(run_dir).checkpoints
    model_config = read_model_config(directory)
    return RunSource(
        run_dir=local_path(run_dir, "--run"),
        config=config,
        directory=directory,
        base_fingerprint=stored["base_fingerprint"],
        model_config=model_config,
        adapter=make_adapter(config, model_config),
        checkpoints=checkpoints,
        steps=choose_steps(checkpoints, step),
        data_fingerprint=stored["data_fingerprint"],
        resolved=resolved,
    )


def _find_base(
    run_dir: str, resolved: Resolved | None, path: str, model_path: str | None
) -> pathlib.Path:
    """Finds the base model that a run names, in its stored revision, or the one of
    `--model-path`.
    """
    if model_path is not None:
        return find_model(model_path, option="--model-path")
    try:
        return find_model(path, revision=resolved.model_revision if resolved else None)
    except UserError as error:
        is_relative = not pathlib.PurePath(path).is_absolute() and ":" not in path
        where = ", relative to the folder where it was started" if is_relative else ""
        raise UserError(
            f"{error} This is the base model's path in the training of {run_dir}{where}; give its "
            "present path with --model-path."
        ) from error


def read_stored(run_dir: str) -> dict:
    """Returns the content of a run's config.json; explains what a directory is that is no run."""
    directory = local_path(run_dir, "--run")
    stored = read_run(directory, f"--run {run_dir}")
    run = RunDirectory(str(directory))
    if kind_of(run.checkpoints) not in (ABSENT, DIRECTORY):
        raise UserError(f"{run.checkpoints} must be a directory of checkpoints. Is it damaged?")
    if not run.has_checkpoint():
        raise UserError(
            f"{run_dir} has no finished checkpoint; give the run.dir of a training that has one."
        )
    return stored
