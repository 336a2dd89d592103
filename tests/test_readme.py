"""The Python examples of the README run as they stand."""

import pathlib
import re

import numpy as np
import pytest
from test_step import Stepper

from drlora_jax import train
from drlora_jax.allocation import CapacityShapes
from drlora_jax.position import start

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.mark.parametrize("number", [0, 1])
def test_an_example_runs(number, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jax.device_count", lambda: 1)  # as on the machine of a reader
    exec(compile(BLOCKS[number], f"README block {number}", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_the_policy_example_is_a_policy():
    names = {}
    exec(compile(BLOCKS[2], "README policy", "exec"), names)
    policy = names["halfway"](CapacityShapes(2, 2, 4, 8), low=2, high=6, step=10)
    frequency_LE = np.array([[1, 4, 3, 2], [4, 3, 2, 1]], np.float32)
    state, _, _ = policy.update(policy.init(), frequency_LE, 10)
    assert state.ranks_LE.tolist() == [[2, 6, 6, 2], [6, 6, 2, 2]]
    assert (state.ranks_LE.sum(axis=1) == policy.budget).all()


def test_the_policy_example_runs(tmp_path):
    names = {}
    exec(compile(BLOCKS[2], "README policy", "exec"), names)
    stepper = Stepper(tmp_path)
    shapes = CapacityShapes(2, 2, 4, 4)
    job = stepper.job._replace(policy=names["halfway"](shapes, low=1, high=3, step=2))
    stepper.run, stepper.job = train.build(job), job
    stepper.position = start(stepper.run)
    for _ in range(3):
        stepper.step()
    assert sorted(stepper.position.capacity.ranks_LE[0].tolist()) == [1, 1, 3, 3]


def test_examples_are_short():
    assert max(len(block.strip().splitlines()) for block in BLOCKS) <= 20


def test_quick_start_has_two_shell_blocks():
    section = README.split("## Quick start")[1].split("\n## ")[0]
    assert len(re.findall(r"```sh\n", section)) == 2
