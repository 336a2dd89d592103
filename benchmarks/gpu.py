"""Everything that is worth measuring on one accelerator, in one call.

    python benchmarks/gpu.py --out results.jsonl                # all parts, full sizes
    python benchmarks/gpu.py --tiny --parts bounds,step         # a rehearsal on a CPU

    bounds   a large copy and a large matrix product: the two ceilings of the device
    grouped  grouped products of OLMoE's and Qwen3-30B-A3B's experts in bf16, forward and gradients,
             by backend, uniform and skewed groups; the error against float32
    step     a whole training step of the OLMoE-1B-7B shape with random weights, by tokens a row and
             rematerialisation: tokens a second, share of the matrix ceiling (4 N + attention),
             memory
    event    new ranks in a running step: host time, and that nothing is compiled again
    peers    transformers + peft on the same device, model, batch and targets

Each line of the output is one measurement, with what failed as `error`. Times are medians after
warm-up, with the result waited for; inputs are random. Parts run in processes of their own, so that
one that runs out of memory does not end the others.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time

PARTS = ("bounds", "grouped", "step", "event", "peers")
OLMOE = {
    "model_type": "olmoe",
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "pad_token_id": 1,
    "eos_token_id": 0,
}
TINY = OLMOE | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
RANK = 32


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", help="file of JSON lines; they are printed as well")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--tiny", action="store_true", help="small shapes, float32, two steps")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    parts = args.parts.split(",")
    unknown = sorted(set(parts) - set(PARTS))
    if unknown:
        parser.error(f"unknown part {unknown[0]}; known: {', '.join(PARTS)}")
    if args.here:
        for row in {name: globals()[name] for name in PARTS}[parts[0]](args.tiny):
            print("ROW " + json.dumps({"part": parts[0]} | row), flush=True)
        return 0
    failed = False
    for part in parts:
        for row in run_apart(part, args.tiny):
            failed |= "error" in row
            line = json.dumps(row)
            print(line, flush=True)
            if args.out:
                with open(args.out, "a", encoding="utf-8") as handle:
                    handle.write(line + "\n")
    return 1 if failed else 0


def run_apart(part: str, tiny: bool):
    """The rows of one part, from a process of its own."""
    command = [sys.executable, __file__, "--here", "--parts", part, *(["--tiny"] if tiny else [])]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ
    )
    last: list[str] = []
    for line in process.stdout:
        if line.startswith("ROW "):
            yield json.loads(line.removeprefix("ROW "))
        else:
            last = [*last[-19:], line.rstrip()]
    if process.wait():
        yield {"part": part, "error": f"exit code {process.returncode}", "output": last}


def median_seconds(function, *args, repeats: int = 20, warmup: int = 3) -> float:
    import jax

    seconds = []
    for index in range(warmup + repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        if index >= warmup:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def attempt(row: dict, measure) -> dict:
    """The row with what `measure` found, or with the first line of what it raised."""
    try:
        return row | measure()
    except Exception as error:  # whatever a backend raises is a finding
        return row | {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"}


# ------------------------------------------------------------------------------------------ bounds


def bounds(tiny: bool):
    import jax
    import jax.numpy as jnp

    side = 512 if tiny else 8192
    dtype = jnp.float32 if tiny else jnp.bfloat16
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (side, side), dtype) for key in keys)
    seconds = median_seconds(jax.jit(jnp.matmul), a, b)
    yield {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "matmul_tflops": 2 * side**3 / seconds / 1e12,
    }
    big = jax.random.normal(keys[0], (side * 8, side), dtype)
    seconds = median_seconds(jax.jit(lambda x: x + 1), big)
    yield {"copy_gb_s": 2 * big.size * big.dtype.itemsize / seconds / 1e9}


# ----------------------------------------------------------------------------------------- grouped


def grouped(tiny: bool):
    import jax
    import jax.numpy as jnp
    import numpy as np

    from drlora_jax.ops.backends import RAGGED_FUSION

    cases = {"olmoe": (131072, 64, 2048, 1024), "qwen3": (131072, 128, 2048, 768)}
    if tiny:
        cases = {"tiny": (256, 8, 64, 32)}
    dtype = jnp.float32 if tiny else jnp.bfloat16
    draw = np.random.default_rng(0)
    for name, (rows, experts, width, hidden) in cases.items():
        keys = jax.random.split(jax.random.key(0), 3)
        x_PD = jax.random.normal(keys[0], (rows, width), dtype)
        w_EDF = jax.random.normal(keys[1], (experts, width, hidden), dtype) * width**-0.5
        dy_PF = jax.random.normal(keys[2], (rows, hidden), dtype)
        skewed = draw.multinomial(rows, draw.dirichlet(np.full(experts, 0.3)))
        sizes = {"uniform": np.full(experts, rows // experts), "skewed": skewed}
        for groups, size_E in sizes.items():
            size_E = jnp.asarray(size_E, jnp.int32)
            for label, product, options in _products(RAGGED_FUSION, tiny):
                row = {"shape": name, "groups": groups, "backend": label}
                case = functools.partial(
                    _grouped_case, product, options, x_PD, w_EDF, size_E, dy_PF, 3 if tiny else 20
                )
                yield attempt(row, case)


def _grouped_case(product, options, x_PD, w_EDF, size_E, dy_PF, repeats: int) -> dict:
    import jax

    def forward(x, w, size_E):
        return product(x, w, size_E)

    def backward(x, w, size_E, dy):
        return jax.vjp(lambda x: product(x, w, size_E), x)[1](dy)[0]

    ways = {
        "forward": (forward, (x_PD, w_EDF, size_E)),
        "input_gradient": (backward, (x_PD, w_EDF, size_E, dy_PF)),
    }
    operations, found = 2 * x_PD.size * w_EDF.shape[2], {}
    for way, (function, inputs) in ways.items():
        compiled = jax.jit(function, compiler_options=options)
        seconds = median_seconds(compiled, *inputs, repeats=repeats)
        found[f"{way}_tflops"] = operations / seconds / 1e12
    return found | {"error_to_f32": _error(forward, options, x_PD, w_EDF, size_E)}


def _products(fusion: str, tiny: bool):
    """(name, product(x_PD, w_EDF, size_E), compiler options) of every backend there is."""
    import jax

    ragged = functools.partial(jax.lax.ragged_dot)
    if not tiny:
        yield "ragged_dot, fused", ragged, {fusion: True}
    else:
        yield "ragged_dot", ragged, {}
    try:
        import tokamax
    except ImportError:
        return
    for implementation in ("mosaic", "triton"):
        product = functools.partial(tokamax.ragged_dot, implementation=implementation)
        yield f"tokamax {implementation}", product, {}


def _error(product, options, x_PD, w_EDF, size_E) -> float:
    """||y - y32|| / ||y32|| on the first rows, against a float32 loop over the experts."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    y = np.asarray(jax.jit(product, compiler_options=options)(x_PD, w_EDF, size_E), np.float32)
    ends = np.cumsum(np.asarray(size_E))
    rows = np.unique(np.concatenate([ends - 1, ends[:-1], [0]]).clip(0, len(y) - 1))
    owner = np.searchsorted(ends, rows, side="right")
    x = np.asarray(x_PD[jnp.asarray(rows)], np.float32)
    weights = np.asarray(w_EDF[jnp.asarray(owner)], np.float32)
    expected = np.einsum("pd,pdf->pf", x, weights)
    return float(np.linalg.norm(y[rows] - expected) / np.linalg.norm(expected))


# -------------------------------------------------------------------------------------------- step


def _build(tiny: bool, length: int, rows: int, remat: str, kind: str = "dr_lora"):
    """(run, compiled step, seconds to compile, random params, state, batch)."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jobs import abstract_job

    from drlora_jax import train
    from drlora_jax.config import (
        AdapterSection,
        AllocationSection,
        ModelSection,
        TrainConfig,
        TrainSection,
    )
    from drlora_jax.data.loader import Batch
    from drlora_jax.models.transformer import init_variables

    values = TINY if tiny else OLMOE
    config = TrainConfig(
        model=ModelSection(dtype="float32" if tiny else "bfloat16", remat=remat),
        train=TrainSection(steps=1000, batch_size=rows, sequence_length=length),
        adapter=AdapterSection(targets=("gate", "up", "down", "q", "v"), dropout=0.0),
        allocation=AllocationSection(kind=kind, r_target=16, r_max=RANK, interval=100),
    )
    run = train.build(abstract_job(config, values, 1), jax.devices()[:1])
    compiled, seconds = train.compile_step(run)
    dtype = jnp.dtype(config.model.dtype)
    make = jax.jit(
        lambda key: jax.tree.map(
            lambda leaf: leaf.astype(dtype), init_variables(run.model, key)["params"]
        )
    )
    params = make(jax.random.key(0))
    params = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), params, run.abstract_params)
    draw = np.random.default_rng(0)
    shape = (1, rows, length)
    ids = draw.integers(2, values["vocab_size"], size=shape).astype(np.int32)
    ones = np.ones(shape, np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), shape)
    mask = np.ones(shape, np.float32)
    batch = jax.device_put(Batch(ids, np.roll(ids, -1, axis=2), ones, positions, mask))
    return run, compiled, seconds, params, train.start(run).state, batch


def step(tiny: bool):
    import jax

    from drlora_jax.metrics import peak_flops
    from drlora_jax.plan import flops_per_token

    cases = [(4096, rows, remat) for rows in (2, 4, 8) for remat in ("selective", "none", "full")]
    if tiny:
        cases = [(32, 2, remat) for remat in ("selective", "none", "full")]
    for length, rows, remat in cases:
        row = {"length": length, "rows": rows, "remat": remat}

        def measure(length=length, rows=rows, remat=remat):
            run, compiled, seconds, params, state, batch = _build(tiny, length, rows, remat)
            taken, losses = [], []
            for index in range(3 + (2 if tiny else 10)):
                start = time.perf_counter()
                state, metrics = compiled(params, state, batch)
                jax.block_until_ready(metrics["loss"])
                if index >= 3:
                    taken.append(time.perf_counter() - start)
                losses.append(float(metrics["loss"]))
            rate = rows * length / statistics.median(taken)
            peak = peak_flops(1)
            model = flops_per_token(run.job.model_config, length)
            analysis = compiled.memory_analysis()
            return {
                "backends": run.backends,
                "tokens_per_second": rate,
                "mfu": None if peak is None else rate * model / peak,
                "temporary_gib": analysis.temp_size_in_bytes / 2**30,
                "compile_seconds": seconds,
                "losses": [losses[0], losses[-1]],
            }

        yield attempt(row, measure)


def event(tiny: bool):
    import jax
    import numpy as np

    from drlora_jax.allocation import CapacityState
    from drlora_jax.build import shardings_of
    from drlora_jax.position import place_mask

    run, compiled, _, params, state, batch = _build(tiny, 32 if tiny else 4096, 2, "selective")
    for _ in range(3):
        state, metrics = compiled(params, state, batch)
    jax.block_until_ready(metrics)
    policy, capacity = run.job.policy, run.job.policy.init()
    seconds = []
    for index in range(10):
        start = time.perf_counter()
        stats = jax.device_get(state.stats)
        capacity, stats, _ = policy.update(capacity, stats, 100 + index)
        capacity = CapacityState(np.minimum(capacity.ranks_LE, RANK))
        mask_LER = place_mask(run, capacity)
        stats = jax.device_put(stats, shardings_of(run.abstract_state.stats))
        state = jax.block_until_ready(state._replace(mask_LER=mask_LER, stats=stats))
        seconds.append(time.perf_counter() - start)
        # The program is called as it was compiled; another shape or sharding would raise here.
        state, metrics = compiled(params, state, batch)
        jax.block_until_ready(metrics)
    plain = median_seconds(lambda: jax.block_until_ready(state.mask_LER))
    yield {
        "event_ms": 1e3 * statistics.median(seconds),
        "wait_ms": 1e3 * plain,
        "ranks": [int(capacity.ranks_LE.min()), int(capacity.ranks_LE.max())],
    }


# ------------------------------------------------------------------------------------------- peers


def peers(tiny: bool):
    """transformers + peft with grouped_mm, the same shapes, batch and targets, bf16."""
    row = {"peer": "transformers + peft", "length": 32 if tiny else 4096, "rows": 2}
    yield attempt(row, lambda: _peft(tiny, row["length"], row["rows"]))


def _peft(tiny: bool, length: int, rows: int) -> dict:
    import numpy as np
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    values = {key: value for key, value in (TINY if tiny else OLMOE).items() if key != "model_type"}
    torch.manual_seed(0)
    config = transformers.OlmoeConfig(**values)
    config._experts_implementation = "grouped_mm"
    dtype = torch.float32 if tiny else torch.bfloat16
    with torch.device(device):
        model = transformers.OlmoeForCausalLM(config).to(dtype)
    lora = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=["q_proj", "v_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    model = get_peft_model(model, lora)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = np.random.default_rng(0).integers(2, values["vocab_size"], size=(rows, length))
    batch = torch.from_numpy(ids).to(device)
    seconds = []
    for index in range(2 + (2 if tiny else 6)):
        start = time.perf_counter()
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        value = float(loss.detach())
        if index >= 2:
            seconds.append(time.perf_counter() - start)
    memory = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
    rate = rows * length / statistics.median(seconds)
    return {"tokens_per_second": rate, "peak_gib": memory, "loss": value}


if __name__ == "__main__":
    sys.exit(main())
