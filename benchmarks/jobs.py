"""Builds jobs without files for benchmarks, and steps on random numbers."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from drlora_jax import train
from drlora_jax.config import TrainConfig, resolve
from drlora_jax.data.loader import Batch
from drlora_jax.errors import UserError
from drlora_jax.interop.hf_files import find_model
from drlora_jax.models.families import parse_config
from drlora_jax.models.transformer import init_variables
from drlora_jax.parallel import mesh as mesh_lib
from drlora_jax.parallel.mesh_checks import check_mesh
from drlora_jax.system.host_memory import keep_freed_memory, run_on_calling_thread
from drlora_jax.training import job
from drlora_jax.training.memory import bytes_on_one_device, predicted_step_bytes
from drlora_jax.training.program import memory_layout
from drlora_jax.training.state import start

MODELS = pathlib.Path(__file__).parent / "models"


def model_values(model: str | None, config: TrainConfig) -> dict:
    """Returns a config.json: of a file or directory, or the published or bundled one that
    `model.path` names.
    """
    name = config.model.path.rsplit("/", 1)[-1]
    file = pathlib.Path(model) if model else MODELS / f"{name}.json"
    if not model and name.startswith("bundled:"):
        file = find_model(name)
    file = file / "config.json" if file.is_dir() else file
    if not file.is_file():
        known = ", ".join(sorted(each.stem for each in MODELS.glob("*.json")))
        raise UserError(f"There is no {file}; give --model config.json, or one of {known}.")
    return json.loads(file.read_text())


def abstract_job(config: TrainConfig, values: dict, device_count: int) -> job.Job:
    """Returns the job of a config without files: no data, weights, tokenizer or run directory."""
    model_config = parse_config(values)
    adapter = resolve.make_adapter(config, model_config)
    sizes = mesh_lib.resolve_sizes(config.mesh, device_count)
    check_mesh(config, model_config, sizes)
    steps = config.train.steps
    if steps is None:
        raise UserError("Set train.steps: without data there are no epochs to count.")
    shapes = resolve.capacity_shapes(model_config, adapter)
    return job.Job(
        config=config,
        run_dir=None,
        is_new=True,
        directory=None,
        origin={},
        model_config=model_config,
        adapter=adapter,
        policy=resolve.make_policy(config, shapes, steps),
        loader=None,
        eval_batches=[],
        mesh_sizes=sizes,
        total_steps=steps,
        schedule_steps=steps,
        lines=[],
    )


def forecast_bytes(run: train.Run) -> int:
    """Returns the total bytes that are forecast before compiling."""
    layout, lora = memory_layout(run.job, run.mesh, run.experts), run.abstract_state.lora
    added = predicted_step_bytes(
        run.job.model_config, layout, bytes_on_one_device(lora), run.job.config.model.remat
    )
    return bytes_on_one_device((run.abstract_params, run.abstract_state)) + added


class Step:
    """A run's training step on one device, compiled, with weights, state and a batch of random
    numbers, in a process like that of a training. A call takes a step and returns its metrics.
    """

    def __init__(self, config: TrainConfig, values: dict, params=None):
        run_on_calling_thread()
        self.run = train.build(abstract_job(config, values, 1), jax.devices()[:1])
        self.compiled, self.compile_seconds = train.compile_step(self.run)
        keep_freed_memory(jax.default_backend())
        self.params = random_params(self.run) if params is None else params
        self.state = start(self.run).state
        self.batch = jax.device_put(random_batch(config, values["vocab_size"]))

    def __call__(self) -> dict:
        self.state, metrics = self.compiled(self.params, self.state, self.batch)
        return metrics

    @property
    def added_bytes(self) -> int:
        """What the compiled step takes besides its inputs and outputs."""
        return self.compiled.memory_analysis().temp_size_in_bytes


def random_params(run: train.Run) -> dict:
    """Returns random weights in the run's own dtypes, never all of them in another dtype."""

    def make(key):
        params = init_variables(run.model, key)["params"]
        return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), params, run.abstract_params)

    return jax.jit(make)(jax.random.key(0))


def random_batch(config: TrainConfig, vocab: int) -> Batch:
    """Returns rows of one document each; equal sizes give equal rows."""
    section = config.train
    shape = (section.micro_batches, section.batch_size // section.micro_batches)
    shape = (*shape, section.sequence_length)
    ids = np.random.default_rng(0).integers(2, vocab, size=shape).astype(np.int32)
    ones = np.ones(shape, np.int32)
    positions = np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape)
    arrays = (ids, np.roll(ids, -1, axis=2), ones, positions, np.ones(shape, np.float32))
    return Batch(*map(jnp.asarray, arrays))
