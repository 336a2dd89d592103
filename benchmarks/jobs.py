"""Jobs without files: what a benchmark builds a step from."""

import json
import pathlib

from drlora_jax import prepare
from drlora_jax.allocation import make_policy
from drlora_jax.config import TrainConfig
from drlora_jax.errors import UserError
from drlora_jax.models.families import parse_config
from drlora_jax.parallel import mesh as mesh_lib

MODELS = pathlib.Path(__file__).parent / "models"


def model_values(model: str | None, config: TrainConfig) -> dict:
    """A config.json: of a file or directory, or the published one that `model.path` names."""
    name = config.model.path.rsplit("/", 1)[-1]
    file = pathlib.Path(model) if model else MODELS / f"{name}.json"
    file = file / "config.json" if file.is_dir() else file
    if not file.is_file():
        known = ", ".join(sorted(each.stem for each in MODELS.glob("*.json")))
        raise UserError(f"There is no {file}; give --model config.json, or one of {known}.")
    return json.loads(file.read_text())


def abstract_job(config: TrainConfig, values: dict, device_count: int) -> prepare.Job:
    """The job of a config without files: no data, weights, tokenizer or run directory."""
    model_config = prepare.with_adapter_experts(parse_config(values), config.adapter)
    adapter = prepare.make_adapter(config, model_config)
    sizes = mesh_lib.resolve_sizes(config.mesh, device_count)
    prepare.check_mesh(config, model_config, sizes)
    steps = config.train.steps
    if steps is None:
        raise UserError("Set train.steps: without data there are no epochs to count.")
    shapes = prepare.capacity_shapes(config, model_config, adapter)
    return prepare.Job(
        config=config,
        run_dir=None,
        is_new=True,
        directory=None,
        origin={},
        model_config=model_config,
        adapter=adapter,
        policy=make_policy(config, shapes, steps),
        loader=None,
        eval_batches=[],
        mesh_sizes=sizes,
        total_steps=steps,
        schedule_steps=steps,
        lines=[],
    )
