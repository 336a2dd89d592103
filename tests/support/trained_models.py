"""Trained adapters with chosen ranks and random factors, and run directories that hold them."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from drlora_jax import train as train_lib
from drlora_jax.adapters.rank_trees import masks_tree
from drlora_jax.adapters.registry import PLACEMENTS
from drlora_jax.adapters.targets import resolve_targets
from drlora_jax.allocation import CapacityState, masks_from_ranks
from drlora_jax.interop.export_check import Trained
from drlora_jax.interop.hf_files import read_model_config
from drlora_jax.interop.lora_tables import layer_updates
from drlora_jax.models.options import DecoderOptions
from drlora_jax.models.transformer import Decoder
from drlora_jax.runs.checkpoint import Checkpoints
from drlora_jax.training.job import prepare
from drlora_jax.training.state import start
from drlora_jax.training.step import init_lora
from tests.support.tiny import MIXTRAL, OLMOE, tiny_config, write_rows, write_tiny_model

# No expert matrix is square, fused ones neither: width 24, experts 20 wide, fused 40.
SIZES = {"hidden_size": 24, "intermediate_size": 20}
WIDE_HEADS = {"head_dim": 10}  # OLMoE has no such field: its heads share the width
EXPERTS = {"num_experts": 5, "num_local_experts": 5}
DENSE = {key: value for key, value in OLMOE.items() if "expert" not in key and "topk" not in key}
MODELS = {
    "olmoe": OLMOE | EXPERTS | SIZES,
    "mixtral": MIXTRAL | EXPERTS | SIZES | WIDE_HEADS,
    "llama": DENSE | SIZES | WIDE_HEADS | {"model_type": "llama", "rms_norm_eps": 1e-5},
}
MAX_RANK, PLAIN_RANK, SCALE = 8, 3, 1.5
RANKS_LE = np.array([[1, 8, 3, 0, 5], [4, 0, 2, 7, 1]], np.int32)
STEP = 7


def make_trained(
    directory: pathlib.Path, targets: tuple[str, ...], *, has_router=False, size=0.3
) -> Trained:
    """An adapter of the model in `directory`, with unequal ranks 0 to 8.

    Args:
      size: standard deviation of B in active rows.
    """
    config = read_model_config(directory)
    kind = "expert_lora" if config.moe else "lora"
    paths = resolve_targets(config, kind, targets)
    routers = {"train_router": has_router} if config.moe else {}
    ranks = {"rank": PLAIN_RANK, "max_rank": MAX_RANK}
    adapter = PLACEMENTS[kind](paths=paths, scale=SCALE, **ranks, **routers)
    ranks_LE = RANKS_LE if config.moe else np.zeros((0, 0), np.int32)
    model = Decoder(config, DecoderOptions(adapter=adapter))
    shapes = jax.eval_shape(lambda: init_lora(model, jax.random.key(0)))
    lora = random_factors(shapes, size, ranks_LE)
    mask_LER = masks_from_ranks(ranks_LE, MAX_RANK)
    gates = jax.device_get(masks_tree(model, jnp.asarray(mask_LER)))
    return Trained(config, adapter, lora, gates, layer_updates(config, adapter, lora, ranks_LE))


def random_factors(shapes: dict, size: float, ranks_LE: np.ndarray) -> dict:
    """A everywhere, also in inactive rows; B in active rows; router deltas."""
    draw = np.random.default_rng(3)

    def leaf(path, value):
        sample = draw.normal(size=value.shape).astype(np.float32)
        if path[-1].key == "a":
            return sample * np.float32(value.shape[-1] ** -0.5)
        if value.ndim == 4:  # [L, E, R, F] of experts: these models are one segment of equal layers
            is_active_LER = np.arange(value.shape[2])[None, None] < ranks_LE[:, :, None]
            sample = np.where(is_active_LER[..., None], sample, np.float32(0))
        return sample * np.float32(size)

    return jax.tree.map_with_path(leaf, shapes)


def write_run(folder: pathlib.Path, *, size=0.3, dtype="float32") -> str:
    """The directory of a run on a tiny OLMoE with one checkpoint, its router trained."""
    model = write_tiny_model(folder / "model", MODELS["olmoe"])
    write_rows(folder / "train.jsonl", 60)
    write_rows(folder / "heldout.jsonl", 12, seed=1)
    config = tiny_config(
        folder,
        model=dict(path=str(model), dtype=dtype),
        adapter=dict(targets=("gate", "up", "down", "q"), router="after_warmup", scale=SCALE),
        allocation=dict(kind="uniform", r_target=MAX_RANK, r_max=MAX_RANK),
    )
    job = prepare(config)
    run = train_lib.build(job)
    position = start(run)
    lora = random_factors(position.state.lora, size, RANKS_LE)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, position.state.lora)
    state = position.state._replace(lora=jax.device_put(lora, shardings))
    job.run_dir.create(job.config, job.origin, job.schedule_steps)
    checkpoints = Checkpoints(job.run_dir.checkpoints, keep_last=1)
    position = train_lib.Position(state, CapacityState(RANKS_LE), 1)
    train_lib.save(run, checkpoints, position, STEP, None)
    checkpoints.close()
    return config.run.dir
