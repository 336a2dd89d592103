"""From a config to a job: everything that is checked before a device is touched."""

import dataclasses
import functools
import hashlib
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from drlora_jax.adapters.targets import coverage, coverage_lines
from drlora_jax.allocation import CapacityShapes, Policy
from drlora_jax.allocation.spectra import Exponents
from drlora_jax.config import DataSection, TrainConfig, settled
from drlora_jax.config.resolve import (
    capacity_shapes,
    make_adapter,
    make_policy,
    with_resolved_dtype,
    with_resolved_experts,
    with_resolved_rank,
)
from drlora_jax.data.documents import check_paths, digest, load_documents
from drlora_jax.data.loader import Batch, Loader, eval_batches
from drlora_jax.data.report import Report
from drlora_jax.data.tokenize import check_vocabulary, load_tokenizer, pad_token
from drlora_jax.data.wording import with_date
from drlora_jax.errors import UserError
from drlora_jax.interop.exponents import read_exponents
from drlora_jax.interop.hf_files import (
    find_model,
    fingerprint,
    longest_positions,
    read_headers,
    read_model_config,
    revision_of,
    same_base,
)
from drlora_jax.interop.hf_read import match_keys
from drlora_jax.models.architecture import ModelConfig
from drlora_jax.models.options import DecoderOptions
from drlora_jax.models.placement import Placement
from drlora_jax.models.transformer import Decoder, abstract_params
from drlora_jax.parallel import processes as processes_lib
from drlora_jax.parallel.mesh import AXES, count_devices, describe_sizes, resolve_sizes
from drlora_jax.parallel.mesh_checks import check_exchange, check_mesh
from drlora_jax.runs.directory import RunDirectory
from drlora_jax.runs.resolved import Resolved, as_trained, resolve
from drlora_jax.training.passes import length_lines, passes_lines


class Job(NamedTuple):
    """A checked run."""

    config: TrainConfig
    run_dir: RunDirectory
    is_new: bool
    directory: object  # pathlib.Path of the base
    origin: dict[str, str]  # fingerprints of base and training data
    model_config: ModelConfig
    adapter: Placement
    policy: Policy
    loader: Loader
    eval_batches: list[Batch]
    mesh_sizes: tuple[int, ...]
    total_steps: int
    schedule_steps: int  # what the growth schedule is made for, fixed when the run is created
    lines: list[str]  # what to tell before step 1
    # How rows were written, by which tokenizer, on which base; None where no data were read.
    resolved: Resolved | None = None

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """The model layer index of every layer with experts, the base model's or the adapter's."""
        return self.adapter.expert_layers(self.model_config)


def prepare(config: TrainConfig) -> Job:
    """Reads and checks everything a run needs; raises UserError for what the user can mend.

    What costs little comes first: a mistake in a setting is found before rows are read.
    """
    config = settled(config)
    run_dir = RunDirectory(config.run.dir, writes=processes_lib.is_main())
    stored = run_dir.stored()
    run_dir.check_place()
    before = Resolved.from_json(stored["resolved"]) if stored and "resolved" in stored else None
    directory = find_model(
        config.model.path, revision=before.model_revision if before is not None else None
    )
    model_config = read_model_config(directory)
    devices = count_devices()
    config = with_resolved_experts(with_resolved_dtype(config), model_config.num_layers)
    config = with_resolved_rank(config, model_config)
    if stored is not None:
        run_dir.check_settings(stored, config)
    abstract = abstract_params(
        Decoder(model_config, DecoderOptions(dtype=jnp.dtype(config.model.dtype)))
    )
    match_keys(model_config, read_headers(directory), abstract)
    tokenizer, notes = _open_tokenizer(directory, before, config.run.dir)
    vocab_size = model_config.vocab_size
    without_row = check_vocabulary(tokenizer, vocab_size)
    notes += [f"note: {without_row}"] if without_row else []
    adapter = make_adapter(config, model_config)
    sizes = resolve_sizes(config.mesh, devices, jax.process_count())
    check_mesh(config, model_config, sizes)
    check_exchange(config.mesh.exchange, jax.devices()[0].platform)
    shapes = capacity_shapes(model_config, adapter)
    _check_schedule(config, shapes, stored)

    reading = _reading(config.data, stored, before)
    loader, heldout, reports = _read_data(config, reading, tokenizer, vocab_size)
    total_steps = config.train.steps or math.ceil(
        loader.total_rows(config.train.epochs) / config.train.batch_size
    )
    is_known = stored is not None and same_base(stored, directory)
    base = stored["base_fingerprint"] if is_known else fingerprint(directory)
    origin = {
        "base_fingerprint": base,
        "data_fingerprint": digest(loader.documents),
        "heldout_fingerprint": _heldout_digest(heldout),
    }
    resume_lines = []
    if stored is not None:
        resume_lines = run_dir.check_same(stored, config, origin, _devices_now(sizes))
    schedule_steps = stored["schedule_steps"] if stored else total_steps
    policy = _make_policy(config, shapes, schedule_steps, model_config, adapter, directory)
    _check_balance(config, policy)
    _check_events_fit(total_steps, policy)
    if stored is not None:
        run_dir.check_first_ranks(stored, config, policy.init().ranks_LE)
    rows = coverage(model_config, adapter, config.adapter.targets)
    resolved = before or resolve(
        reports[0],
        tokenizer,
        directory,
        vocab_size=vocab_size,
        revision=revision_of(directory),
        base=base,
    )
    lines = reports[0].lines()
    for report in reports[1:]:
        lines += report.lines("held-out data")
    lines += notes
    if len(reports) == 1:
        lines.append("data.eval_path is not set: no held-out loss is measured")
    lines += [*passes_lines(loader, config.train, total_steps)]
    lines += length_lines(loader, longest_positions(directory))
    lines += [
        "",
        *coverage_lines(rows),
        *adapter.notes(model_config),
        "",
        f"allocation  {policy.describe}",
    ]
    lines.append(f"mesh        {describe_sizes(sizes)} on {_devices_line()}, {config.model.dtype}")
    lines += resume_lines
    return Job(
        config=config,
        run_dir=run_dir,
        is_new=stored is None,
        directory=directory,
        origin=origin,
        model_config=model_config,
        adapter=adapter,
        policy=policy,
        resolved=resolved,
        loader=loader,
        eval_batches=heldout,
        mesh_sizes=sizes,
        total_steps=total_steps,
        schedule_steps=schedule_steps,
        lines=lines,
    )


def _check_schedule(config: TrainConfig, shapes: CapacityShapes, stored: dict | None) -> None:
    """Refuses an allocation that can not be, if the steps are known without the rows."""
    steps = stored["schedule_steps"] if stored else config.train.steps
    if steps is None:
        return
    policy = _without_exponents(config, shapes, steps)
    _check_balance(config, policy)
    _check_events_fit(config.train.steps or steps, policy)


def _check_events_fit(total_steps: int, policy: Policy) -> None:
    if total_steps < policy.last_event:
        raise UserError(
            f"train.steps={total_steps} ends before the last event of this run (step "
            f"{policy.last_event}), so its budget would not be met; take at least as many steps."
        )


def _devices_now(sizes: tuple[int, ...]) -> dict:
    """Of this start, as `provenance.devices` has them."""
    return {
        "kind": jax.devices()[0].device_kind,
        "mesh": dict(zip(AXES, sizes, strict=True)),
    }


def _devices_line() -> str:
    processes = jax.process_count()
    many = f", {processes} processes of {jax.local_device_count()}" if processes > 1 else ""
    return f"{jax.devices()[0].device_kind}{many}"


def _make_policy(
    config: TrainConfig,
    shapes: CapacityShapes,
    steps: int,
    model_config: ModelConfig,
    adapter: Placement,
    directory,
) -> Policy:
    """Returns the policy, with the exponents of the base's weights where it asks for them."""
    section = config.allocation
    policy = _without_exponents(config, shapes, steps)
    if not section.own.wants_exponents():
        return policy  # else: what can not be is refused before the analysis

    def exponents() -> Exponents:
        return read_exponents(
            model_config,
            directory,
            adapter.expert_layers(model_config),
            file=section.alpha_file,
            estimator=section.alpha_estimator,
        )

    return make_policy(config, shapes, steps, exponents)


def _without_exponents(config: TrainConfig, shapes: CapacityShapes, steps: int) -> Policy:
    """Returns the policy, with exponents that are all alike where it asks for them."""
    alike = Exponents(np.ones(shapes.layers), np.ones((shapes.layers, shapes.experts)))
    return make_policy(config, shapes, steps, lambda: alike)


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


def _heldout_digest(batches: list[Batch]) -> str:
    """sha256 of the held-out rows, whatever batches they are in; empty where there are none."""
    digest = hashlib.sha256()
    for batch in batches:
        is_row = batch.segment_ids_BT.any(axis=1)
        for array in (batch.tokens_BT, batch.segment_ids_BT, batch.target_mask_BT):
            digest.update(np.ascontiguousarray(array[is_row]).tobytes())
    return digest.hexdigest() if batches else ""


def _open_tokenizer(directory, before: Resolved | None, run_dir: str) -> tuple[Any, list[str]]:
    """The tokenizer of a base, as a run that is there already was trained with it."""
    tokenizer = load_tokenizer(directory)
    if before is None:
        return tokenizer, []
    tokenizer, notes = as_trained(tokenizer, before, directory, run_dir)
    return tokenizer, [f"note: {note}" for note in notes]


def _reading(section: DataSection, stored: dict | None, before: Resolved | None) -> DataSection:
    """How rows are read: as a run that is there already has read them."""
    if before is not None:
        return with_date(section, before.date)
    if stored is not None and section.special_tokens == "auto":  # of an earlier version
        return dataclasses.replace(section, special_tokens="keep")
    return section


def _read_data(
    config: TrainConfig, reading: DataSection, tokenizer, vocab_size: int
) -> tuple[Loader, list[Batch], list[Report]]:
    """Training rows, held-out rows and a report on each."""
    if not reading.path:
        raise UserError(
            "data.path names no training data; set data.path=FILE.jsonl or a datasets name."
        )
    check_paths(reading)
    section, length = config.train, config.train.sequence_length
    read = functools.partial(load_documents, reading, tokenizer, length, vocab_size=vocab_size)
    training = read(say=_say)
    pad_id = pad_token(tokenizer, vocab_size)
    loader = Loader(
        training.documents,
        sequence_length=length,
        batch_size=section.batch_size,
        seed=config.run.seed,
        pad_id=pad_id,
        shuffle=reading.shuffle,
        pack=reading.pack,
    )
    if not reading.eval_path:
        return loader, [], [training.report]
    heldout = read(evaluation=True, say=_say)
    batches = eval_batches(
        heldout.documents,
        sequence_length=length,
        batch_size=section.batch_size // section.micro_batches,
        pad_id=pad_id,
        pack=reading.pack,
        limit=section.eval_batches,
    )
    return loader, list(batches), [training.report, heldout.report]


def _say(text: str) -> None:
    if processes_lib.is_main():
        print(text, flush=True)
