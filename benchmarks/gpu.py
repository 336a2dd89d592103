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

from shapes import OLMOE, TINY
from timing import copy_bound, first_line, matmul_bound, median_seconds

PARTS = ("bounds", "grouped", "step", "event", "peers")
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


def attempt(row: dict, measure) -> dict:
    """The row with what `measure` found, or with the first line of what it raised."""
    try:
        return row | measure()
    except Exception as error:  # whatever a backend raises is a finding
        return row | {"error": first_line(error)}


# ------------------------------------------------------------------------------------------ bounds


def bounds(tiny: bool):
    import jax
    import jax.numpy as jnp

    side = 512 if tiny else 8192
    dtype = jnp.float32 if tiny else jnp.bfloat16
    product, operations = matmul_bound(side, dtype)
    yield {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "matmul_tflops": operations / median_seconds(product) / 1e12,
    }
    copy, moved = copy_bound(side * 2, dtype)
    yield {"copy_gb_s": moved / median_seconds(copy) / 1e9}


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


def _step(tiny: bool, length: int, rows: int, remat: str, kind: str = "dr_lora"):
    from jobs import Step

    from drlora_jax.config import (
        AdapterSection,
        AllocationSection,
        ModelSection,
        TrainConfig,
        TrainSection,
    )

    config = TrainConfig(
        model=ModelSection(dtype="float32" if tiny else "bfloat16", remat=remat),
        train=TrainSection(steps=1000, batch_size=rows, sequence_length=length),
        adapter=AdapterSection(targets=("gate", "up", "down", "q", "v"), dropout=0.0),
        allocation=AllocationSection(kind=kind, r_target=16, r_max=RANK, interval=100),
    )
    return Step(config, TINY if tiny else OLMOE)


def step(tiny: bool):

    from drlora_jax.metrics import peak_flops
    from drlora_jax.plan import flops_per_token

    cases = [(4096, rows, remat) for rows in (2, 4, 8) for remat in ("selective", "none", "full")]
    if tiny:
        cases = [(32, 2, remat) for remat in ("selective", "none", "full")]
    for length, rows, remat in cases:
        row = {"length": length, "rows": rows, "remat": remat}

        def measure(length=length, rows=rows, remat=remat):
            step = _step(tiny, length, rows, remat)
            losses = []
            taken = median_seconds(
                lambda: losses.append(step()["loss"]) or losses[-1], repeats=2 if tiny else 10
            )
            rate = rows * length / taken
            peak = peak_flops(1)
            model = flops_per_token(step.run.job.model_config, length)
            return {
                "backends": step.run.backends,
                "tokens_per_second": rate,
                "mfu": None if peak is None else rate * model / peak,
                "temporary_gib": step.added_bytes / 2**30,
                "compile_seconds": step.compile_seconds,
                "losses": [float(losses[0]), float(losses[-1])],
            }

        yield attempt(row, measure)


def event(tiny: bool):
    import jax
    import numpy as np

    from drlora_jax.allocation import CapacityState
    from drlora_jax.build import shardings_of
    from drlora_jax.position import place_mask

    step = _step(tiny, 32 if tiny else 4096, 2, "selective")
    run = step.run
    for _ in range(3):
        jax.block_until_ready(step())
    policy, capacity = run.job.policy, run.job.policy.init()
    seconds = []
    for index in range(10):
        start = time.perf_counter()
        stats = jax.device_get(step.state.stats)
        capacity, stats, _ = policy.update(capacity, stats, 100 + index)
        capacity = CapacityState(np.minimum(capacity.ranks_LE, RANK))
        mask_LER = place_mask(run, capacity)
        stats = jax.device_put(stats, shardings_of(run.abstract_state.stats))
        step.state = jax.block_until_ready(step.state._replace(mask_LER=mask_LER, stats=stats))
        seconds.append(time.perf_counter() - start)
        # The program is called as it was compiled; another shape or sharding would raise here.
        jax.block_until_ready(step())
    plain = median_seconds(lambda: step.state.mask_LER)
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
