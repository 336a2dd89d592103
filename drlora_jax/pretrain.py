"""`python -m drlora_jax.pretrain`: trains all weights of a small MoE from scratch.

Architecture and tokenizer come from `model.path`; its weights are not read. Each file of
`data.path` is a domain, and every batch has equal parts of all domains. A run resumes from its last
checkpoint, and ends by writing a Hugging Face directory <run.dir>/model and <run.dir>/pretrain.json
(held-out loss and expert load per domain).
"""

import hashlib
import json
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import SingleDeviceSharding

from drlora_jax import cli
from drlora_jax.config import DataSection, MeshSection, TrainConfig, load_config
from drlora_jax.data.documents import load_documents
from drlora_jax.data.loader import Batch, Loader, count_tokens, eval_batches, split_micro_batches
from drlora_jax.data.tokenize import load_tokenizer, pad_token
from drlora_jax.errors import EXIT_DONE, EXIT_RESUMABLE, RunError, UserError
from drlora_jax.interop.hf_files import find_model, read_config_json, read_model_config
from drlora_jax.interop.hf_write import write_model
from drlora_jax.models.options import DecoderOptions
from drlora_jax.models.transformer import Decoder, init_variables
from drlora_jax.reporting.progress import Throughput
from drlora_jax.runs.checkpoint import Checkpoints
from drlora_jax.runs.directory import RunDirectory
from drlora_jax.system.host_memory import keep_freed_memory, run_on_calling_thread
from drlora_jax.system.paths import write_result
from drlora_jax.system.stop_signals import StopSignals
from drlora_jax.training.optimizer import make_optimizer
from drlora_jax.training.step import AuxiliaryWeights, make_eval_step, make_pretrain_step


class Domain(NamedTuple):
    name: str
    loader: Loader
    heldout: list


def main(argv=None) -> int:
    args = cli.parse_arguments("drlora_jax.pretrain", __doc__, argv)
    config = load_config(args.config, args.overrides)
    run_on_calling_thread()
    check_supported(config)
    directory = find_model(config.model.path)
    model_config = read_model_config(directory)
    domains = load_domains(config, load_tokenizer(directory))

    options = DecoderOptions(base_grad=True, remat=config.model.remat)
    model = Decoder(model_config, options)
    tx, schedule = make_optimizer(config.train, config.train.steps)
    params = init_params(model, config.run.seed)
    print(
        f"{sum(leaf.size for leaf in jax.tree.leaves(params)):,} parameters, {len(domains)} domains"
    )
    run_dir, digest = RunDirectory(config.run.dir), hashlib.sha256(repr(model_config).encode())
    origin = {"base_fingerprint": digest.hexdigest(), "data_fingerprint": ""}
    stored = run_dir.stored()
    if stored is not None:
        for line in run_dir.check_same(stored, config, origin):
            print(line)
    if args.dry_run:
        return EXIT_DONE
    with run_dir.locked():
        if stored is None:
            run_dir.create(config, origin, config.train.steps)
        keep_freed_memory(jax.default_backend())
        if not train(config, model, tx, schedule, params, domains):
            return EXIT_RESUMABLE
        (params, _), step = restore_or_start(config, tx, params)
        if step < config.train.steps:
            raise RunError(
                f"The last undamaged checkpoint is of step {step}; start the same command again."
            )
        _write(config, model, params, domains, directory)
    return EXIT_DONE


def _write(config: TrainConfig, model: Decoder, params, domains: list, directory) -> None:
    """Writes the model with its tokenizer, and its results on the held-out files."""
    folder = RunDirectory(config.run.dir).path
    report = {"steps": config.train.steps, "heldout": evaluate(config, model, params, domains)}
    values = read_config_json(directory)
    write_model(folder / "model", model.config, params, values, ml_dtypes.bfloat16)
    load_tokenizer(directory).save_pretrained(folder / "model")
    write_result(folder / "pretrain.json", json.dumps(report, indent=2) + "\n")
    print(f"wrote {folder / 'model'}")


def check_supported(config: TrainConfig) -> None:
    """Refuses settings that fine-tuning supports and pretraining does not."""
    if config.train.steps is None:
        raise UserError("Pretraining counts steps: set train.steps, not train.epochs.")
    needed = {
        "model.dtype": (config.model.dtype.replace("auto", "float32"), "float32"),
        "data.format": (config.data.format, "text"),
        "data.too_long": (config.data.too_long, "split"),
        "data.loss_on": (config.data.loss_on, "all"),
        "data.max_rows": (config.data.max_rows, None),
        "mesh": (config.mesh, MeshSection()),
    }
    for name, (value, expected) in needed.items():
        if value != expected:
            raise UserError(f"Pretraining needs {name}={expected}, got {value}.")


def load_domains(config: TrainConfig, tokenizer) -> list[Domain]:
    """Returns one loader per file of `data.path`, with the held-out batches of the file at the same
    index of `data.eval_path`.
    """
    paths, heldout_paths = config.data.path, config.data.eval_path
    if not paths or len(paths) != len(heldout_paths):
        raise UserError(
            "data.path and data.eval_path need one file each per domain, got "
            f"{len(paths)} and {len(heldout_paths)}."
        )
    if config.train.batch_size % len(paths):
        raise UserError(
            f"train.batch_size ({config.train.batch_size}) must be a multiple of the number of "
            f"domains ({len(paths)})."
        )
    return [
        _load_domain(config, tokenizer, *pair) for pair in zip(paths, heldout_paths, strict=True)
    ]


def _load_domain(config: TrainConfig, tokenizer, path: str, heldout_path: str) -> Domain:
    length, rows = config.train.sequence_length, config.train.batch_size

    def read(path):
        section = DataSection(path=(path,), format="text", too_long="split", loss_on="all")
        return load_documents(section, tokenizer, length).documents

    pad_id = pad_token(tokenizer)
    heldout = eval_batches(
        read(heldout_path), sequence_length=length, batch_size=rows, pad_id=pad_id
    )
    loader = Loader(
        read(path),
        sequence_length=length,
        batch_size=rows // len(config.data.path),
        seed=config.run.seed,
        pad_id=pad_id,
    )
    return Domain(pathlib.Path(path).stem, loader, list(heldout))


def init_params(model: Decoder, seed: int) -> dict:
    return jax.jit(lambda key: init_variables(model, key)["params"])(jax.random.key(seed))


def restore_or_start(config: TrainConfig, tx, params):
    """Returns ((params, opt_state), steps done) of the newest checkpoint, or of a fresh start."""
    folder = RunDirectory(config.run.dir).checkpoints
    checkpoints = Checkpoints(folder, keep_last=config.run.keep_last)
    state = (params, jax.jit(tx.init)(params))
    sharding = SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state
    )
    found = checkpoints.restore_newest(abstract)
    checkpoints.close()
    return (state, 0) if found is None else (found.state, found.step)


def train(config: TrainConfig, model: Decoder, tx, schedule, params, domains: list[Domain]) -> bool:
    """Runs to the last step; returns False if a signal stopped it (its state is saved)."""
    section = config.train
    auxiliary = AuxiliaryWeights(section.balance_loss, section.z_loss, section.balance_form)
    train_step = jax.jit(make_pretrain_step(model, tx, auxiliary), donate_argnums=(0, 1))
    (params, opt_state), step = restore_or_start(config, tx, params)
    run_dir = RunDirectory(config.run.dir)
    for note in run_dir.cut_back(step, config.run.log_every):
        print(f"warning: {note}")
    checkpoints = Checkpoints(run_dir.checkpoints, keep_last=config.run.keep_last)
    if step < section.steps:  # compiled ahead: until it is, a signal ends the process at once
        batch = split_micro_batches(mixed_batch(domains, step), section.micro_batches)
        train_step = train_step.lower(params, opt_state, batch).compile()
    meter = Throughput(0.0, 1)
    with StopSignals() as stop:
        is_stopping = stop.reached(step)
        meter.resume()
        while step < section.steps and not is_stopping:
            batch = mixed_batch(domains, step)
            parts = split_micro_batches(batch, section.micro_batches)
            params, opt_state, metrics = train_step(params, opt_state, parts)
            step += 1
            meter.add(count_tokens(batch))
            is_stopping = stop.reached(step)
            due = due_after(config, step, is_stopping=is_stopping)
            _require_finite(due, step, metrics)
            if due.row:
                _log_step(run_dir, meter, schedule, step, metrics)
            meter.pause()
            if due.evaluation:
                _log_heldout(run_dir, step, evaluate(config, model, params, domains))
            if due.checkpoint:
                checkpoints.save(step, (params, opt_state), {})
            meter.resume()
        checkpoints.close()
    return step == section.steps


class Due(NamedTuple):
    """Names what is due after a step."""

    row: bool
    evaluation: bool
    checkpoint: bool


def due_after(config: TrainConfig, step: int, *, is_stopping: bool) -> Due:
    is_last = step == config.train.steps
    return Due(
        row=step % config.run.log_every == 0,
        evaluation=step % config.train.eval_every == 0,
        checkpoint=step % config.run.checkpoint_every == 0 or is_last or is_stopping,
    )


def _require_finite(due: Due, step: int, metrics: dict) -> None:
    """Raises RunError when a step diverged. It is checked only where anything is due, because
    reading a metric waits for the step; the time measured until here is then that of the steps.
    """
    if any(due) and not np.isfinite(float(metrics["grad_norm"])):
        raise RunError(f"The run diverged by step {step}; lower train.learning_rate.")


def _log_step(run_dir: RunDirectory, meter: Throughput, schedule, step: int, metrics: dict) -> None:
    rate = meter.take()["tokens_per_second"]
    _log(
        run_dir,
        step=step,
        loss=float(metrics["loss"]),
        learning_rate=float(schedule(step - 1)),
        tokens_per_second=rate,
    )


def _log_heldout(run_dir: RunDirectory, step: int, heldout: dict) -> None:
    losses = {name: values["loss"] for name, values in heldout.items()}
    _log(run_dir, step=step, heldout=losses)


def mixed_batch(domains: list[Domain], step: int) -> Batch:
    """Returns a batch with equal parts of every domain, a pure function of the step."""
    parts = [domain.loader.batch(step * domain.loader.batch_size) for domain in domains]
    return Batch(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def evaluate(config: TrainConfig, model: Decoder, params, domains: list[Domain]) -> dict:
    """Returns per domain the held-out loss in nats per token, the number of tokens, and each
    layer's share of routing choices per expert.
    """
    layers, experts = len(model.config.moe_layers), model.config.moe.routing.num_experts
    eval_step = jax.jit(make_eval_step(model))
    mask_LER = jnp.ones((layers, experts, 0))
    report = {}
    for domain in domains:
        nll, targets, count_LE = 0.0, 0.0, np.zeros((layers, experts))
        for batch in domain.heldout:
            batch_nll, batch_targets, stats = eval_step(params, {}, mask_LER, batch)
            nll, targets = nll + float(batch_nll), targets + float(batch_targets)
            count_LE += np.asarray(stats.count_E)
        load = (count_LE / count_LE.sum(axis=1, keepdims=True)).round(4)
        report[domain.name] = {"loss": nll / targets, "tokens": int(targets), "load": load.tolist()}
    return report


def _log(run_dir: RunDirectory, **values) -> None:
    run_dir.log_metrics(values)
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    cli.run_and_exit(main, memory_advice=cli.TRAINING_ADVICE, outlives_output=True)
