"""Checks that a model and its batches fit a mesh, before anything is read."""

from drlora_jax.config import TrainConfig
from drlora_jax.errors import UserError
from drlora_jax.models.architecture import ModelConfig
from drlora_jax.parallel.exchange import PADDED, RAGGED
from drlora_jax.parallel.mesh import AXES


def check_mesh(config: TrainConfig, model_config: ModelConfig, sizes: tuple[int, ...]) -> None:
    data, fsdp, expert, _ = sizes
    rows = config.train.batch_size // config.train.micro_batches
    if rows % (data * fsdp * expert):
        raise UserError(
            f"train.batch_size / train.micro_batches ({rows} rows) must be a multiple of "
            f"mesh.data x mesh.fsdp x mesh.expert ({data} x {fsdp} x {expert})."
        )
    check_model_divides(model_config, sizes)


def check_exchange(exchange: str, platform: str) -> None:
    """Refuses `ragged` where it does not work: on GPUs `ragged_all_to_all` is reported to give
    wrong gradients, and on CPUs it is not implemented.
    """
    if exchange == RAGGED and platform != "tpu":
        raise UserError(
            f"mesh.exchange={RAGGED} is for TPUs, but the platform is {platform}; set auto, or "
            f"{PADDED}, which exchanges the same rows."
        )


def check_model_divides(model_config: ModelConfig, sizes: tuple[int, ...]) -> None:
    """Refuses a mesh over which experts or attention heads cannot be sharded evenly."""
    expert, tensor = (sizes[AXES.index(axis)] for axis in ("expert", "tensor"))
    moe = model_config.moe
    if moe and moe.routing.num_experts % (expert * tensor):
        raise UserError(
            f"mesh.expert x mesh.tensor ({expert} x {tensor}) must divide the number of experts "
            f"({moe.routing.num_experts}); use smaller ones and more mesh.fsdp or mesh.data."
        )
    for layer in (layer for segment in model_config.segments for layer in segment.unit):
        heads, groups = layer.attention.num_heads, layer.attention.num_kv_heads
        if heads % tensor or (groups % tensor and tensor % groups):
            raise UserError(
                f"mesh.tensor={tensor} must divide the {heads} attention heads, and divide the "
                f"{groups} key-value heads or be a multiple of them; use a smaller one."
            )
