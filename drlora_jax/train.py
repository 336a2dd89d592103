"""`python -m drlora_jax.train --config FILE.py [section.field=value ...]`: fine-tunes a model.

Config -> checked job -> mesh -> base weights -> state -> loop. Growth events happen between steps,
on the host; the step is compiled once, ahead of time, and can not recompile. Exit codes: 0 done (or
already complete), 2 a mistake in the input, 1 the run failed, 75 stopped by a signal with its state
saved.
"""

import functools
import json
import os
import signal
import threading
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

from drlora_jax import cli
from drlora_jax.allocation import CapacityState, Event, masks_from_ranks
from drlora_jax.checkpoint import Checkpoints
from drlora_jax.compilation import keep_compiled_programs
from drlora_jax.config import load_config, to_dict
from drlora_jax.data.loader import BATCH_DTYPES, Batch
from drlora_jax.data.prefetch import made_ahead
from drlora_jax.data.sharded import sharded_batch
from drlora_jax.errors import EXIT_DONE, EXIT_RESUMABLE, RunError
from drlora_jax.interop.hf_read import load_params
from drlora_jax.memory import Layout
from drlora_jax.metrics import Progress, Throughput, describe_ranks, peak_memory
from drlora_jax.models.transformer import Decoder, DecoderOptions, abstract_params
from drlora_jax.ops.backends import compiler_options, expert_backend
from drlora_jax.optimizer import make_optimizer
from drlora_jax.parallel import hosts
from drlora_jax.parallel import mesh as mesh_lib
from drlora_jax.parallel.sharded_ops import sharded_ops
from drlora_jax.parallel.watchdog import Watchdog
from drlora_jax.plan import (
    attention_backends,
    backend_line,
    checkpoint_bytes,
    flops_per_token,
    memory_forecast,
    memory_lines,
)
from drlora_jax.prepare import Job, prepare
from drlora_jax.provenance import made_with, versions
from drlora_jax.reorder import reorder_ranks
from drlora_jax.reporting.writer import ReportWriter
from drlora_jax.sinks import check_sinks, open_sinks
from drlora_jax.step import (
    AuxiliaryWeights,
    StepOptions,
    TrainState,
    expert_roles,
    init_lora,
    make_eval_step,
    make_train_step,
)


def main(argv=None) -> int:
    args = cli.parse_arguments("python -m drlora_jax.train", __doc__, argv)
    config = load_config(args.config, args.overrides)
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


class Run(NamedTuple):
    """A job on its mesh: functions and abstract values, nothing allocated yet."""

    job: Job
    mesh: Any
    model: Decoder
    tx: optax.GradientTransformation
    schedule: optax.Schedule
    step: Any  # jitted
    eval_step: Any  # jitted
    first_lora: Any  # jitted: the factors before step 1
    reorder: Any  # jitted: `reorder_ranks` of this model
    abstract_params: dict
    abstract_state: TrainState
    backends: str  # a line that says which implementations were chosen
    forecast: str  # a line on what the step will take


class Checkpoint(NamedTuple):
    """What a checkpoint holds: arrays and host values. The mask is derived from the ranks; the data
    position is step * batch_size and the dropout key is made of seed and step."""

    step: Any
    lora: Any
    opt_state: Any
    stats: Any
    ranks_LE: Any


def build(job: Job, devices=None) -> Run:
    """Mesh, model, optimizer and jitted functions of a job, for this process's devices or others.

    Nothing is read or allocated: of a job only config, model, adapter, policy and counts are used.
    """
    config = job.config
    mesh = mesh_lib.make_mesh(job.mesh_sizes, devices)
    platform, dtype = mesh_lib.platform_of(mesh), jnp.dtype(config.model.dtype)
    compiler = compiler_options(platform, dtype)
    wanted, length = config.model.attention, config.train.sequence_length
    attention = attention_backends(job.model_config, length, dtype, platform, wanted)
    options = DecoderOptions(
        dtype=dtype,
        adapter=job.adapter,
        ops=sharded_ops(mesh, compiler, attention=wanted, exchange=config.mesh.exchange),
        remat=config.model.remat,
    )
    model = Decoder(job.model_config, options)
    has_router = job.adapter.train_router or config.adapter.makes_experts
    router_rate = config.adapter.router_learning_rate if has_router else None
    tx, schedule = make_optimizer(config.train, job.total_steps, router_learning_rate=router_rate)
    params = abstract_params(model)
    params = mesh_lib.with_shardings(params, mesh_lib.shardings_for(mesh, params, "params"))
    state = jax.eval_shape(lambda: _initial_state(job, model, tx))
    state = mesh_lib.with_shardings(state, state_shardings(mesh, tx, state))
    layout = memory_layout(job, mesh, expert_backend(platform, compiler))
    ratio = config.allocation.warmup_ratio
    ratio = config.train.warmup_ratio if ratio is None else ratio
    step_options = StepOptions(
        auxiliary=AuxiliaryWeights(
            config.train.balance_loss, config.train.z_loss, config.train.balance_form
        ),
        freeze_idle_experts=config.adapter.freeze_idle_experts,
        freeze_a=config.adapter.freeze_a,
        router_start=int(ratio * job.schedule_steps),
        seed=config.run.seed,
    )
    return Run(
        job=job,
        mesh=mesh,
        model=model,
        tx=tx,
        schedule=schedule,
        step=jax.jit(
            make_train_step(model, tx, job.policy, step_options),
            donate_argnums=1,
            out_shardings=(_shardings(state), mesh_lib.replicated(mesh)),
            compiler_options=compiler,
        ),
        eval_step=jax.jit(
            make_eval_step(model),
            out_shardings=mesh_lib.replicated(mesh),
            compiler_options=compiler,
        ),
        first_lora=jax.jit(
            lambda: init_lora(model, jax.random.key(config.run.seed)),
            out_shardings=_shardings(state.lora),
        ),
        reorder=jax.jit(
            functools.partial(reorder_ranks, model.config, tx),
            donate_argnums=(0, 1),
            out_shardings=(_shardings(state.lora), _shardings(state.opt_state)),
        ),
        abstract_params=params,
        abstract_state=state,
        backends=backend_line(job.model_config, attention, platform, compiler),
        forecast=memory_forecast(job.model_config, layout, params, state, config.model.remat),
    )


def _initial_state(job: Job, model: Decoder, tx) -> TrainState:
    lora = init_lora(model, jax.random.key(job.config.run.seed))
    mask_LER = jnp.asarray(masks_from_ranks(job.policy.init().ranks_LE, job.adapter.max_rank))
    return TrainState(
        jnp.zeros((), jnp.int32), lora, tx.init(lora), mask_LER, job.policy.init_stats()
    )


def state_shardings(mesh, tx, state: TrainState) -> TrainState:
    """Factors, moments, masks and statistics lie with their experts; counters are everywhere."""
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
        stats=mesh_lib.shardings_for(mesh, state.stats, "stats"),
    )


def _shardings(tree):
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def compile_step(run: Run):
    """The train step compiled ahead of time, and the seconds it took."""
    start = time.perf_counter()
    inputs = run.abstract_params, run.abstract_state, abstract_batch(run)
    return run.step.lower(*inputs).compile(), time.perf_counter() - start


def memory_layout(job: Job, mesh, experts: str) -> Layout:
    """What of a run decides what a step takes."""
    section, shape = job.config.train, mesh.shape
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
        roles=len(expert_roles(job.adapter)),
        reads_stacks=experts == "block" and mesh.size == 1,
    )


def abstract_batch(run: Run) -> Batch:
    """What a step's batch [M, B, T] is, on its shardings."""
    section = run.job.config.train
    micro, length = section.batch_size // section.micro_batches, section.sequence_length
    rows = mesh_lib.rows(run.mesh, leading=1)
    shape = (section.micro_batches, micro, length)
    return Batch(*(jax.ShapeDtypeStruct(shape, kind, sharding=rows) for kind in BATCH_DTYPES))


# --------------------------------------------------------------------------------------------- loop


class Position(NamedTuple):
    """Where a run is."""

    state: TrainState
    capacity: CapacityState
    tokens: int  # non-padding tokens so far


def train(run: Run) -> int:
    """Creates or resumes the run and takes its steps; returns the exit code."""
    with Watchdog(run.job.config.run.stall_timeout) as watchdog:
        # All have looked at the run directory before the first writes to it.
        _agree(run, "before the start", 0)
        with run.job.run_dir.locked():
            return _train(run, watchdog)


def _train(run: Run, watchdog: Watchdog) -> int:
    job, config = run.job, run.job.config
    checkpoints = Checkpoints(job.run_dir.checkpoints, keep_last=config.run.keep_last)
    done = checkpoints.latest_step() or 0
    _agree(run, "at the start", done)
    if job.is_new:
        facts = made_with(run.mesh, job.model_config.moe_layers, job.policy, job.adapter.max_rank)
        job.run_dir.create(config, job.origin, job.schedule_steps, facts)
    if done >= job.total_steps:
        print(f"already complete: {job.run_dir.path} is at step {done} of {job.total_steps}")
        return EXIT_DONE
    job.run_dir.cut_back(done)
    with _StopSignals() as stop:
        watchdog.beat("compiling")
        compiled, seconds = compile_step(run)
        print("\n".join(memory_lines(run.abstract_params, run.abstract_state, compiled)))
        how = "resuming" if done else "starting"
        print(f"compiled in {seconds:.1f} s; {how} at step {done}\n", flush=True)
        watchdog.beat("loading the base")
        params = load_params(job.model_config, job.directory, run.abstract_params)
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
                        restore(run, checkpoints, done) if done else start_profiled(run, params)
                    )
                    around = Around(checkpoints, stop, report, progress, watchdog)
                    return _loop(run, compiled, params, position, around)
            finally:
                for each in (*job.run_dir.sinks, checkpoints):
                    each.close()


class Around(NamedTuple):
    """What the loop talks to."""

    checkpoints: Checkpoints
    stop: "_StopSignals"
    report: ReportWriter
    progress: Progress
    watchdog: Watchdog


class _StopSignals:
    """SIGTERM and SIGINT ask for a stop at the next step; a second one ends the process at once.

    With several processes jax hears SIGTERM, tells the others, and all stop at the same step.
    """

    def __init__(self):
        self._numbers: list[int] = []
        self._before: dict = {}

    def __enter__(self):
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread may set handlers
        is_alone = jax.process_count() == 1
        numbers = (signal.SIGTERM, signal.SIGINT) if is_alone else (signal.SIGINT,)
        ask = self._ask if is_alone else self._ask_all
        self._before = {number: signal.signal(number, ask) for number in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number, _):
        self._numbers.append(number)
        signal.signal(number, self._before[number])

    def _ask_all(self, number, _):
        signal.signal(number, self._before[number])
        os.kill(os.getpid(), signal.SIGTERM)

    def reached(self, step: int) -> bool:
        """Whether the run is to stop after this step; to be asked once after every step."""
        if jax.process_count() == 1:
            return bool(self._numbers)
        return multihost_utils.reached_preemption_sync_point(step)


def start(run: Run) -> Position:
    """The state before step 1, made on its shardings."""
    make = jax.jit(
        lambda: _initial_state(run.job, run.model, run.tx),
        out_shardings=_shardings(run.abstract_state),
    )
    return Position(make(), run.job.policy.init(), 0)


def start_profiled(run: Run, params) -> Position:
    """The same for a policy that first wants to see how the base routes the task."""
    position, policy = start(run), run.job.policy
    if policy.start is None:
        return position
    capacity, event = policy.start(profile(run, params, position.state))
    log_event(run, 0, capacity, event)
    state = position.state._replace(mask_LER=_place_mask(run, capacity))
    return Position(state, capacity, 0)


def profile(run: Run, params, state: TrainState) -> np.ndarray:
    """How often the valid tokens of the first `profile_rows` training rows (whole batches) choose
    each expert, [L, E]. The factors are still zero, so it is the base that chooses.
    """
    section, total_LE = run.job.config.train, 0.0
    rows = section.batch_size // section.micro_batches
    for first in range(0, run.job.policy.profile_rows, rows):
        batch = run.job.loader.batch(first)
        micro = jax.tree.map(lambda array: array[:rows], batch)
        micro = hosts.place(micro, mesh_lib.rows(run.mesh))
        _, _, stats = run.eval_step(params, state.lora, state.mask_LER, micro)
        total_LE = total_LE + np.asarray(stats.count_E, np.float64)
    return total_LE


def restore(run: Run, checkpoints: Checkpoints, step: int) -> Position:
    """The state after `step`, on this run's mesh."""
    abstract = run.abstract_state
    ranks = jax.ShapeDtypeStruct(
        abstract.mask_LER.shape[:2], jnp.int32, sharding=mesh_lib.replicated(run.mesh)
    )
    wanted = Checkpoint(abstract.step, abstract.lora, abstract.opt_state, abstract.stats, ranks)
    saved, host = checkpoints.restore(step, wanted, host_names=("tokens",))
    capacity = CapacityState(np.array(hosts.to_host(saved.ranks_LE)))
    mask_LER = _place_mask(run, capacity)
    state = TrainState(saved.step, saved.lora, saved.opt_state, mask_LER, saved.stats)
    return Position(state, capacity, host["tokens"])


def save(
    run: Run, checkpoints: Checkpoints, position: Position, step: int, eval_loss: float | None
) -> None:
    _agree(run, f"before step {step} is saved", step, position)
    state = position.state
    ranks_LE = hosts.place(position.capacity.ranks_LE, mesh_lib.replicated(run.mesh))
    arrays = Checkpoint(state.step, state.lora, state.opt_state, state.stats, ranks_LE)
    checkpoints.save(step, arrays, {"tokens": position.tokens}, eval_loss=eval_loss)


def _reordered(run: Run, state: TrainState, order_LER: np.ndarray, mask_LER) -> TrainState:
    """The state with its rank rows moved, on the same shardings."""
    order_LER = hosts.place(order_LER, mask_LER.sharding)
    lora, opt_state = run.reorder(
        state.lora, state.opt_state, run.first_lora(), order_LER, mask_LER
    )
    return state._replace(lora=lora, opt_state=opt_state)


def _place_mask(run: Run, capacity: CapacityState):
    # Same shape, dtype and sharding as ever: a new mask is new values, not a new program.
    mask_LER = masks_from_ranks(capacity.ranks_LE, run.job.adapter.max_rank)
    return hosts.place(mask_LER, run.abstract_state.mask_LER.sharding)


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
        row = {"step": 0, "eval_loss": evaluate(run, params, position.state)}
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
            eval_loss = evaluate(run, params, position.state)
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


def grow(run: Run, position: Position, step: int, routing: dict | None = None) -> Position:
    """An event: statistics to the host, new ranks, new mask values back.

    All processes see the same statistics; process 0 decides.
    """
    job, state = run.job, position.state
    _agree(run, f"at the event after step {step}", step, position)
    stats = hosts.to_host(state.stats)
    decided = hosts.from_main(job.policy.update(position.capacity, stats, step))
    capacity, stats, event = decided
    log_event(run, step, capacity, event, routing)
    stats = hosts.place(stats, _shardings(run.abstract_state.stats))
    mask_LER = _place_mask(run, capacity)
    if event.order_LER is not None:
        state = _reordered(run, state, event.order_LER, mask_LER)
    state = state._replace(mask_LER=mask_LER, stats=stats)
    return Position(state, capacity, position.tokens)


def _agree(run: Run, when: str, step: int, position: Position | None = None) -> None:
    """Raises RunError when the processes differ in what must be the same."""
    if jax.process_count() == 1:
        return
    config = to_dict(run.job.config)
    for section, name in (("run", "dir"), ("model", "path"), ("data", "path")):
        config[section].pop(name)  # where things are may differ by host; what they are may not
    fields = {
        "step": hosts.digest(str(step)),
        "config": hosts.digest(json.dumps(config)),
        "base": hosts.digest(run.job.origin["base_fingerprint"]),
        "data": hosts.digest(run.job.origin["data_fingerprint"]),
        "versions": hosts.digest(json.dumps(versions())),
    }
    truths = {}
    if position is not None:
        ranks_LE = position.capacity.ranks_LE
        expected_LER = masks_from_ranks(ranks_LE, run.job.adapter.max_rank)
        held = hosts.digest_on_devices(position.state.mask_LER, expected_LER)
        fields |= {"ranks": hosts.digest(ranks_LE), "mask": held}
        truths = {"mask": hosts.digest(expected_LER)}
    hosts.check_agreement(when, fields, truths)


def log_event(
    run: Run, step: int, capacity: CapacityState, event: Event, routing: dict | None = None
) -> None:
    layers, budget = run.job.model_config.moe_layers, run.job.policy.budget
    run.job.run_dir.log_ranks(step, layers, capacity.ranks_LE, event.saliency_LE, budget, routing)


def evaluate(run: Run, params, state: TrainState) -> float:
    """Held-out loss in nats a target token."""
    rows = mesh_lib.rows(run.mesh)
    nll, targets = 0.0, 0.0
    for batch in run.job.eval_batches:
        batch = hosts.place(batch, rows)
        measured = run.eval_step(params, state.lora, state.mask_LER, batch)
        nll, targets = nll + float(measured[0]), targets + float(measured[1])
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
