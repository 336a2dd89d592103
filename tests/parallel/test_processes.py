"""Real processes over localhost: the numbers of one, and ends that no process survives alone.

One run goes through everything: two processes take it to its end; from its checkpoint of step 5
it is resumed by one process, and by two of which one is told to stop, goes wrong, or is killed.
`-m slow` tries more meshes.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import chex
import jax
import numpy as np
import pytest

from drlora_jax import evaluate
from drlora_jax import train as train_lib
from drlora_jax.errors import EXIT_DONE, EXIT_FAILED, EXIT_RESUMABLE
from drlora_jax.parallel.mesh import AXES
from drlora_jax.runs.checkpoint import Checkpoints
from drlora_jax.training.job import prepare
from drlora_jax.training.state import restore
from tests.support.stepper import Stepper
from tests.support.tiny import OLMOE, tiny_config, write_rows, write_tiny_model

ROOT = Path(__file__).parents[2]
VALUES = OLMOE | {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 8}
MESH = {"data": 2, "expert": 2, "tensor": 2}
OTHERS = [(8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 8, 1), (1, 2, 1, 4)]
SMALLER = [{"expert": 2, "fsdp": 2}, {"data": 2}]
STEPS, FIRST_SAVED, SECOND_SAVED = 20, 5, 10
EVENTS = [5, 11]  # steps after which ranks grow
HEARTBEAT, TIMEOUT = 10, 300  # seconds

CONFIG = """from pathlib import Path
from tests.support.tiny import tiny_config

def get_config():
    return tiny_config(Path({folder!r}), **{changes!r})
"""
CHANGES = {
    "run": {"heartbeat_timeout": HEARTBEAT, "keep_last": 9},
    "train": {"steps": STEPS, "eval_every": STEPS},
    "allocation": {"interval": 6},
}


class End(NamedTuple):
    code: int
    errors: str


class Runs:
    """A folder of runs on one model, and what it takes to start processes on them."""

    def __init__(self, folder: Path):
        self.folder = folder
        write_tiny_model(folder / "model", VALUES)
        write_rows(folder / "train.jsonl", 60)
        write_rows(folder / "heldout.jsonl", 12, seed=1)
        self.config = folder / "config.py"
        self.config.write_text(CONFIG.format(folder=str(folder), changes=CHANGES))
        self.environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
        }

    def arguments(self, name: str, **mesh) -> list[str]:
        sizes = [f"mesh.{axis}={size}" for axis, size in mesh.items()]
        return ["--config", str(self.config), f"run.dir={self.folder / name}", *sizes]

    def rows(self, name: str, file="metrics.jsonl") -> list[dict]:
        return [json.loads(line) for line in (self.folder / name / file).read_text().splitlines()]

    def losses(self, name: str) -> list[float]:
        return [row["loss"] for row in self.rows(name) if "loss" in row]

    def copy_cut(self, name: str, new: str, saved: int = FIRST_SAVED) -> None:
        """A run as it was after a checkpoint."""
        shutil.copytree(self.folder / name, self.folder / new)
        for entry in (self.folder / new / "checkpoints").iterdir():
            if entry.name.isdigit() and int(entry.name) > saved:
                shutil.rmtree(entry)

    def two(self, fault: str, name: str, **mesh) -> list[End]:
        """How two processes of two devices each end, with a fault."""
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            address = f"localhost:{probe.getsockname()[1]}"
        devices = " --xla_force_host_platform_device_count=2"  # of two flags the last counts
        shared = self.environment | {
            "XLA_FLAGS": self.environment["XLA_FLAGS"] + devices,
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": "2",
        }
        script = [sys.executable, str(ROOT / "tests" / "support" / "faulty_train.py"), fault]
        outputs = [self.folder / f"{name}-{fault}-{index}.txt" for index in range(2)]
        processes, ended = [], set()
        try:
            for index, output in enumerate(outputs):
                with output.open("w") as file:
                    process = subprocess.Popen(
                        [*script, *self.arguments(name, **mesh)],
                        env=shared | {"JAX_PROCESS_ID": str(index)},
                        cwd=self.folder,
                        stdout=subprocess.DEVNULL,
                        stderr=file,
                    )
                processes.append(process)
            limit = time.monotonic() + TIMEOUT
            while len(ended) < 2:
                assert time.monotonic() < limit, f"{fault}: only {sorted(ended)} ended"
                for index, process in enumerate(processes):
                    if process.poll() is not None:
                        ended.add(index)
                time.sleep(0.05)
        finally:
            for process in processes:
                process.kill()
        return [
            End(process.returncode, output.read_text())
            for process, output in zip(processes, outputs, strict=True)
        ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("processes"))


def run_two(runs, name, mesh):
    """The losses of a run that two processes of four devices take to its end."""
    command = [sys.executable, str(ROOT / "launch" / "local.py"), "--processes", "2"]
    command += ["--devices", "4", "--", *runs.arguments(name, **mesh)]
    done = subprocess.run(
        command, env=runs.environment, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert done.returncode == EXIT_DONE, done.stderr[-2000:]
    assert "2 processes of 4" in done.stdout
    assert done.stdout.count(f"step {STEPS}/{STEPS}") == 1  # only one speaks
    return runs.losses(name)


@pytest.fixture(scope="module")
def whole(runs):
    return run_two(runs, "whole", MESH)


@pytest.fixture(scope="module")
def one_device(runs):
    """Losses, and ranks by step, of one device in one process."""
    stepper = Stepper(runs.folder, "one", **CHANGES)
    losses, ranks = [], []
    for _ in range(STEPS):
        losses.append(float(stepper.step()["loss"]))
        ranks.append(stepper.position.capacity.ranks_LE.tolist())
    return losses, ranks


def check_run(runs, name, losses, one_device):
    np.testing.assert_allclose(losses, one_device[0], rtol=1e-5)
    events = {row["step"]: row["ranks"] for row in runs.rows(name, "ranks.jsonl")}
    assert list(events) == EVENTS
    assert events == {step: one_device[1][step - 1] for step in events}


def test_two_processes_compute_what_one_device_does(runs, whole, one_device):
    check_run(runs, "whole", whole, one_device)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", OTHERS, ids=str)
def test_every_axis_may_lie_across_processes(runs, one_device, sizes):
    name = "two-" + "x".join(map(str, sizes))
    losses = run_two(runs, name, dict(zip(AXES, sizes, strict=True)))
    check_run(runs, name, losses, one_device)


def test_two_processes_evaluate_as_one_does(runs, whole, monkeypatch):
    """Losses of documents, and texts decoded greedily on rows that lie on both."""
    question = {"question": "What is 2 plus 3?", "answer": "It is 5.\n#### 5"}
    rows = [question, question | {"question": "And 4?"}, question | {"question": "How many?"}]
    (runs.folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    arguments = ["--run", str(runs.folder / "whole"), "--tasks", "loss,gsm8k=questions.jsonl"]
    arguments += ["--max-new-tokens", "6", "--batch-size", "4", "--out"]
    command = [sys.executable, str(ROOT / "launch" / "local.py"), "--devices", "2"]
    command += ["--module", "drlora_jax.evaluate", "--", *arguments, "two", "mesh.expert=2"]
    done = subprocess.run(
        command,
        env=runs.environment,
        cwd=runs.folder,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == EXIT_DONE, done.stderr[-2000:]
    assert done.stdout.count("perplexity") == 1  # only one speaks
    assert "no progress for" not in done.stderr
    monkeypatch.chdir(runs.folder)
    assert evaluate.main([*arguments, "one", "mesh.data=1"]) == EXIT_DONE
    of_two, of_one = (
        [
            json.loads(line)
            for file in sorted(Path(name, "eval").glob("*"))
            for line in file.read_text().splitlines()
        ]
        for name in ("two", "one")
    )
    assert len(of_two) == len(of_one) > len(rows)
    for sample, other in zip(of_two, of_one, strict=True):
        assert sample.get("text") == other.get("text")
        assert sample.get("nll", 0.0) == pytest.approx(other.get("nll", 0.0), rel=1e-5)
    digests = [
        re.findall(r'"adapter_fingerprint": "(\w+)"', Path(name, "eval.json").read_text())
        for name in ("two", "one")
    ]
    assert digests[0] == digests[1] != []


def build(runs, name, mesh):
    return train_lib.build(prepare(tiny_config(runs.folder, name, **CHANGES, mesh=mesh)))


def restored(runs, name, mesh):
    """Everything that the first checkpoint brings back on a mesh, as NumPy arrays."""
    checkpoints = Checkpoints(runs.folder / name / "checkpoints", keep_last=9)
    position = restore(build(runs, name, mesh), checkpoints, FIRST_SAVED)
    checkpoints.close()
    return jax.device_get(position)


def check_resumed_by_one(runs, whole, mesh) -> str:
    """The name of the run that one process took from the first checkpoint of two to the end."""
    name = "x".join(map(str, mesh.values()))
    runs.copy_cut("whole", name)
    here, there = restored(runs, name, {"data": 1} | mesh), restored(runs, name, {"expert": 4})
    chex.assert_trees_all_equal(here, there)
    assert train_lib.train(build(runs, name, {"data": 1} | mesh)) == EXIT_DONE
    np.testing.assert_allclose(runs.losses(name), whole, rtol=1e-5)
    events, expected = (
        [row["ranks"] for row in runs.rows(each, "ranks.jsonl")] for each in (name, "whole")
    )
    assert events == expected and len(events) == len(EVENTS)
    return name


def test_one_process_resumes_what_two_saved(runs, whole):
    check_resumed_by_one(runs, whole, {"expert": 2, "fsdp": 2, "tensor": 2})


@pytest.mark.slow
def test_one_device_resumes_what_eight_saved(runs, whole):
    check_resumed_by_one(runs, whole, {"data": 1})


@pytest.mark.slow
@pytest.mark.parametrize("mesh", SMALLER, ids=str)
def test_two_processes_resume_what_one_saved(runs, whole, mesh):
    name = check_resumed_by_one(runs, whole, mesh)
    runs.copy_cut(name, f"{name}-back", SECOND_SAVED)
    np.testing.assert_allclose(run_two(runs, f"{name}-back", MESH), whole, rtol=1e-5)


@pytest.mark.parametrize(
    "fault, message",
    [
        ("apart", "on run.dir, which must be one directory .*: run.dir differs on process 1."),
        ("heldout", "before the start.*: held-out data differs on process 1."),
    ],
)
def test_what_one_process_has_of_its_own_is_found_before_step_1(runs, fault, message):
    for end in runs.two(fault, fault, data=4):
        assert end.code == EXIT_FAILED and re.search(message, end.errors), end


def test_what_befalls_one_process_ends_both(runs, whole):
    """Stopped, gone wrong and killed; each time the run goes on, and the end is the same.

    Resumed at step 5, the second step of a start is the seventh; a save comes after the tenth.
    """
    runs.copy_cut("whole", "faulty")
    mesh = {"data": 2, "expert": 2}

    ends = runs.two("term", "faulty", **mesh)
    assert [end.code for end in ends] == [EXIT_RESUMABLE] * 2, ends
    saved = max(int(entry.name) for entry in (runs.folder / "faulty" / "checkpoints").iterdir())
    assert FIRST_SAVED + 2 <= saved < STEPS

    for end in runs.two("mask", "faulty", **mesh):
        assert end.code == EXIT_FAILED
        assert "disagree" in end.errors and "mask differs on process 1." in end.errors

    other, killed = runs.two("kill", "faulty", **mesh)
    assert killed.code < 0
    assert other.code == EXIT_RESUMABLE and "the last checkpoint" in other.errors
    assert "run.stall_timeout" not in other.errors  # found by its heartbeat, long before

    assert train_lib.train(build(runs, "faulty", {"data": 1})) == EXIT_DONE
    np.testing.assert_allclose(runs.losses("faulty"), whole, rtol=1e-5)
