"""`python -m drlora_jax.train --config FILE.py [section.field=value ...]`: fine-tunes a model.

Config -> checked job -> mesh -> base weights -> state -> loop. Growth events happen between steps,
on the host; the step is compiled once, ahead of time, and cannot recompile. Exit codes: 0 done (or
already complete), 2 a mistake in the input, 1 the run failed, 75 stopped by a signal: the state is
saved if a step was taken, and the same command resumes.
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
from drlora_jax.data.loader import Batch, sharded_batch
from drlora_jax.data.prefetch import made_ahead
from drlora_jax.errors import EXIT_DONE, EXIT_RESUMABLE, RunError
from drlora_jax.interop.hf_read import load_params
from drlora_jax.parallel import mesh as mesh_lib
from drlora_jax.parallel import processes
from drlora_jax.parallel.agreement import check_is_shared
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
from drlora_jax.training.agreement import check_processes_agree
from drlora_jax.training.costs import (
    checkpoint_bytes,
    flops_per_token,
    memory_lines,
)
from drlora_jax.training.growth import grow, start_profiled
from drlora_jax.training.job import Job, prepare
from drlora_jax.training.metrics_rows import (
    RowWriter,
    rate_at,
    require_finite,
    require_finite_base,
    routing,
)
from drlora_jax.training.program import Run, build
from drlora_jax.training.state import Position, restore_newest, save
from drlora_jax.training.step import TrainState, compile_step

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
        print(f"cache       compiled programs in {cache}")
    run = build(job)
    _print_plan(run)
    job.run_dir.check_room(checkpoint_bytes(run.abstract_state), job.config.run.keep_last)
    if args.dry_run:
        print(COMPILING, flush=True)
        compiled, _ = compile_step(run)
        print("\n".join(memory_lines(run.abstract_params, run.abstract_state, compiled)))
        print("dry run: all checks passed, nothing was written")
        return EXIT_DONE
    return train(run)


def train(run: Run) -> int:
    """Creates or resumes the run and takes its steps; returns the exit code."""
    with Watchdog(run.job.config.run.stall_timeout) as watchdog:
        # All processes have read the run directory before the first one writes to it.
        check_processes_agree(run, "before the start", 0)
        with run.job.run_dir.locked():
            return _start_or_resume(run, watchdog)


def train_job(job: Job) -> int:
    """Creates or resumes a run and takes its steps, as the command does after its checks.

    Args:
      job: From `prepare`, perhaps with another policy: `job._replace(policy=...)`.

    Returns:
      0 when the last step was taken, now or before, and 75 when a signal stopped the run: its state
      is saved, and the same call resumes from there.

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


def _start_or_resume(run: Run, watchdog: Watchdog) -> int:
    job, config = run.job, run.job.config
    # 1. All processes have the same config, base model, data and newest checkpoint.
    checkpoints = Checkpoints(job.run_dir.checkpoints, keep_last=config.run.keep_last)
    check_processes_agree(run, "at the start", checkpoints.latest_step() or 0)
    # 2. A new run writes its config.json, which all processes must find.
    if job.is_new:
        _create(run)
    check_is_shared(job.run_dir.config_file)
    # 3. The newest undamaged checkpoint is restored; a finished run ends here.
    with processes.leaving_with_peers(lambda: None):
        watchdog.beat("restoring")
        position, done = restore_newest(run, checkpoints) or (None, 0)
    if done >= job.total_steps:
        print(_complete_line(job, done))
        return EXIT_DONE
    # 4. The logs are cut back to the step of that checkpoint.
    for note in job.run_dir.cut_back(done, config.run.log_every):
        print(f"warning: {note}")
    # 5. The step is compiled before the base model is loaded: both at once need more memory.
    watchdog.beat("compiling")
    compiled = _compile(run, done)
    watchdog.beat("loading the base model")
    params = load_params(job.model_config, job.directory, run.abstract_params, done=watchdog.again)
    # 6. Without a checkpoint, the state before step 1 is created; a policy may profile data first.
    with processes.leaving_with_peers(lambda: None):
        position = position or start_profiled(run, params, done=watchdog.again)
    return _take_steps(run, compiled, params, position, checkpoints, watchdog)


def _create(run: Run) -> None:
    job = run.job
    facts = made_with(run.mesh, job.expert_layers, job.policy, job.adapter.max_rank)
    facts["resolved"] = job.resolved.to_json()
    job.run_dir.create(job.config, job.origin, job.schedule_steps, facts)


def _compile(run: Run, done: int) -> Callable:
    print(COMPILING, flush=True)
    compiled, seconds = compile_step(run)
    keep_freed_memory(jax.default_backend())  # after the memory of compiling has been returned
    print("\n".join(memory_lines(run.abstract_params, run.abstract_state, compiled)))
    how = "resuming" if done else "starting"
    print(f"compiled in {seconds:.1f} s; {how} at step {done}\n", flush=True)
    return compiled


def _take_steps(run: Run, compiled, params, position, checkpoints, watchdog) -> int:
    job, done = run.job, int(position.state.step)
    # 7. Logs, signals, report and display are served between the steps.
    if processes.is_main():
        job.run_dir.sinks = open_sinks(job.config.run, job.run_dir.path, done)
    with (
        StopSignals() as stop,  # until now there was nothing to save, and a signal ended the run
        ReportWriter(job.run_dir.path, writes=processes.is_main()) as report,
        Progress(job.total_steps, done) as progress,
    ):
        try:
            with processes.leaving_with_peers(progress.close):
                loop = Loop(run, params, position, checkpoints, stop, report, progress, watchdog)
                return loop.take_steps(compiled)
        finally:
            for each in (*job.run_dir.sinks, checkpoints):
                each.close()


# -------------------------------------------------------------------------------------- the loop


class Loop:
    """Takes the steps of a run, and does what is due between them."""

    def __init__(self, run, params, position, checkpoints, stop, report, progress, watchdog):
        self.run, self.params, self.position = run, params, position
        self.checkpoints, self.report, self.progress = checkpoints, report, progress
        self.stop, self.watchdog = stop, watchdog
        job = run.job
        flops = flops_per_token(job.model_config, job.config.train.sequence_length)
        self.meter = Throughput(flops, run.mesh.size)
        self.rows = RowWriter(run, params, self.meter, progress)
        self.step = int(position.state.step)
        self.is_stopping = stop.reached(self.step)
        self.made = set()  # steps whose batch has been prepared and not used

    def take_steps(self, compiled) -> int:
        """Takes the remaining steps, or those until a signal; returns the exit code."""
        job, ranks_LE = self.run.job, self.position.capacity.ranks_LE
        if job.policy.last_event or np.unique(ranks_LE).size > 1:
            self._show_ranks()
        if self.step == 0 and job.eval_batches and not self.is_stopping:
            self._evaluate_first()
        batches = made_ahead(self._make_batch, range(self.step, job.total_steps))
        jax.block_until_ready(self.position.state)  # restoring does not count as the first step
        self.meter.resume()
        while self.step < job.total_steps and not self.is_stopping:
            metrics = self._take_step(compiled, batches)
            due = due_after(job, self.step, is_stopping=self.is_stopping)
            if due.pause:
                self._pause(metrics)
            if due.event:
                self._grow(metrics)
            measured = self._evaluate(metrics) if due.evaluation else {}
            if due.row:
                self.rows.add(self.step, self.position.tokens, metrics, measured)
            if due.checkpoint:
                self._save(measured.get("eval_loss"))
            if due.pause:
                self._go_on()
        batches.close()
        return self._end()

    def _make_batch(self, step: int) -> tuple[Batch, int]:
        """Returns the batch of a step on its devices, and its number of tokens."""
        job, section = self.run.job, self.run.job.config.train
        first_row, sharding = step * section.batch_size, self.run.abstract_batch.tokens_BT.sharding
        batch = sharded_batch(job.loader, first_row, section.micro_batches, sharding)
        tokens = job.loader.token_count(first_row)
        self.made.add(step)
        return batch, tokens

    def _take_step(self, compiled, batches) -> dict:
        """Takes one step; returns its metrics, which a device may still be computing."""
        self.watchdog.beat(f"step {self.step + 1}")
        if self.step not in self.made:  # the device has to wait for the batch anyway
            self.rows.finish()
        batch, tokens = next(batches)
        state, metrics = compiled(self.params, self.position.state, batch)
        self.rows.finish()
        self.made.discard(self.step)
        self.step += 1
        self.position = Position(state, self.position.capacity, self.position.tokens + tokens)
        self.meter.add(tokens)
        self.progress.advance()
        self.is_stopping = self.stop.reached(self.step)
        return metrics

    def _pause(self, metrics: dict) -> None:
        """Waits for the step, stops the meter and checks that the step's metrics are finite."""
        jax.block_until_ready(self.position.state.step)
        self.meter.pause()
        require_finite(self.run.job.config, self.step, metrics, self.params)

    def _go_on(self) -> None:
        jax.block_until_ready(self.position.state)  # including the changes of an event
        self.meter.resume()

    def _grow(self, metrics: dict) -> None:
        self.watchdog.beat(f"the event after step {self.step}")
        before_LE = self.position.capacity.ranks_LE
        self.position = grow(self.run, self.position, self.step, routing(metrics))
        ranks_LE = self.position.capacity.ranks_LE
        self.progress.note(describe_ranks(self.step, before_LE, ranks_LE))
        self._show_ranks()

    def _evaluate_first(self) -> None:
        self.watchdog.beat("evaluating before step 1")
        row = {"step": 0, "eval_loss": self._eval_loss()}
        self.run.job.run_dir.log_metrics(row)
        self.progress.show(row)

    def _evaluate(self, metrics: dict) -> dict:
        """Returns the held-out loss and the routing of this step, for its row."""
        self.watchdog.beat(f"evaluating after step {self.step}")
        return {"eval_loss": self._eval_loss()} | routing(metrics)

    def _eval_loss(self) -> float:
        return evaluate(self.run, self.params, self.position.state, self.watchdog.again)

    def _save(self, eval_loss: float | None) -> None:
        self.watchdog.beat(f"saving step {self.step}")
        save(self.run, self.checkpoints, self.position, self.step, eval_loss)
        self.report.request()

    def _end(self) -> int:
        """Finishes checkpoints, reports how the loop ended, and returns the exit code."""
        step, job = self.step, self.run.job
        self.progress.close()
        self.checkpoints.finish()
        if step == job.total_steps:
            self.progress.note(f"done: {job.run_dir.path}")
            return EXIT_DONE
        if self.checkpoints.latest_step() != step and step:
            save(self.run, self.checkpoints, self.position, step, None)
            self.checkpoints.finish()
        kept = "saved" if step else "nothing to save yet"
        self.progress.note(
            f"stopped by a signal at step {step}, {kept}; the same command resumes from here"
        )
        return EXIT_RESUMABLE

    def _show_ranks(self) -> None:
        job, ranks_LE = self.run.job, self.position.capacity.ranks_LE
        self.progress.show_ranks(ranks_LE, job.adapter.max_rank, job.expert_layers)


class Due(NamedTuple):
    """Names what is due after a step."""

    event: bool
    evaluation: bool
    checkpoint: bool
    row: bool
    # Anything is due that is not part of training and waits for the step.
    pause: bool


def due_after(job: Job, step: int, *, is_stopping: bool) -> Due:
    config, is_last = job.config, step == job.total_steps
    event = job.policy.is_event(step)
    evaluation = bool(job.eval_batches) and (is_last or step % config.train.eval_every == 0)
    ends_a_part = evaluation or is_last
    checkpoint = ends_a_part or is_stopping or step % config.run.checkpoint_every == 0
    row = ends_a_part or step % config.run.log_every == 0
    return Due(event, evaluation, checkpoint, row, pause=event or checkpoint)


def evaluate(run: Run, params, state: TrainState, done: Callable[[], None] = lambda: None) -> float:
    """Returns the held-out loss in nats per target token; `done` is called after each batch."""
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


# ------------------------------------------------------------------------- what the start prints


def _print_plan(run: Run) -> None:
    print(f"{run.backends}\n{run.forecast}\n", flush=True)
    if (line := _rate_line(run)) is not None:
        print(f"{line}\n", flush=True)
    if run.mesh.size > 1:
        trees = {"params": run.abstract_params, "lora": run.abstract_state.lora}
        trees |= {"mask_LER": run.abstract_state.mask_LER, "stats": run.abstract_state.stats}
        lines = mesh_lib.partition_lines(run.mesh, trees, run.job.policy.stat_axes)
        print("\n".join(lines), "\n", flush=True)


def _rate_line(run: Run) -> str | None:
    """Describes the learning rate of a run that is resumed with another number of steps."""
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
    requested = f"train.steps={job.total_steps}"
    if job.config.train.steps is None:
        requested = f"train.epochs={job.config.train.epochs} ({job.total_steps} steps)"
    return f"{line}, {requested} requests fewer"


if __name__ == "__main__":
    cli.run_and_exit(main, memory_advice=cli.TRAINING_ADVICE, outlives_output=True)
