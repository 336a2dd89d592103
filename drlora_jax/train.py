"""`python -m drlora_jax.train --config FILE.py [section.field=value ...]`: fine-tunes a model.

Config -> checked job -> mesh -> base weights -> state -> loop. Growth events happen between steps,
on the host; the step is compiled once, ahead of time, and can not recompile. Exit codes: 0 done (or
already complete), 2 a mistake in the input, 1 the run failed, 75 stopped by a signal: its state is
saved if a step was taken, and the same command goes on.
"""

import functools
import sys
import types
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from drlora_jax import cli
from drlora_jax.config import load_config
from drlora_jax.data.prefetch import made_ahead
from drlora_jax.data.sharded import sharded_batch
from drlora_jax.errors import EXIT_DONE, EXIT_RESUMABLE, RunError
from drlora_jax.interop.hf_read import load_params
from drlora_jax.parallel import mesh as mesh_lib
from drlora_jax.parallel import processes
from drlora_jax.parallel.watchdog import Watchdog
from drlora_jax.reporting.progress import Progress, Throughput, describe_ranks
from drlora_jax.reporting.writer import ReportWriter
from drlora_jax.runs.checkpoint import Checkpoints
from drlora_jax.runs.provenance import made_with
from drlora_jax.runs.resume import rate_line
from drlora_jax.runs.sinks import check_sinks, open_sinks
from drlora_jax.system.compilation import keep_compiled_programs
from drlora_jax.system.host_memory import keep_freed_memory, run_on_calling_thread
from drlora_jax.system.stop_signals import StopSignals
from drlora_jax.training.costs import (
    checkpoint_bytes,
    flops_per_token,
    memory_lines,
)
from drlora_jax.training.growth import grow, start_profiled
from drlora_jax.training.job import Job, prepare
from drlora_jax.training.metrics_rows import RowWriter, require_finite, require_finite_base, routing
from drlora_jax.training.optimizer import rate_at
from drlora_jax.training.program import Run, build, compile_step
from drlora_jax.training.state import (
    Position,
    check_processes_agree,
    check_run_dir_is_shared,
    restore_newest,
    save,
)
from drlora_jax.training.step import TrainState

COMPILING = "compiling the train step; this takes seconds to minutes ..."


def main(argv=None) -> int:
    args = cli.parse_arguments("python -m drlora_jax.train", __doc__, argv)
    config = load_config(args.config, args.overrides)
    run_on_calling_thread()
    processes.join(config.run.heartbeat_timeout)
    check_sinks(config.run)
    job = prepare(config)
    print("\n".join(job.lines), flush=True)
    cache = keep_compiled_programs(jax.default_backend())
    if cache is not None:
        print(f"programs    compiled ones are kept in {cache}")
    run = build(job)
    print(f"{run.backends}\n{run.forecast}\n", flush=True)
    if (line := _rate_line(run)) is not None:
        print(f"{line}\n", flush=True)
    if run.mesh.size > 1:
        trees = {"params": run.abstract_params, "lora": run.abstract_state.lora}
        trees |= {"mask_LER": run.abstract_state.mask_LER, "stats": run.abstract_state.stats}
        print("\n".join(mesh_lib.partition_lines(run.mesh, trees)), "\n", flush=True)
    job.run_dir.check_room(checkpoint_bytes(run.abstract_state), job.config.run.keep_last)
    if args.dry_run:
        print(COMPILING, flush=True)
        compiled, _ = compile_step(run)
        print("\n".join(memory_lines(run.abstract_params, run.abstract_state, compiled)))
        print("dry run: everything checks out, nothing was written")
        return EXIT_DONE
    return train(run)


def _rate_line(run: Run) -> str | None:
    """What to tell of the learning rate of a run that is resumed with another number of steps."""
    job = run.job
    if job.is_new:
        return None
    done = job.run_dir.newest_step()
    return rate_line(
        job.run_dir.last_rate(done),
        functools.partial(rate_at, run.schedule),
        done=done,
        first_total=job.schedule_steps,
        total=job.total_steps,
        name="train.steps" if job.config.train.steps else "steps",
    )


def _complete_line(job: Job, done: int) -> str:
    line = f"already complete: {job.run_dir.path} is at step {done}"
    if done == job.total_steps:
        return f"{line} of {done}"
    asked = f"train.steps={job.total_steps}"
    if job.config.train.steps is None:
        asked = f"train.epochs={job.config.train.epochs} ({job.total_steps} steps)"
    return f"{line}, {asked} asks for fewer"


def train(run: Run) -> int:
    """Creates or resumes the run and takes its steps; returns the exit code."""
    with Watchdog(run.job.config.run.stall_timeout) as watchdog:
        # All have looked at the run directory before the first writes to it.
        check_processes_agree(run, "before the start", 0)
        with run.job.run_dir.locked():
            return _train(run, watchdog)


def train_job(job: Job) -> int:
    """Creates or resumes a run and takes its steps; what the command does after its checks.

    Args:
      job: From `prepare`, perhaps with another policy: `job._replace(policy=...)`.

    Returns:
      0 when the last step was taken, now or before, and 75 when a signal stopped the run: its state
      is saved, and the same call goes on from there.

    Raises:
      UserError: If the directory of the run is in use or has no room.
      RunError: If the run cannot go on, such as after a diverged loss.
    """
    return train(build(job))


class _Callable(types.ModuleType):
    """Lets `drlora_jax.train` be this module and the function of the public API."""

    def __call__(self, job: Job) -> int:
        return train_job(job)


sys.modules[__name__].__class__ = _Callable


def _train(run: Run, watchdog: Watchdog) -> int:
    job, config = run.job, run.job.config
    checkpoints = Checkpoints(job.run_dir.checkpoints, keep_last=config.run.keep_last)
    check_processes_agree(run, "at the start", checkpoints.latest_step() or 0)
    if job.is_new:
        facts = made_with(run.mesh, job.model_config.moe_layers, job.policy, job.adapter.max_rank)
        facts["resolved"] = job.resolved.to_json()
        job.run_dir.create(config, job.origin, job.schedule_steps, facts)
    check_run_dir_is_shared(run)
    with processes.leaving_with_peers(lambda: None):
        watchdog.beat("restoring")
        position, done = restore_newest(run, checkpoints) or (None, 0)
    if done >= job.total_steps:
        print(_complete_line(job, done))
        return EXIT_DONE
    for note in job.run_dir.cut_back(done, config.run.log_every):
        print(f"warning: {note}")
    watchdog.beat("compiling")
    print(COMPILING, flush=True)
    compiled, seconds = compile_step(run)
    keep_freed_memory(jax.default_backend())  # what compiling took is given back
    print("\n".join(memory_lines(run.abstract_params, run.abstract_state, compiled)))
    how = "resuming" if done else "starting"
    print(f"compiled in {seconds:.1f} s; {how} at step {done}\n", flush=True)
    watchdog.beat("loading the base")
    params = load_params(job.model_config, job.directory, run.abstract_params, done=watchdog.again)
    with processes.leaving_with_peers(lambda: None):
        position = position or start_profiled(run, params, done=watchdog.again)
    if processes.is_main():
        job.run_dir.sinks = open_sinks(config.run, job.run_dir.path, done)
    with (
        StopSignals() as stop,  # before this there was nothing to save, and a signal ends at once
        ReportWriter(job.run_dir.path, writes=processes.is_main()) as report,
        Progress(job.total_steps, done) as progress,
    ):
        try:
            with processes.leaving_with_peers(progress.close):
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
    rows = RowWriter(run, params, meter, progress)
    sharding = mesh_lib.rows(run.mesh, leading=1)
    if step == 0 and job.eval_batches and not is_stopping:
        watchdog.beat("evaluating before step 1")
        row = {"step": 0, "eval_loss": evaluate(run, params, position.state, watchdog.again)}
        job.run_dir.log_metrics(row)
        progress.show(row)
    made = set()  # steps whose batch waits for its use

    def make(step):
        first_row = step * section.batch_size
        batch = sharded_batch(job.loader, first_row, section.micro_batches, sharding)
        tokens = job.loader.token_count(first_row)
        made.add(step)
        return batch, tokens

    batches = made_ahead(make, range(step, job.total_steps))
    jax.block_until_ready(position.state)  # restoring is not the first step's time
    meter.resume()
    while step < job.total_steps and not is_stopping:
        watchdog.beat(f"step {step + 1}")
        if step not in made:  # the device waits for the batch anyway
            rows.finish()
        device_batch, tokens = next(batches)
        state, metrics = compiled(params, position.state, device_batch)
        rows.finish()
        made.discard(step)
        step += 1
        position = Position(state, position.capacity, position.tokens + tokens)
        meter.add(tokens)
        progress.advance()
        is_stopping = stop.reached(step)
        due = _due(job, step)
        has_more = due.event or due.evaluation or due.checkpoint or is_stopping
        if has_more:
            jax.block_until_ready(position.state.step)
            meter.pause()
            require_finite(run.job.config, step, metrics, params)
        if due.event:
            watchdog.beat(f"the event after step {step}")
            before, position = position, grow(run, position, step, routing(metrics))
            progress.note(
                describe_ranks(step, before.capacity.ranks_LE, position.capacity.ranks_LE)
            )
            _show_ranks(run, position, progress)
        eval_loss, more = None, {}
        if due.evaluation:
            watchdog.beat(f"evaluating after step {step}")
            eval_loss = evaluate(run, params, position.state, watchdog.again)
            more = {"eval_loss": eval_loss} | routing(metrics)
        if due.row:
            rows.add(step, position.tokens, metrics, more)
        if due.checkpoint or is_stopping:
            watchdog.beat(f"saving step {step}")
            save(run, checkpoints, position, step, eval_loss)
            report.request()
        if has_more:
            jax.block_until_ready(position.state)  # what an event did to it
            meter.resume()
    batches.close()
    progress.close()
    checkpoints.finish()  # what is said next is true
    if step == job.total_steps:
        progress.note(f"done: {job.run_dir.path}")
        return EXIT_DONE
    if checkpoints.latest_step() != step and step:
        save(run, checkpoints, position, step, None)
        checkpoints.finish()
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


def _show_ranks(run: Run, position: Position, progress: Progress) -> None:
    layers, max_rank = run.job.model_config.moe_layers, run.job.adapter.max_rank
    progress.show_ranks(position.capacity.ranks_LE, max_rank, layers)


def evaluate(run: Run, params, state: TrainState, done: Callable[[], None] = lambda: None) -> float:
    """Held-out loss in nats a target token; `done` is called after each batch."""
    rows = mesh_lib.rows(run.mesh)
    nll, targets = 0.0, 0.0
    for batch in run.job.eval_batches:
        batch = processes.place(batch, rows)
        measured = run.eval_step(params, state.lora, state.mask_LER, batch)
        nll, targets = nll + float(measured[0]), targets + float(measured[1])
        done()
    if not np.isfinite(nll):
        require_finite_base(params)
        raise RunError(f"the held-out loss is {nll}; the model has diverged.")
    return nll / max(targets, 1.0)


if __name__ == "__main__":
    cli.run_and_exit(main, memory_advice=cli.TRAINING_ADVICE, outlives_output=True)
