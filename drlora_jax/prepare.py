"""From a config to a job: everything that is checked before a device is touched."""

import dataclasses
import hashlib
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from drlora_jax.adapters.expert_counts import experts_of_layers
from drlora_jax.adapters.lora import AdapterSpec
from drlora_jax.adapters.targets import coverage, coverage_lines, resolve_targets
from drlora_jax.allocation import CapacityShapes, Policy, make_policy
from drlora_jax.allocation.prilora import last_rank
from drlora_jax.config import AdapterSection, TrainConfig
from drlora_jax.data.documents import load_documents
from drlora_jax.data.loader import Batch, Loader, eval_batches
from drlora_jax.data.tokenize import check_vocabulary, load_tokenizer, pad_token
from drlora_jax.errors import UserError
from drlora_jax.expert_trees import expert_roles
from drlora_jax.interop.exponents import read_exponents
from drlora_jax.interop.hf_read import (
    find_model,
    fingerprint,
    match_keys,
    read_headers,
    read_model_config,
)
from drlora_jax.models.architecture import DenseFfnConfig, ModelConfig, RoutingConfig
from drlora_jax.models.transformer import Decoder, DecoderOptions, abstract_params
from drlora_jax.parallel import hosts
from drlora_jax.parallel.exchange import PADDED, RAGGED
from drlora_jax.parallel.mesh import AXES, resolve_sizes
from drlora_jax.precision import resolve_dtype
from drlora_jax.run_dir import RunDirectory
from drlora_jax.spectra import Exponents


class Job(NamedTuple):
    """A checked run."""

    config: TrainConfig
    run_dir: RunDirectory
    is_new: bool
    directory: object  # pathlib.Path of the base
    origin: dict[str, str]  # fingerprints of base and training data
    model_config: ModelConfig
    adapter: AdapterSpec
    policy: Policy
    loader: Loader
    eval_batches: list[Batch]
    mesh_sizes: tuple[int, ...]
    total_steps: int
    schedule_steps: int  # what the growth schedule is made for, fixed when the run is created
    lines: list[str]  # what to tell before step 1


def prepare(config: TrainConfig) -> Job:
    """Reads and checks everything a run needs; raises UserError for what the user can mend."""
    directory = find_model(config.model.path)
    model_config = read_model_config(directory)
    devices = _device_count()
    config = with_resolved_experts(_with_resolved_dtype(config), model_config.num_layers)
    model_config = with_adapter_experts(model_config, config.adapter)
    config = with_resolved_rank(config, model_config)
    abstract = abstract_params(
        Decoder(model_config, DecoderOptions(dtype=jnp.dtype(config.model.dtype)))
    )
    match_keys(model_config, read_headers(directory), abstract)
    tokenizer = load_tokenizer(directory)
    check_vocabulary(tokenizer, model_config.vocab_size)
    adapter = make_adapter(config, model_config)
    sizes = resolve_sizes(config.mesh, devices, jax.process_count())
    check_mesh(config, model_config, sizes)
    _check_exchange(config.mesh.exchange, jax.devices()[0].platform)

    loader, heldout, data_lines = _read_data(config, tokenizer)
    total_steps = config.train.steps or math.ceil(
        loader.total_rows(config.train.epochs) / config.train.batch_size
    )
    run_dir = RunDirectory(config.run.dir, writes=hosts.is_main())
    origin = {"base_fingerprint": fingerprint(directory), "data_fingerprint": _digest(loader)}
    stored = run_dir.stored()
    if stored is not None:
        run_dir.check_same(stored, config, origin)
    schedule_steps = stored["schedule_steps"] if stored else total_steps
    shapes = capacity_shapes(config, model_config, adapter)
    policy = _make_policy(config, shapes, schedule_steps, model_config, directory)
    _check_balance(config, policy)
    if total_steps < policy.last_event:
        raise UserError(
            f"train.steps={total_steps} ends before the last event of this run (step "
            f"{policy.last_event}), so its budget would not be met; take at least as many steps."
        )
    rows = coverage(model_config, adapter, config.adapter.targets)
    mesh = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    lines = [*data_lines, "", *coverage_lines(rows), "", f"allocation  {policy.describe}"]
    lines.append(f"mesh        {mesh} on {_devices_line()}, {config.model.dtype}")
    return Job(
        config=config,
        run_dir=run_dir,
        is_new=stored is None,
        directory=directory,
        origin=origin,
        model_config=model_config,
        adapter=adapter,
        policy=policy,
        loader=loader,
        eval_batches=heldout,
        mesh_sizes=sizes,
        total_steps=total_steps,
        schedule_steps=schedule_steps,
        lines=lines,
    )


def _devices_line() -> str:
    processes = jax.process_count()
    many = f", {processes} processes of {jax.local_device_count()}" if processes > 1 else ""
    return f"{jax.devices()[0].device_kind}{many}"


def _device_count() -> int:
    try:
        return jax.device_count()
    # JAX_PLATFORMS names what is not here, or a device is broken.
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or ["no backend starts"])[0]
        raise UserError(
            f"jax finds no device ({reason}); check JAX_PLATFORMS (got "
            f"{jax.config.jax_platforms!r}), the drivers, and that jax was installed for them."
        ) from error


def _with_resolved_dtype(config: TrainConfig) -> TrainConfig:
    """So that config.json says what was computed in, and a resume elsewhere computes in the same
    or is refused.
    """
    dtype = resolve_dtype(config.model.dtype)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))


def with_resolved_rank(config: TrainConfig, model_config: ModelConfig) -> TrainConfig:
    """The config with the rank that `allocation.rank_rule` makes of r_target in its place.

    The undivided r_target stays the rank of plain LoRA, where that is not set: the rules make the
    experts of a token, or of a layer, together as large as one adapter of rank r. `model_config`
    has the experts that `with_adapter_experts` gives.
    """
    section, routing = config.allocation, model_config.routing
    if section.rank_rule == "fixed" or routing is None:  # without experts, targets say so
        return config
    counts = set(experts_of_layers(config.adapter, model_config.num_layers))
    if len(counts) > 1:
        raise UserError(
            f"allocation.rank_rule={section.rank_rule} divides by a number of experts, and with "
            "adapter.experts_per_layer layers have different ones; set allocation.r_target to the "
            "rank that you want, and rank_rule=fixed."
        )
    by, what = {
        "per_top_k": (routing.experts_per_token, "experts a token"),
        "per_expert": (routing.num_experts, "experts"),
    }[section.rank_rule]
    rank = section.r_target // by
    if not rank:
        raise UserError(
            f"allocation.rank_rule={section.rank_rule} makes rank {section.r_target} // {by} "
            f"{what} = 0; set allocation.r_target to {by} or more."
        )
    return dataclasses.replace(
        config,
        allocation=dataclasses.replace(section, r_target=rank, rank_rule="fixed"),
        adapter=dataclasses.replace(config.adapter, rank=config.adapter.rank or section.r_target),
    )


def with_resolved_experts(config: TrainConfig, num_layers: int) -> TrainConfig:
    """So that config.json says how many experts every layer has, whatever becomes of a file."""
    text = ",".join(map(str, experts_of_layers(config.adapter, num_layers))) or None
    return dataclasses.replace(
        config, adapter=dataclasses.replace(config.adapter, experts_per_layer=text)
    )


def with_adapter_experts(model_config: ModelConfig, section: AdapterSection) -> ModelConfig:
    """The model as its adapter makes it: MixLoRA puts routed experts on every dense FFN, MoLA on
    every matrix that it adapts.
    """
    if not section.makes_experts:
        return model_config
    counts = experts_of_layers(section, model_config.num_layers)
    experts = max(counts, default=section.num_experts)
    chosen = min(section.experts_per_token, experts)
    routing = RoutingConfig(experts, chosen, normalize=True, top_p=section.top_p)

    def layer(config):
        if not isinstance(config.ffn, DenseFfnConfig):
            return config
        if section.kind == "mola":
            return dataclasses.replace(config, linear_routing=routing)
        return dataclasses.replace(config, ffn=dataclasses.replace(config.ffn, routing=routing))

    segments = tuple(
        dataclasses.replace(segment, unit=tuple(map(layer, segment.unit)))
        for segment in model_config.segments
    )
    return dataclasses.replace(model_config, segments=segments)


def make_adapter(config: TrainConfig, model_config: ModelConfig) -> AdapterSpec:
    section: AdapterSection = config.adapter
    return AdapterSpec(
        paths=resolve_targets(model_config, section.kind, section.targets),
        scale=section.scale,
        dropout=section.dropout,
        expert_scale=section.expert_scale,
        expert_dropout=section.expert_dropout,
        rank=section.rank or config.allocation.r_target,
        dora=section.dora,
        factor_dropout=section.factor_dropout,
        max_rank=allocated_rank(config),
        train_router=section.router == "after_warmup" and bool(model_config.moe_layers),
        experts_module={"mixlora": "mlp", "mola": "*"}.get(section.kind, "moe"),
        experts_per_layer=experts_of_layers(section, model_config.num_layers),
    )


def allocated_rank(config: TrainConfig) -> int:
    """Ranks that experts have memory for: a policy that does not grow needs what it starts with."""
    section = config.allocation
    needed = {"uniform": section.r_target, "adalora": section.r_init}
    if config.adapter.makes_experts:  # its experts are there or not
        needed["alphalora"] = section.r_target
    needed["prilora"] = max(section.r_init, last_rank(section.r_init, section.r_target))
    return needed.get(section.kind, section.r_max)


def capacity_shapes(
    config: TrainConfig, model_config: ModelConfig, adapter: AdapterSpec
) -> CapacityShapes:
    """The axes of ranks, masks and statistics; a dense model has no layers of them."""
    routing = model_config.routing
    return CapacityShapes(
        layers=len(model_config.moe_layers),
        projections=len(expert_roles(adapter)),
        experts=routing.num_experts if routing else 0,
        max_rank=allocated_rank(config),
    )


def _make_policy(
    config: TrainConfig, shapes: CapacityShapes, steps: int, model_config: ModelConfig, directory
) -> Policy:
    """The policy, with the exponents of the base's weights where it asks for them."""
    section = config.allocation
    if not section.asks_for_exponents:
        return make_policy(config, shapes, steps)
    alike = Exponents(np.ones(shapes.layers), np.ones((shapes.layers, shapes.experts)))
    make_policy(config, shapes, steps, alike)  # what can not be is refused before the analysis
    exponents = read_exponents(
        model_config, directory, file=section.alpha_file, estimator=section.alpha_estimator
    )
    return make_policy(config, shapes, steps, exponents)


def _check_balance(config: TrainConfig, policy: Policy) -> None:
    """The pooled form compares experts of different layers by their number."""
    section = config.train
    if not (config.adapter.makes_experts and section.balance_loss):
        return
    open_L = (policy.init().ranks_LE > 0).sum(axis=1)
    if section.balance_form == "pooled" and len(set(open_L.tolist())) > 1:
        raise UserError(
            "train.balance_form=pooled adds up experts of the same number over all layers, and "
            f"here layers have {open_L.min()} to {open_L.max()} of them; set "
            "train.balance_form=per_layer."
        )


def check_mesh(config: TrainConfig, model_config: ModelConfig, sizes: tuple[int, ...]) -> None:
    data, fsdp, expert, _ = sizes
    rows = config.train.batch_size // config.train.micro_batches
    if rows % (data * fsdp * expert):
        raise UserError(
            f"train.batch_size / train.micro_batches ({rows} rows) must be a multiple of mesh.data "
            f"x mesh.fsdp x "
            f"mesh.expert ({data} x {fsdp} x {expert})."
        )
    check_model_divides(model_config, sizes)


def _check_exchange(exchange: str, platform: str) -> None:
    """On GPUs `ragged_all_to_all` is reported to give wrong gradients; on CPUs it is not there."""
    if exchange == RAGGED and platform != "tpu":
        raise UserError(
            f"mesh.exchange={RAGGED} is for TPUs, and the devices here are {platform}; leave it at "
            f"auto, or set {PADDED}, which moves the same rows."
        )


def check_model_divides(model_config: ModelConfig, sizes: tuple[int, ...]) -> None:
    """Refuses a mesh over which experts or attention heads can not be dealt out equally."""
    expert, tensor = (sizes[AXES.index(axis)] for axis in ("expert", "tensor"))
    moe = model_config.moe
    # Experts that an adapter makes on a dense FFN are everywhere.
    if moe and model_config.experts_module == "moe" and moe.routing.num_experts % (expert * tensor):
        raise UserError(
            f"mesh.expert x mesh.tensor ({expert} x {tensor}) must divide the number of experts "
            f"({moe.routing.num_experts}); take smaller ones and more mesh.fsdp or mesh.data."
        )
    for layer in (layer for segment in model_config.segments for layer in segment.unit):
        heads, groups = layer.attention.num_heads, layer.attention.num_kv_heads
        if heads % tensor or (groups % tensor and tensor % groups):
            raise UserError(
                f"mesh.tensor={tensor} must divide the {heads} attention heads, and divide the "
                f"{groups} key-value heads or be a multiple of them; take a smaller one."
            )


def _digest(loader: Loader) -> str:
    """sha256 of all training tokens: rows that changed would make a resumed run another run."""
    digest = hashlib.sha256()
    for document in loader.documents:
        digest.update(document.tokens.tobytes())
        digest.update(document.is_target.tobytes())
    return digest.hexdigest()


def _read_data(config: TrainConfig, tokenizer) -> tuple[Loader, list[Batch], list[str]]:
    if not config.data.path:
        raise UserError(
            "data.path names no training data; set data.path=FILE.jsonl or a datasets name."
        )
    section, length = config.train, config.train.sequence_length
    training = load_documents(config.data, tokenizer, length)
    pad_id = pad_token(tokenizer)
    loader = Loader(
        training.documents,
        sequence_length=length,
        batch_size=section.batch_size,
        seed=config.run.seed,
        pad_id=pad_id,
        shuffle=config.data.shuffle,
        pack=config.data.pack,
    )
    lines = training.report.lines()
    if not config.data.eval_path:
        return loader, [], [*lines, "data.eval_path is not set: no held-out loss is measured"]
    heldout = load_documents(config.data, tokenizer, length, evaluation=True)
    batches = eval_batches(
        heldout.documents,
        sequence_length=length,
        batch_size=section.batch_size // section.micro_batches,
        pad_id=pad_id,
        pack=config.data.pack,
        limit=section.eval_batches,
    )
    return loader, list(batches), [*lines, *heldout.report.lines()]
