"""Benchmarks that need a device run here at tiny sizes, so that they are ready for one."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.slow
def test_the_accelerator_benchmark_rehearses(tmp_path):
    out = tmp_path / "results.jsonl"
    command = [sys.executable, "benchmarks/gpu.py", "--tiny", "--parts", "grouped,event"]
    done = subprocess.run(
        [*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["part"] for row in rows] == ["grouped", "grouped", "event"]
    assert all(row["error_to_f32"] < 1e-5 for row in rows[:2])
    assert rows[2]["ranks"][0] < rows[2]["ranks"][1]


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
    assert 1 < float(rows[1]["+ reading"]) < 2  # weights are read once, for whatever tokens
    for row in rows:
        assert float(row["tokens/s"].replace(",", "")) > 0 and float(row["step adds, MiB"]) > 0
        assert 0.3 < float(row["forecast"]) < 3
    assert 1 < float(rows[1]["of the first"]) < 2.5
