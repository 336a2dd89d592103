"""Builds a job on its mesh: model, optimizer, jitted functions, and shapes and shardings of all
arrays.

Nothing is read or allocated here, so a step can be compiled for devices that are not present.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from drlora_jax.adapters.targets import linear_inputs
from drlora_jax.allocation import CapacityState, masks_from_ranks
from drlora_jax.data.loader import BATCH_DTYPES, Batch
from drlora_jax.models.transformer import (
    Decoder,
    DecoderOptions,
    abstract_lora,
    abstract_params,
)
from drlora_jax.ops.experts.api import READS_STACKS
from drlora_jax.parallel import mesh as mesh_lib
from drlora_jax.parallel import processes
from drlora_jax.parallel.sharded_ops import sharded_ops
from drlora_jax.training.costs import (
    attention_backends,
    backend_line,
    checked_expert_backend,
    memory_forecast,
)
from drlora_jax.training.job import Job
from drlora_jax.training.memory import Layout
from drlora_jax.training.optimizer import make_optimizer
from drlora_jax.training.reorder import reorder_ranks
from drlora_jax.training.step import (
    AuxiliaryWeights,
    StepOptions,
    TrainState,
    init_lora,
    make_eval_step,
    make_train_step,
)


class Run(NamedTuple):
    """Holds a job on its mesh: functions and abstract values, nothing allocated yet."""

    job: Job
    mesh: Any
    model: Decoder
    tx: optax.GradientTransformation
    schedule: optax.Schedule
    # Jitted: the train step; the held-out loss; the adapter weights before step 1; `reorder_ranks`.
    step: Any
    eval_step: Any
    first_lora: Any
    reorder: Any
    abstract_params: dict
    abstract_state: TrainState
    abstract_batch: Batch  # of a step, [M, B, T]
    # The backend that computes experts, and the log line that names all implementations.
    experts: str
    backends: str
    # The log line that forecasts the memory of a step.
    forecast: str


def build(job: Job, devices=None) -> Run:
    """Returns mesh, model, optimizer and jitted functions of a job, for the devices of this run or
    for given ones.

    Nothing is read or allocated; only config, model, adapter, policy and step counts of the job are
    used.
    """
    config = job.config
    mesh = mesh_lib.make_mesh(job.mesh_sizes, devices)
    device, dtype = mesh.devices.flat[0], jnp.dtype(config.model.dtype)
    wanted, length = config.model.attention, config.train.sequence_length
    attention = attention_backends(job.model_config, length, dtype, device.platform, wanted)
    experts = checked_expert_backend(job.model_config, dtype, device, config.model.experts)
    model = _make_model(job, mesh, experts)
    tx, schedule = _make_optimizer(job)
    params = abstract_params(model)
    params = mesh_lib.with_shardings(params, mesh_lib.shardings_for(mesh, params, "params"))
    state = jax.eval_shape(lambda lora: initial_state(job, tx, lora), abstract_lora(model))
    state = mesh_lib.with_shardings(state, state_shardings(mesh, tx, state, job.policy.stat_axes))
    layout = memory_layout(job, mesh, experts)
    return Run(
        job=job,
        mesh=mesh,
        model=model,
        tx=tx,
        schedule=schedule,
        **_jitted(job, mesh, model, tx, state),
        abstract_params=params,
        abstract_state=state,
        abstract_batch=abstract_batch(job, mesh),
        experts=experts,
        backends=backend_line(job.model_config, attention, experts, device, dtype),
        forecast=memory_forecast(job.model_config, layout, params, state, config.model.remat),
    )


def _make_model(job: Job, mesh, experts: str) -> Decoder:
    config = job.config
    exchange, attention = config.mesh.exchange, config.model.attention
    options = DecoderOptions(
        dtype=jnp.dtype(config.model.dtype),
        adapter=job.adapter,
        ops=sharded_ops(mesh, attention=attention, experts=experts, exchange=exchange),
        remat=config.model.remat,
    )
    return Decoder(job.model_config, options)


def _make_optimizer(job: Job) -> tuple[optax.GradientTransformation, optax.Schedule]:
    section = job.config.adapter
    return make_optimizer(
        job.config.train,
        job.total_steps,
        first_total=job.schedule_steps,
        router_learning_rate=section.router_learning_rate if job.adapter.trains_routers else None,
    )


def _step_options(job: Job) -> StepOptions:
    config = job.config
    ratio = config.allocation.warmup_ratio
    ratio = config.train.warmup_ratio if ratio is None else ratio
    return StepOptions(
        auxiliary=AuxiliaryWeights(
            config.train.balance_loss, config.train.z_loss, config.train.balance_form
        ),
        freeze_idle_experts=config.adapter.freeze_idle_experts,
        freeze_a=config.adapter.freeze_a,
        router_start=int(ratio * job.schedule_steps),
        seed=config.run.seed,
    )


def _jitted(job: Job, mesh, model: Decoder, tx, state: TrainState) -> dict:
    """Returns the jitted functions of a `Run`, by field."""
    seed, everywhere = job.config.run.seed, mesh_lib.replicated(mesh)
    return {
        "step": jax.jit(
            make_train_step(model, tx, job.policy, _step_options(job)),
            donate_argnums=1,
            out_shardings=(shardings_of(state), everywhere),
        ),
        "eval_step": jax.jit(make_eval_step(model), out_shardings=everywhere),
        "first_lora": jax.jit(
            lambda: init_lora(model, jax.random.key(seed)), out_shardings=shardings_of(state.lora)
        ),
        "reorder": jax.jit(
            functools.partial(reorder_ranks, model, tx),
            donate_argnums=(0, 1),
            out_shardings=(shardings_of(state.lora), shardings_of(state.opt_state)),
        ),
    }


def initial_state(job: Job, tx, lora: dict) -> TrainState:
    """Returns the state before step 1, with the adapter weights `lora` of `first_lora`."""
    mask_LER = jnp.asarray(masks_from_ranks(job.policy.init().ranks_LE, job.adapter.max_rank))
    return TrainState(
        jnp.zeros((), jnp.int32), lora, tx.init(lora), mask_LER, job.policy.init_stats()
    )


def state_shardings(mesh, tx, state: TrainState, stat_axes=None) -> TrainState:
    """Returns shardings that place LoRA matrices, moments, masks and statistics with their experts
    and replicate counters.
    """
    lora = mesh_lib.shardings_for(mesh, state.lora, "lora")
    opt_state = optax.tree.map_params(
        tx,
        lambda _, sharding: sharding,
        state.opt_state,
        lora,
        transform_non_params=lambda _: mesh_lib.replicated(mesh),
    )
    return TrainState(
        step=mesh_lib.replicated(mesh),
        lora=lora,
        opt_state=opt_state,
        mask_LER=mesh_lib.shardings_for(mesh, state.mask_LER, "mask_LER"),
        stats=mesh_lib.shardings_by_axes(mesh, state.stats, stat_axes),
    )


def shardings_of(tree):
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def place_mask(run: Run, capacity: CapacityState) -> jax.Array:
    """Returns the rank mask on the devices, always with the same shape, dtype and sharding, so that
    new ranks never recompile the step.
    """
    mask_LER = masks_from_ranks(capacity.ranks_LE, run.job.adapter.max_rank)
    return processes.place(mask_LER, run.abstract_state.mask_LER.sharding)


def memory_layout(job: Job, mesh, experts: str) -> Layout:
    """Returns the settings of a run that determine the memory of a step."""
    section, shape = job.config.train, mesh.shape
    platform = mesh.devices.flat[0].platform
    rows = section.batch_size // section.micro_batches
    shards = shape["data"] * shape["fsdp"] * shape["expert"]
    return Layout(
        tokens=rows * section.sequence_length // shards,
        item=jnp.dtype(job.config.model.dtype).itemsize,
        experts=experts,
        expert_shards=shape["expert"],
        fsdp=shape["fsdp"],
        tensor=shape["tensor"],
        max_rank=job.adapter.max_rank,
        roles=len(job.adapter.expert_roles()),
        slices=mesh_lib.count_slices(mesh.devices.flat) if platform == "tpu" else 1,
        linear_inputs=linear_inputs(job.model_config, job.adapter),
        ffn_passes=job.adapter.ffn_passes,
        side_ranks=job.adapter.side_ranks,
        drops=job.adapter.dropout > 0,
        reads_stacks=experts in READS_STACKS and mesh.size == 1,
    )


def abstract_batch(job: Job, mesh) -> Batch:
    """Returns the shapes, dtypes and shardings of a step's batch [M, B, T]."""
    section = job.config.train
    micro, length = section.batch_size // section.micro_batches, section.sequence_length
    rows = mesh_lib.rows(mesh, leading=1)
    shape = (section.micro_batches, micro, length)
    return Batch(*(jax.ShapeDtypeStruct(shape, kind, sharding=rows) for kind in BATCH_DTYPES))
