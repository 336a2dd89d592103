"""`python -m drlora_jax.train --config FILE.py [section.field=value ...]`: fine-tunes a model.

Config -> checked job -> mesh -> base weights -> state -> loop. Growth events happen between steps,
on the host; the step is compiled once, ahead of time, and can not recompile. Exit codes: 0 done (or
already complete), 2 a mistake in the input, 1 the run failed, 75 stopped by a signal with its state
saved.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from drlora_jax import cli
from drlora_jax.build import Run, build, compile_step
from drlora_jax.checkpoint import Checkpoints
from drlora_jax.compilation import keep_compiled_programs
from drlora_jax.config import load_config
from drlora_jax.data.prefetch import made_ahead
from drlora_jax.data.sharded import sharded_batch
from drlora_jax.errors import EXIT_DONE, EXIT_RESUMABLE, RunError
from drlora_jax.events import grow, start_profiled
from drlora_jax.host_memory import keep_freed_memory, run_on_calling_thread
from drlora_jax.interop.hf_read import load_params
from drlora_jax.metrics import Progress, Throughput, describe_ranks, peak_memory
from drlora_jax.parallel import hosts
from drlora_jax.parallel import mesh as mesh_lib
from drlora_jax.parallel.watchdog import Watchdog
from drlora_jax.plan import (
    checkpoint_bytes,
    flops_per_token,
    memory_lines,
)
from drlora_jax.position import (
    Position,
    check_processes_agree,
    check_run_dir_is_shared,
    restore,
    save,
)
from drlora_jax.prepare import Job, prepare
from drlora_jax.provenance import made_with
from drlora_jax.reporting.writer import ReportWriter
from drlora_jax.sinks import check_sinks, open_sinks
from drlora_jax.step import TrainState
from drlora_jax.stop_signals import StopSignals


def main(argv=None) -> int:
    args = cli.parse_arguments("python -m drlora_jax.train", __doc__, argv)
    config = load_config(args.config, args.overrides)
    run_on_calling_thread()
    hosts.join(config.run.heartbeat_timeout)
    job = prepare(config)
    check_sinks(job.config.run)
    print("\n".join(job.lines), flush=True)
    cache = keep_compiled_programs(jax.default_backend())
    if cache is not None:
        print(f"programs    compiled ones are kept in {cache}")
    run = build(job)
    print(f"{run.backends}\n{run.forecast}\n", flush=True)
    if run.mesh.size > 1:
        trees = {"params": run.abstract_params, "lora": run.abstract_state.lora}
        trees |= {"mask_LER": run.abstract_state.mask_LER, "stats": run.abstract_state.stats}
        print("\n".join(mesh_lib.partition_lines(run.mesh, trees)), "\n", flush=True)
    job.run_dir.check_writable(checkpoint_bytes(run.abstract_state), job.config.run.keep_last)
    if args.dry_run:
        compiled, _ = compile_step(run)
        print("\n".join(memory_lines(run.abstract_params, run.abstract_state, compiled)))
        print("dry run: everything checks out, nothing was written")
        return EXIT_DONE
    return train(run)


def train(run: Run) -> int:
    """Creates or resumes the run and takes its steps; returns the exit code."""
    with Watchdog(run.job.config.run.stall_timeout) as watchdog:
        # All have looked at the run directory before the first writes to it.
        check_processes_agree(run, "before the start", 0)
        with run.job.run_dir.locked():
            return _train(run, watchdog)


def _train(run: Run, watchdog: Watchdog) -> int:
    job, config = run.job, run.job.config
    checkpoints = Checkpoints(job.run_dir.checkpoints, keep_last=config.run.keep_last)
    done = checkpoints.latest_step() or 0
    check_processes_agree(run, "at the start", done)
    if job.is_new:
        facts = made_with(run.mesh, job.model_config.moe_layers, job.policy, job.adapter.max_rank)
        job.run_dir.create(config, job.origin, job.schedule_steps, facts)
    check_run_dir_is_shared(run)
    if done >= job.total_steps:
        print(f"already complete: {job.run_dir.path} is at step {done} of {job.total_steps}")
        return EXIT_DONE
    job.run_dir.cut_back(done)
    with StopSignals() as stop:
        watchdog.beat("compiling")
        compiled, seconds = compile_step(run)
        keep_freed_memory(jax.default_backend())  # what compiling took is given back
        print("\n".join(memory_lines(run.abstract_params, run.abstract_state, compiled)))
        how = "resuming" if done else "starting"
        print(f"compiled in {seconds:.1f} s; {how} at step {done}\n", flush=True)
        watchdog.beat("loading the base")
        params = load_params(
            job.model_config, job.directory, run.abstract_params, done=watchdog.again
        )
        if hosts.is_main():
            job.run_dir.sinks = open_sinks(config.run, job.run_dir.path, done)
        with (
            ReportWriter(job.run_dir.path, writes=hosts.is_main()) as report,
            Progress(job.total_steps, done) as progress,
        ):
            try:
                with hosts.leaving_with_peers(progress.close):
                    watchdog.beat("restoring")
                    position = (
                        restore(run, checkpoints, done)
                        if done
                        else start_profiled(run, params, done=watchdog.again)
                    )
                    around = Around(checkpoints, stop, report, progress, watchdog)
                    return _loop(run, compiled, params, position, around)
            finally:
                for each in (*job.run_dir.sinks, checkpoints):
                    each.close()


class Around(NamedTuple):
    """What the loop talks to."""

    checkpoints: Checkpoints
    stop: StopSignals
    report: ReportWriter
    progress: Progress
    watchdog: Watchdog


def _loop(run: Run, compiled, params, position: Position, around: Around) -> int:
    job, section = run.job, run.job.config.train
    checkpoints, stop, report, progress, watchdog = around
    step = int(position.state.step)
    is_stopping = stop.reached(step)
    if job.policy.last_event or np.unique(position.capacity.ranks_LE).size > 1:
        _show_ranks(run, position, progress)
    meter = Throughput(flops_per_token(job.model_config, section.sequence_length), run.mesh.size)
    rows = mesh_lib.rows(run.mesh, leading=1)
    if step == 0 and job.eval_batches and not is_stopping:
        watchdog.beat("evaluating before step 1")
        row = {"step": 0, "eval_loss": evaluate(run, params, position.state, watchdog.again)}
        job.run_dir.log_metrics(row)
        progress.show(row)
    meter.resume()

    def make(step):
        first_row = step * section.batch_size
        batch = sharded_batch(job.loader, first_row, section.micro_batches, rows)
        return batch, job.loader.token_count(first_row)

    def log_row(step, tokens, metrics, more=None):
        _require_finite(run, step, metrics, params)
        row = _metrics_row(run, step, tokens, metrics) | meter.take() | peak_memory() | (more or {})
        job.run_dir.log_metrics(row)
        progress.show(row)

    late = None  # a row that is logged while the next step runs: reading it would wait for its own
    batches = made_ahead(make, range(step, job.total_steps))
    while step < job.total_steps and not is_stopping:
        watchdog.beat(f"step {step + 1}")
        device_batch, tokens = next(batches)
        state, metrics = compiled(params, position.state, device_batch)
        if late is not None:
            late()
            late = None
        step += 1
        position = Position(state, position.capacity, position.tokens + tokens)
        meter.add(tokens)
        progress.advance()
        is_stopping = stop.reached(step)
        due = _due(job, step)
        if due.event or due.evaluation or due.checkpoint or is_stopping:
            _require_finite(run, step, metrics, params)
        if due.event:
            watchdog.beat(f"the event after step {step}")
            before, position = position, grow(run, position, step, _routing(metrics))
            progress.note(
                describe_ranks(step, before.capacity.ranks_LE, position.capacity.ranks_LE)
            )
            _show_ranks(run, position, progress)
        eval_loss = None
        if due.evaluation:
            jax.block_until_ready(position.state.step)
            watchdog.beat(f"evaluating after step {step}")
            meter.pause()
            eval_loss = evaluate(run, params, position.state, watchdog.again)
            log_row(step, position.tokens, metrics, {"eval_loss": eval_loss} | _routing(metrics))
            meter.resume()
        elif due.row and (due.checkpoint or is_stopping):
            log_row(step, position.tokens, metrics)
        elif due.row:
            late = functools.partial(log_row, step, position.tokens, metrics)
        if due.checkpoint or is_stopping:
            watchdog.beat(f"saving step {step}")
            jax.block_until_ready(position.state.step)  # so that the wait is not counted as saving
            meter.pause()
            save(run, checkpoints, position, step, eval_loss)
            report.request()
            meter.resume()
    batches.close()
    if late is not None:  # stopped between a row's step and the next
        late()
    progress.close()
    if step == job.total_steps:
        progress.note(f"done: {job.run_dir.path}")
        return EXIT_DONE
    if checkpoints.latest_step() != step and step:
        save(run, checkpoints, position, step, None)
    kept = "saved" if step else "nothing to save yet"
    progress.note(f"stopped by a signal at step {step}, {kept}; the same command goes on from here")
    return EXIT_RESUMABLE


class Due(NamedTuple):
    """What comes after a step."""

    event: bool
    evaluation: bool
    checkpoint: bool
    row: bool


def _due(job: Job, step: int) -> Due:
    config, is_last = job.config, step == job.total_steps
    evaluation = bool(job.eval_batches) and (is_last or step % config.train.eval_every == 0)
    return Due(
        event=job.policy.is_event(step),
        evaluation=evaluation,
        checkpoint=evaluation or is_last or step % config.run.checkpoint_every == 0,
        row=evaluation or is_last or step % config.run.log_every == 0,
    )


def _require_finite(run: Run, step: int, metrics: dict, params: dict) -> None:
    """Before anything is decided or saved: a checkpoint never holds a diverged state."""
    rate = run.job.config.train.learning_rate
    for name in ("loss", "grad_norm"):
        value = float(metrics[name])
        if not np.isfinite(value):
            _require_finite_base(params)
            raise RunError(
                f"{name} is {value} at step {step}; lower train.learning_rate ({rate}) in a new "
                "run.dir, or look at the data of that step. Earlier checkpoints are good."
            )


def _require_finite_base(params: dict) -> None:
    """Looked at only when something is wrong: a good base is not read twice."""
    for path, leaf in jax.tree.leaves_with_path(params):
        if not bool(jnp.isfinite(leaf).all()):
            name = "/".join(str(part.key) for part in path)
            raise RunError(
                f"The base model's weights {name} hold NaN or infinity; its files are damaged, or "
                "were written so: get them again."
            )


def _routing(metrics: dict) -> dict:
    """By layer and expert, of this step's tokens: share of the choices (a layer sums to 1) and mean
    combine weight. Nothing for a dense model.
    """
    names = {"routing_load": "load_LE", "routing_weight": "weight_LE"}
    found = {name: metrics[key] for name, key in names.items() if metrics[key] is not None}
    return {name: np.asarray(value, np.float64).round(5).tolist() for name, value in found.items()}


def _show_ranks(run: Run, position: Position, progress: Progress) -> None:
    layers, max_rank = run.job.model_config.moe_layers, run.job.adapter.max_rank
    progress.show_ranks(position.capacity.ranks_LE, max_rank, layers)


def evaluate(run: Run, params, state: TrainState, done: Callable[[], None] = lambda: None) -> float:
    """Held-out loss in nats a target token; `done` is called after each batch."""
    rows = mesh_lib.rows(run.mesh)
    nll, targets = 0.0, 0.0
    for batch in run.job.eval_batches:
        batch = hosts.place(batch, rows)
        measured = run.eval_step(params, state.lora, state.mask_LER, batch)
        nll, targets = nll + float(measured[0]), targets + float(measured[1])
        done()
    if not np.isfinite(nll):
        _require_finite_base(params)
        raise RunError(f"the held-out loss is {nll}; the model has diverged.")
    return nll / max(targets, 1.0)


def _metrics_row(run: Run, step: int, tokens: int, metrics: dict) -> dict:
    row = {
        "step": step,
        "loss": float(metrics["loss"]),
        "tokens": tokens,
        "learning_rate": float(run.schedule(step - 1)),
        "grad_norm": float(metrics["grad_norm"]),
    }
    if run.job.config.train.balance_loss or run.job.config.train.z_loss:
        row["auxiliary_loss"] = float(metrics["auxiliary_loss"])
    return row


if __name__ == "__main__":
    cli.run_and_exit(main)
