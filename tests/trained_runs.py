"""Run directories with chosen ranks and random factors, as a training would have left them."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from tiny import MIXTRAL, OLMOE, tiny_config, write_rows, write_tiny_model

from drlora_jax import train as train_lib
from drlora_jax.allocation import CapacityState
from drlora_jax.checkpoint import Checkpoints
from drlora_jax.prepare import prepare

EXPERTS = {"num_experts": 5, "num_local_experts": 5}
# Nothing is square, of fused matrices too: width 24, experts 20, fused 40, queries 2 x 10.
SIZES = {"hidden_size": 24, "intermediate_size": 20, "head_dim": 10}
MODELS = {"olmoe": OLMOE | EXPERTS | SIZES, "mixtral": MIXTRAL | EXPERTS | SIZES}
DENSE = {key: value for key, value in OLMOE.items() if "expert" not in key and "topk" not in key}
MODELS["llama"] = DENSE | SIZES | {"model_type": "llama"}
RANKS_LE = np.array([[1, 8, 3, 0, 5], [4, 0, 2, 7, 1]], np.int32)
STEP = 7


def write_run(
    folder: pathlib.Path,
    family: str,
    targets: tuple[str, ...],
    *,
    has_router: bool = False,
    size: float = 0.3,
    ranks_LE: np.ndarray = RANKS_LE,
    model: pathlib.Path | None = None,
) -> str:
    """A run on a tiny model of a family, with one checkpoint.

    Args:
      size: of the entries of B in active rows; inactive ones are zero, as training leaves them.
      model: the base, where there is one already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = model or write_tiny_model(folder / "model", MODELS[family])
    if not (folder / "train.jsonl").exists():
        write_rows(folder / "train.jsonl", 60)
        write_rows(folder / "heldout.jsonl", 12, seed=1)
    is_dense = family == "llama"
    config = tiny_config(
        folder,
        model=dict(path=str(model)),
        adapter=dict(
            targets=targets,
            kind="lora" if is_dense else "expert_lora",
            router="after_warmup" if has_router else "frozen",
            scale=1.5,
        ),
        allocation=dict(kind="uniform", r_target=8, r_init=1, r_max=8),
    )
    job = prepare(config)
    run = train_lib.build(job)
    position = train_lib.start(run)
    lora = random_factors(position.state.lora, size, None if is_dense else ranks_LE)
    state = position.state._replace(lora=lora)
    capacity = position.capacity
    if not is_dense:
        capacity = CapacityState(ranks_LE)
    job.run_dir.create(config, job.origin, job.schedule_steps)
    checkpoints = Checkpoints(job.run_dir.checkpoints, keep_last=1)
    train_lib.save(run, checkpoints, train_lib.Position(state, capacity, 1), STEP, None)
    checkpoints.close()
    return config.run.dir


def random_factors(lora: dict, size: float, ranks_LE: np.ndarray | None) -> dict:
    """A as it is; B random in active rows; router deltas random."""
    draw = np.random.default_rng(3)

    def leaf(path, value):
        name = path[-1].key
        if name == "a":
            return value
        sample = draw.normal(size=value.shape).astype(np.float32) * size
        if value.ndim == 4:  # [L, E, R, F] of experts; these models have one segment of one layer
            active_LER = np.arange(value.shape[2])[None, None] < ranks_LE[:, :, None]
            sample = np.where(active_LER[..., None], sample, np.float32(0))
        return jax.device_put(jnp.asarray(sample), value.sharding)

    return jax.tree.map_with_path(leaf, lora)
