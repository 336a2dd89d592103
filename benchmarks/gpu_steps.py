"""Measures whole training steps on one device, for `gpu.py`: rate and memory, an event between two
steps, and a profile.
"""

import collections
import functools
import json
import re
import statistics
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from gpu_setting import GIB, Setting, attempt, device_limit, device_peak, in_gib, rate_shares
from jobs import MODELS, Step, abstract_job, forecast_bytes
from shapes import OLMOE, TINY
from timing import median_seconds, seconds_of

from drlora_jax import train
from drlora_jax.allocation import CapacityState
from drlora_jax.config import (
    AdapterSection,
    AllocationSection,
    ModelSection,
    TrainConfig,
    TrainSection,
)
from drlora_jax.training.costs import flops_per_token
from drlora_jax.training.memory import compiled_bytes
from drlora_jax.training.program import Run, place_mask, shardings_of

RANK = 32  # allocated
QWEN3 = MODELS / "Qwen3-30B-A3B-shape.json"
TINY_QWEN3 = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_local_experts": 16,
    "num_experts_per_tok": 4,
}
TRACED_STEPS = 2
KERNELS = 12  # of the table
DEVICES = ("/device:GPU", "/device:TPU")  # begin the names of their planes in a trace
# Begin the names of a CPU's events that compute nothing.
NO_KERNELS = ("ThunkExecutor", "ThreadpoolListener", "end: ")


def olmoe_values(setting: Setting) -> dict:
    return TINY if setting.tiny else OLMOE


def step_config(setting: Setting, case: str) -> TrainConfig:
    """Returns the config of a case, which is rows and rematerialisation, such as "2 selective"."""
    rows, remat = case.split()
    length = 32 if setting.tiny else 4096
    return TrainConfig(
        model=ModelSection(dtype=setting.dtype, remat=remat),
        train=TrainSection(steps=1000, batch_size=int(rows), sequence_length=length),
        adapter=AdapterSection(targets=("gate", "up", "down", "q", "v"), dropout=0.0),
        allocation=AllocationSection(kind="dr_lora", r_target=16, r_max=RANK, interval=100),
    )


def step(setting: Setting, case: str):
    """Yields the row of a step of the OLMoE shape."""
    config = step_config(setting, case)
    yield attempt(label(config), lambda: measure(setting, config, olmoe_values(setting)))


def qwen3(setting: Setting, case: str):
    """Yields the row of a step of the Qwen3-30B-A3B shape, if the forecast fits into memory."""
    values = json.loads(QWEN3.read_text()) | (TINY_QWEN3 if setting.tiny else {})
    config = step_config(setting, case)

    def measure_if_it_fits() -> dict:
        expected, limit = forecast_bytes(build(config, values)), device_limit()
        if limit is not None and expected > limit:
            sizes = f"{expected / GIB:.1f} GiB, the device has {limit / GIB:.1f}"
            return {"skipped": f"the forecast is {sizes}"}
        return measure(setting, config, values)

    yield attempt(label(config), measure_if_it_fits)


def label(config: TrainConfig) -> dict:
    section = config.train
    sizes = {"rows": section.batch_size, "length": section.sequence_length}
    return sizes | {"remat": config.model.remat}


def build(config: TrainConfig, values: dict) -> Run:
    return train.build(abstract_job(config, values, 1), jax.devices()[:1])


def make_step(config: TrainConfig, values: dict) -> Step:
    return Step(config, values, random_params(build(config, values).abstract_params))


def measure(setting: Setting, config: TrainConfig, values: dict) -> dict:
    """Measures rate, shares and memory of a compiled step.

    The device's peak is that of the process, so a process takes one case only; weights are made so
    that this takes little more than what lies there in the end. Operations are 4 N + attention.
    Compiling takes less where the cache has the program.
    """
    step = make_step(config, values)
    made = device_peak()
    first = float(step()["loss"])
    metrics: dict = {}
    seconds = median_seconds(lambda: metrics.update(step()) or metrics, repeats=setting.repeats)
    section, found = config.train, compiled_bytes(step.compiled)
    rate = section.batch_size * section.sequence_length / seconds
    flops = flops_per_token(step.run.job.model_config, section.sequence_length)
    load_LE = np.asarray(metrics["load_LE"], np.float64)
    forecast, peak = forecast_bytes(step.run), device_peak()
    measured = peak or (found and found.total)
    return {
        "backends": step.run.backends,
        "tokens_per_second": rate,
        "step_ms": 1e3 * seconds,
        "forecast_gib": in_gib(forecast),
        "compiled_gib": in_gib(found and found.total),
        "peak_gib": in_gib(peak),
        "peak_before_the_step_gib": in_gib(made),
        "forecast_of_measured": measured and forecast / measured,
        "measured": "peak" if peak else "compiled",
        "compile_seconds": step.compile_seconds,
        "largest_load_of_mean": float((load_LE / load_LE.mean(axis=1, keepdims=True)).max()),
        "losses": [first, float(metrics["loss"])],
    } | rate_shares(setting, rate * flops)


def random_params(abstract: dict) -> dict:
    """Returns normal weights and norms of ones, built layer by layer, so that no leaf exists
    twice.
    """

    def make(path, like):
        if path[-1].key == "scale":
            return jnp.ones(like.shape, like.dtype, device=like.sharding)
        # Stacks of layers [L, ...], of experts [L, E, ...], and plain matrices by their rows.
        pieces, shape = like.shape[0], like.shape[1:]
        deviation = 1.0 if path[-1].key == "embedding" else like.shape[-2] ** -0.5
        key = jax.random.fold_in(jax.random.key(0), sum(map(ord, jax.tree_util.keystr(path))))

        @functools.partial(jax.jit, out_shardings=like.sharding)
        def numbers(key):
            def one(index):
                piece = jax.random.normal(jax.random.fold_in(key, index), shape, like.dtype)
                return (piece * deviation).astype(like.dtype)

            if len(shape) < 2:
                return jax.random.normal(key, like.shape, like.dtype) * deviation
            return jax.lax.map(one, jnp.arange(pieces))

        return numbers(key)

    return jax.tree.map_with_path(make, abstract)


# -------------------------------------------------------------------------------------------- event


def event(setting: Setting, case: str):
    """Measures an event between two steps: statistics to the host, a decision, new mask values
    back.
    """
    yield attempt({}, lambda: _measure_event(setting))


def _measure_event(setting: Setting) -> dict:
    step = make_step(step_config(setting, "2 selective"), olmoe_values(setting))
    run = step.run
    between = median_seconds(step, repeats=setting.repeats)
    policy, capacity = run.job.policy, run.job.policy.init()
    events, after = [], []
    for index in range(10):
        start = time.perf_counter()
        stats = jax.device_get(step.state.stats)
        capacity, stats, _ = policy.update(capacity, stats, 100 + index)
        capacity = CapacityState(np.minimum(capacity.ranks_LE, RANK))
        mask_LER = place_mask(run, capacity)
        stats = jax.device_put(stats, shardings_of(run.abstract_state.stats))
        step.state = jax.block_until_ready(step.state._replace(mask_LER=mask_LER, stats=stats))
        events.append(time.perf_counter() - start)
        # The program is called as it was compiled; another shape or sharding would raise here.
        after.append(seconds_of(step))
    taken = statistics.median(events)
    return {
        "event_ms": 1e3 * taken,
        "event_steps": taken / between,
        "step_ms": 1e3 * between,
        "step_after_an_event_ms": 1e3 * statistics.median(after),
        "ranks": [int(capacity.ranks_LE.min()), int(capacity.ranks_LE.max())],
    }


# ------------------------------------------------------------------------------------------ profile


def profile(setting: Setting, case: str):
    """Lists the kernels of the step of 2 rows by their time."""
    yield attempt({"rows": 2, "remat": "selective"}, lambda: _profiled(setting))


def _profiled(setting: Setting) -> dict:
    step = make_step(step_config(setting, "2 selective"), olmoe_values(setting))
    for _ in range(3):
        jax.block_until_ready(step())
    folder = setting.folder / "trace"
    with jax.profiler.trace(str(folder)):
        for _ in range(TRACED_STEPS):
            jax.block_until_ready(step())
    files = sorted(folder.rglob("*.xplane.pb"))
    if not files:
        return {"error": "the profiler wrote no trace"}
    seconds, calls = kernel_times(jax.profiler.ProfileData.from_file(str(files[-1])))
    total = sum(seconds.values())
    if not total:
        return {"error": "the trace has no kernels"}
    table = [
        {
            "kernel": name[:80],
            "ms": 1e3 * taken / TRACED_STEPS,
            "share": taken / total,
            "calls": calls[name] / TRACED_STEPS,
        }
        for name, taken in seconds.most_common(KERNELS)
    ]
    return {"all_kernels_ms": 1e3 * total / TRACED_STEPS, "kernels": table}


def kernel_times(trace) -> tuple[collections.Counter, collections.Counter]:
    """Returns (seconds, calls) by name without trailing numbers; time inside a nested event counts
    only for that event.
    """
    seconds, calls = collections.Counter(), collections.Counter()
    for line in _kernel_lines(trace):
        events = ((e.start_ns, e.start_ns + e.duration_ns, e.name) for e in line.events)
        open_events: list[tuple[float, str]] = []
        for start, end, name in sorted(events, key=lambda each: (each[0], -each[1])):
            name = re.sub(r"([._]\d+)+$", "", name)
            while open_events and open_events[-1][0] <= start:
                open_events.pop()
            if open_events:
                seconds[open_events[-1][1]] -= (end - start) / 1e9
            seconds[name] += (end - start) / 1e9
            calls[name] += 1
            open_events.append((end, name))
    for name in [name for name in seconds if name.startswith(NO_KERNELS)]:
        del seconds[name], calls[name]
    return seconds, calls


def _kernel_lines(trace) -> Iterator:
    """Returns a GPU's streams, a TPU's operations, or a CPU's compute threads."""
    devices = [plane for plane in trace.planes if plane.name.startswith(DEVICES)]
    if not devices:
        hosts = (plane for plane in trace.planes if plane.name == "/host:CPU")
        return (line for plane in hosts for line in plane.lines if "XLA" in line.name)
    lines = [line for plane in devices for line in plane.lines]
    own = [line for line in lines if line.name.startswith(("Stream", "XLA Ops"))]
    return iter(own or lines)
