"""From a config to a job: everything that is checked before a device is touched."""

import dataclasses
import functools
import hashlib
import pathlib
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
from drlora_jax.system.numbers import ceil_div
from drlora_jax.training.passes import length_lines, passes_lines


class Job(NamedTuple):
    """A checked run."""

    config: TrainConfig
    run_dir: RunDirectory
    is_new: bool
    directory: pathlib.Path  # of the base model
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


class Before(NamedTuple):
    """What is in the run directory: nothing, for a new run."""

    run_dir: RunDirectory
    stored: dict | None  # config.json
    resolved: Resolved | None  # None for a run of a version that did not keep it, too


class Setting(NamedTuple):
    """The model, adapter and mesh of a run, checked; no row was read yet."""

    config: TrainConfig  # with what was to be derived from the model
    directory: pathlib.Path
    model_config: ModelConfig
    tokenizer: Any
    notes: list[str]
    adapter: Placement
    shapes: CapacityShapes
    mesh_sizes: tuple[int, ...]


class Rows(NamedTuple):
    """The rows of a run."""

    loader: Loader
    heldout: list[Batch]
    reports: list[Report]  # of the training rows, and of held-out rows where there are any
    total_steps: int


def prepare(config: TrainConfig) -> Job:
    """Reads and checks everything a run needs; raises UserError for what the user can fix.

    What costs little comes first: a mistake in a setting is found before rows are read.
    """
    before = _look_before(settled(config))
    stored, run_dir = before.stored, before.run_dir
    setting = _read_setting(settled(config), before)
    config, model_config = setting.config, setting.model_config
    rows = _read_rows(setting, _reading(config.data, stored, before.resolved))
    origin = _origin(setting.directory, stored, rows)
    resume_lines = []
    if stored is not None:
        now = _devices_now(setting.mesh_sizes)
        resume_lines = run_dir.check_same(stored, config, origin, now)
    schedule_steps = stored["schedule_steps"] if stored else rows.total_steps
    policy = _checked_policy(setting, rows.total_steps, schedule_steps)
    if stored is not None:
        run_dir.check_first_ranks(stored, config, policy.init().ranks_LE)
    return Job(
        config=config,
        run_dir=run_dir,
        is_new=stored is None,
        directory=setting.directory,
        origin=origin,
        model_config=model_config,
        adapter=setting.adapter,
        policy=policy,
        resolved=before.resolved or _resolve(setting, rows, origin["base_fingerprint"]),
        loader=rows.loader,
        eval_batches=rows.heldout,
        mesh_sizes=setting.mesh_sizes,
        total_steps=rows.total_steps,
        schedule_steps=schedule_steps,
        lines=[*_lines(setting, rows, policy), *resume_lines],
    )


def _look_before(config: TrainConfig) -> Before:
    run_dir = RunDirectory(config.run.dir, writes=processes_lib.is_main())
    stored = run_dir.stored()
    run_dir.check_place()
    has_resolved = stored is not None and "resolved" in stored
    resolved = Resolved.from_json(stored["resolved"]) if has_resolved else None
    return Before(run_dir, stored, resolved)


def _read_setting(config: TrainConfig, before: Before) -> Setting:
    """Reads what a model directory says of itself, but no weights, and checks settings with it."""
    revision = before.resolved.model_revision if before.resolved is not None else None
    directory = find_model(config.model.path, revision=revision)
    model_config = read_model_config(directory)
    devices = count_devices()
    config = with_resolved_experts(with_resolved_dtype(config), model_config.num_layers)
    config = with_resolved_rank(config, model_config)
    if before.stored is not None:
        before.run_dir.check_settings(before.stored, config)
    options = DecoderOptions(dtype=jnp.dtype(config.model.dtype))
    match_keys(
        model_config, read_headers(directory), abstract_params(Decoder(model_config, options))
    )
    tokenizer, notes = _open_tokenizer(directory, before.resolved, config.run.dir)
    without_row = check_vocabulary(tokenizer, model_config.vocab_size)
    notes += [f"note: {without_row}"] if without_row else []
    adapter = make_adapter(config, model_config)
    sizes = resolve_sizes(config.mesh, devices, jax.process_count())
    check_mesh(config, model_config, sizes)
    check_exchange(config.mesh.exchange, jax.devices()[0].platform)
    shapes = capacity_shapes(model_config, adapter)
    _check_schedule(config, shapes, before.stored)
    return Setting(config, directory, model_config, tokenizer, notes, adapter, shapes, sizes)


def _read_rows(setting: Setting, reading: DataSection) -> Rows:
    config = setting.config
    vocab_size = setting.model_config.vocab_size
    loader, heldout, reports = _read_data(config, reading, setting.tokenizer, vocab_size)
    steps = config.train.steps
    if steps is None:
        steps = ceil_div(loader.total_rows(config.train.epochs), config.train.batch_size)
    return Rows(loader, heldout, reports, steps)


def _origin(directory: pathlib.Path, stored: dict | None, rows: Rows) -> dict[str, str]:
    """Returns the fingerprints of the base model and of the data."""
    is_known = stored is not None and same_base(stored, directory)
    return {
        "base_fingerprint": stored["base_fingerprint"] if is_known else fingerprint(directory),
        "data_fingerprint": digest(rows.loader.documents),
        "heldout_fingerprint": _heldout_digest(rows.heldout),
    }


def _resolve(setting: Setting, rows: Rows, base: str) -> Resolved:
    return resolve(
        rows.reports[0],
        setting.tokenizer,
        setting.directory,
        vocab_size=setting.model_config.vocab_size,
        revision=revision_of(setting.directory),
        base=base,
    )


def _lines(setting: Setting, rows: Rows, policy: Policy) -> list[str]:
    """Returns what to tell before step 1."""
    config, model_config, adapter = setting.config, setting.model_config, setting.adapter
    lines = rows.reports[0].lines()
    for report in rows.reports[1:]:
        lines += report.lines("held-out data")
    lines += setting.notes
    if len(rows.reports) == 1:
        lines.append("data.eval_path is not set: no held-out loss is measured")
    lines += passes_lines(rows.loader, config.train, rows.total_steps)
    lines += length_lines(rows.loader, longest_positions(setting.directory))
    weights = coverage(model_config, adapter, config.adapter.targets)
    lines += ["", *coverage_lines(weights), *adapter.notes(model_config)]
    lines += ["", f"allocation  {policy.describe}"]
    mesh = f"{describe_sizes(setting.mesh_sizes)} on {_devices_line()}"
    return [*lines, f"mesh        {mesh}, {config.model.dtype}"]


def _check_schedule(config: TrainConfig, shapes: CapacityShapes, stored: dict | None) -> None:
    """Refuses an impossible allocation, if the steps are known without the rows."""
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


def _checked_policy(setting: Setting, total_steps: int, schedule_steps: int) -> Policy:
    """Returns the policy, with the exponents of the base model's weights where it asks for them."""
    config, shapes = setting.config, setting.shapes
    policy = _without_exponents(config, shapes, schedule_steps)
    if config.allocation.own.wants_exponents():  # what cannot be is refused before the analysis

        def exponents() -> Exponents:
            return read_exponents(
                setting.model_config,
                setting.directory,
                setting.adapter.expert_layers(setting.model_config),
                file=config.allocation.alpha_file,
                estimator=config.allocation.alpha_estimator,
            )

        policy = make_policy(config, shapes, schedule_steps, exponents)
    _check_balance(config, policy)
    _check_events_fit(total_steps, policy)
    return policy


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
