"""A run on disk: its config, its base, what it resolved, and a checkpoint; nothing is in memory yet."""

import pathlib
from typing import NamedTuple

from drlora_jax.adapters.lora import AdapterSpec
from drlora_jax.checkpoint import choose_step
from drlora_jax.config import TrainConfig, from_dict
from drlora_jax.errors import UserError
from drlora_jax.identity import Resolved
from drlora_jax.interop.hf_files import find_model, fingerprint, read_model_config
from drlora_jax.models.architecture import ModelConfig
from drlora_jax.resolve import make_adapter, with_adapter_experts
from drlora_jax.run_dir import RunDirectory


class RunSource(NamedTuple):
    """What a run's model is made of, found and checked; nothing is read into memory yet."""

    run_dir: pathlib.Path
    config: TrainConfig
    directory: pathlib.Path  # of the base
    base_fingerprint: str
    model_config: ModelConfig
    adapter: AdapterSpec
    checkpoints: pathlib.Path
    step: int
    data_fingerprint: str
    resolved: Resolved | None  # None: the run was made by a version that did not keep it


def find_run(run_dir: str, *, step: str = "latest", model_path: str | None = None) -> RunSource:
    """A run and its base; refuses another base than the one it was trained with."""
    stored = read_stored(run_dir)
    config = from_dict(stored["config"])
    directory = find_model(model_path or config.model.path)
    digest = fingerprint(directory)
    if digest != stored["base_fingerprint"]:
        raise UserError(
            f"{directory} is not the base of {run_dir}: the run's base has fingerprint "
            f"{stored['base_fingerprint'][:12]}, this one {digest[:12]}. Give the right directory "
            "with --model-path."
        )
    checkpoints = RunDirectory(run_dir).checkpoints
    model_config = with_adapter_experts(read_model_config(directory), config.adapter)
    return RunSource(
        run_dir=pathlib.Path(run_dir),
        config=config,
        directory=directory,
        base_fingerprint=digest,
        model_config=model_config,
        adapter=make_adapter(config, model_config),
        checkpoints=checkpoints,
        step=choose_step(checkpoints, step),
        data_fingerprint=stored["data_fingerprint"],
        resolved=Resolved.from_json(stored["resolved"]) if "resolved" in stored else None,
    )


def read_stored(run_dir: str) -> dict:
    """The content of a run's config.json."""
    stored = RunDirectory(run_dir).stored()
    if stored is None:
        raise UserError(
            f"{run_dir} has no finished checkpoint; give the run.dir of a training that saved one."
        )
    return stored


