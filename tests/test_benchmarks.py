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
