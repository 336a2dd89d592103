"""Benchmarks that need a device run here at tiny sizes, so that they are ready for one."""

import contextlib
import functools
import importlib
import io
import json
import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a module of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def run_gpu(tmp_path, *arguments: str):
    """Of `gpu.py` as from a fresh checkout: the finished process, and its rows."""
    out = tmp_path / "results.jsonl"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--out", str(out), *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    lines = out.read_text().splitlines() if out.exists() else []
    return done, [json.loads(line) for line in lines]


@pytest.fixture
def run_gpu_here(benchmark, monkeypatch, tmp_path):
    """`gpu.py` with its parts in this process: importing jax takes as long as many of them."""
    gpu = benchmark("gpu")

    def rows_here(command, seconds, on_cpu):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            assert gpu.main(command[2:]) == 0
        lines = said.getvalue().splitlines()
        yield from (json.loads(line[len(gpu.ROW) :]) for line in lines if gpu.ROW in line)

    monkeypatch.setattr(gpu, "child_rows", rows_here)

    def run(parts: str) -> list[dict]:
        out = tmp_path / "rows.jsonl"
        assert gpu.main(["--rehearse", "--parts", parts, "--out", str(out)]) == 0
        return [json.loads(line) for line in out.read_text().splitlines()]

    return run


def test_parts_run_in_their_order(tmp_path):
    """In processes of their own, from a directory where the package is not to be found."""
    done, (bounds, event) = run_gpu(tmp_path, "--rehearse", "--parts", "event,bounds")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (bounds["part"], event["part"]) == ("bounds", "event")
    assert bounds["matmul_tflops"] > 0 and bounds["copy_gb_s"] > 0
    assert event["ranks"][0] < event["ranks"][1]
    assert event["event_steps"] == pytest.approx(event["event_ms"] / event["step_ms"])


REHEARSED = ("bounds", "kernels", "qwen3", "grouped", "attention", "thin", "profile")


def test_the_accelerator_benchmark_rehearses(run_gpu_here):
    """Every part that is not run elsewhere here, without an error of its own checks."""
    by_part = {}
    for row in run_gpu_here(",".join(reversed(REHEARSED))):
        by_part.setdefault(row["part"], []).append(row)
    assert tuple(by_part) == REHEARSED
    (bounds,) = by_part["bounds"]
    for row in by_part["grouped"]:
        assert row["of_measured_matmul"] == pytest.approx(row["tflops"] / bounds["matmul_tflops"])
        assert row["dense_expansions"]  # on a CPU
    layers = {row["backend"]: row for row in by_part["kernels"] if "routing" in row}
    assert layers["dense"]["ms"] > 0 and "for NVIDIA's Hopper" in layers["mosaic"]["skipped"]
    assert {row["backend"] for row in by_part["attention"]} == {"xla", "native", "chunked"}
    assert all(row["measured"] == "compiled" for row in by_part["qwen3"])
    assert {row["rank"] for row in by_part["thin"]} == {16, 32, 64}
    (profile,) = by_part["profile"]
    times = [kernel["ms"] for kernel in profile["kernels"]]
    assert len(times) > 3 and times == sorted(times, reverse=True)


def test_ours_and_peft_with_the_same_weights(tmp_path):
    pytest.importorskip("peft")
    done, rows = run_gpu(tmp_path, "--rehearse", "--parts", "peers")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    peft, ours, ratio = rows
    assert peft["trained"] == ours["trained"] > 0
    assert ours["first_loss"] == pytest.approx(peft["first_loss"], rel=1e-5)
    assert ours["last_loss"] < ours["first_loss"]
    assert ratio["tokens_per_second"] == ours["tokens_per_second"] / peft["tokens_per_second"]
    assert ratio["peak_gib"] == ours["peak_gib"] / peft["peak_gib"]


def test_mistakes_are_one_line(tmp_path):
    for arguments, message in (
        (["--parts", "bounds,grouping"], "unknown part 'grouping'; known: bounds, kernels, step"),
        (["--minutes", "0"], "--minutes must be greater than 0, got 0"),
        (["--minutes", "soon"], "argument --minutes: invalid float value: 'soon'"),
        (["--out", "missing/results.jsonl"], "there is no directory"),
    ):
        done, rows = run_gpu(tmp_path, *arguments)
        assert done.returncode == 2 and not rows and not done.stdout
        assert message in done.stderr and len(done.stderr.splitlines()) == 1


def test_without_time_every_part_says_so(tmp_path):
    done, rows = run_gpu(
        tmp_path, "--rehearse", "--parts", "bounds,peers,steps", "--minutes", "0.001"
    )
    assert done.returncode == 1
    assert [row["part"] for row in rows] == ["bounds", *["peers"] * 2, *["steps"] * 2]
    assert all(row["error"] == "time" for row in rows)


def test_a_part_that_takes_too_long_is_ended(benchmark, monkeypatch):
    """Also what it has started, which would find more; what it had found stays."""
    gpu = benchmark("gpu")
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 0)
    script = "import subprocess; print('ROW {\"found\": 1}', flush=True)"
    script += "; subprocess.run('sleep 30; echo ROW 2', shell=True)"
    found, ended = gpu.child_rows([sys.executable, "-c", script], 1.5)
    assert found == {"found": 1} and ended["error"] == "time"
    failing = [sys.executable, "-c", "print('why'); raise SystemExit(3)"]
    assert list(gpu.child_rows(failing, 20)) == [{"error": "exit code 3", "output": ["why"]}]


def test_the_ratio_to_peft(benchmark):
    gpu = benchmark("gpu")
    peft = {"case": "peft", "tokens_per_second": 2.0, "peak_gib": 4.0, "first_loss": 6.0}
    ours = {"case": "ours", "tokens_per_second": 6.0, "peak_gib": 1.0, "first_loss": 6.01}
    (row,) = gpu.peer_ratio([peft, ours], shares_weights=False)
    assert (row["tokens_per_second"], row["peak_gib"]) == (3.0, 0.25) and "error" not in row
    (row,) = gpu.peer_ratio([peft, ours], shares_weights=True)
    assert row["error"] == "first losses are 1.7e-03 apart with the same weights"
    (row,) = gpu.peer_ratio([peft, ours | {"first_loss": float("nan")}], shares_weights=True)
    assert "error" in row
    assert not list(gpu.peer_ratio([peft, ours | {"error": "time"}], shares_weights=True))


def test_a_leak_between_documents_is_found(benchmark):
    attention = benchmark("gpu_attention")
    shape = attention.TINY_SHAPES["tiny"][1]
    setting = benchmark("gpu_setting").Setting(True, ROOT, 1.0, 1.0)
    segments_BT, _ = attention.packed(shape)
    inputs, others = (attention.random_inputs(setting, shape, seed) for seed in (0, 1))

    def leaking(q, k, v, dy):
        return (out := q * jnp.mean(v, axis=(1, 2), keepdims=True)), out * dy, k, v

    def apart(q, k, v, dy):
        return q * 2, q * dy, k, v

    found = attention.leaks(leaking, inputs, others, inputs[0], segments_BT)
    assert found["error"] == "a document sees another" and found["others_outputs_change"] > 0
    assert "error" not in attention.leaks(apart, inputs, others, inputs[0], segments_BT)


def test_kernel_times_do_not_count_twice(benchmark):
    steps = benchmark("gpu_steps")

    def event(name, start, duration):
        return SimpleNamespace(name=name, start_ns=start, duration_ns=duration)

    inner = [event("dot.1", 0, 10), event("dot.2", 20, 10), event("while.7", 0, 100)]
    lines = [
        SimpleNamespace(name="Stream #1", events=[*inner, event("copy_3", 100, 50)]),
        SimpleNamespace(name="Steps", events=[event("1", 0, 1000)]),
    ]
    planes = [
        SimpleNamespace(name="/host:CPU", lines=[]),
        SimpleNamespace(name="/device:GPU:0", lines=lines),
    ]
    seconds, calls = steps.kernel_times(SimpleNamespace(planes=planes))
    assert {name: round(1e9 * taken) for name, taken in seconds.items()} == {
        "while": 80,
        "dot": 20,
        "copy": 50,
    }
    assert calls == {"while": 1, "dot": 2, "copy": 1}


def test_short_calls_are_timed_together(benchmark, monkeypatch):
    """By a clock that only the calls move."""
    timing, now, waited = benchmark("timing"), [0.0], []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(jax, "block_until_ready", waited.append)

    def taking(seconds):
        return lambda: now.__setitem__(0, now[0] + seconds)

    assert timing.median_seconds(taking(2**-10), repeats=3) == 2**-10
    assert timing.calls_that_fill(taking(2**-10)) == int(timing.MEASUREMENT * 2**10)
    assert timing.calls_that_fill(taking(0.1)) == 1
    # On a device with a queue only the last result is waited for, on a CPU every one.
    for backend, times in (("cpu", 6), ("gpu", 1)):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        waited.clear()
        timing.seconds_of(taking(1), calls=5)
        assert len(waited) == times


def test_the_bare_products_of_the_step_beside_peft(benchmark):
    """Four operations for every active weight and token, six for every active one of factors."""
    from drlora_jax.models.families import parse_config
    from drlora_jax.training.costs import active_parameters

    peers = benchmark("peers_cpu")
    products = peers.bare_products()
    operations = {kind: sum(one.operations for one in of) for kind, of in products.items()}
    config = peers.CONFIG
    layers, width, hidden = (
        config[name] for name in ("num_hidden_layers", "hidden_size", "intermediate_size")
    )
    tokens = peers.ROWS * peers.LENGTH
    routers = layers * width * config["num_experts"]
    active = active_parameters(parse_config(config | {"model_type": "olmoe"})) - routers
    assert operations["base"] == 4 * active * tokens
    widths = config["num_experts_per_tok"] * (2 * width + 3 * hidden) + 2 * 2 * width
    assert operations["factors"] == 6 * layers * peers.RANK * widths * tokens
    # Seven products of a head's width for every query and key that are not a block apart.
    pairs = peers.ROWS * sum(
        peers.ATTENTION_BLOCK * (at // peers.ATTENTION_BLOCK + 1) for at in range(peers.LENGTH)
    )
    assert operations["attention"] == 7 * 2 * layers * width * pairs
    # XLA's own count of the same equations agrees.
    for product in (one for of in products.values() for one in of):
        shapes = (jax.ShapeDtypeStruct(shape, "float32") for shape in (product.left, product.right))
        lowered = jax.jit(functools.partial(jnp.einsum, product.equation)).lower(*shapes)
        assert product.count * lowered.cost_analysis()["flops"] == product.operations


def test_bare_products_as_shares_of_steps(benchmark):
    peers = benchmark("peers_cpu")
    tokens = peers.ROWS * peers.LENGTH
    products = [
        {
            "base": {"seconds": 1.0, "operations": 1e11},
            "factors": {"seconds": 0.5, "operations": 0},
        },
        {
            "base": {"seconds": 2.0, "operations": 1e11},
            "factors": {"seconds": 1.0, "operations": 0},
        },
    ]
    rounds = {"ours": [{"tokens_per_second": tokens / 2}, {"tokens_per_second": tokens / 4}]}
    line = peers.products_line(products, rounds, ("base",))
    step = "of the step's time ours"
    assert line == f"bare products of base: 1.500 s a step at 75 GFLOP/s; {step} 0.50"
    line = peers.products_line(products, rounds, ("base", "factors"))
    assert line == f"bare products of base, factors: 2.250 s a step at 50 GFLOP/s; {step} 0.75"


def test_the_scaling_table():
    """Twice the rows are twice the products and the tokens; every cell is there."""
    command = [sys.executable, "benchmarks/scaling.py", "--size", "tiny", "--axes", "rows"]
    done = subprocess.run([*command, "--rounds", "2"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if "|" in line]
    _, _, *rows = (dict(zip(lines[0], line, strict=True)) for line in lines)
    assert [(row["size"], row["tokens"], row["products"]) for row in rows] == [
        ("1", "32", "1.00"),
        ("2", "64", "2.00"),
    ]
    assert 1 <= float(rows[1]["+ reading"]) <= 2  # weights are read once, for whatever tokens
    for row in rows:
        assert float(row["tokens/s"].replace(",", "")) > 0 and float(row["step adds, MiB"]) > 0
        assert 0.3 < float(row["forecast"]) < 3
    assert 1 < float(rows[1]["of the first"]) < 2.5
