"""`python -m drlora_jax.alpha`: its files and lines, and how it ends."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as xml

import numpy as np
import pytest

from drlora_jax import alpha, cli
from drlora_jax.allocation.alphalora import allocate_experts
from drlora_jax.interop import spectra_read
from drlora_jax.interop.hf_files import read_model_config
from drlora_jax.interop.spectra_read import fit_layers
from tests.support.model_files import WEIGHTS
from tests.support.tiny import MIXTRAL, write_tiny_model


@pytest.fixture
def model(tmp_path):
    """A Mixtral of two layers with four experts each, to be changed at will."""
    return write_tiny_model(tmp_path / "model", MIXTRAL)


def run(*arguments) -> int:
    return alpha.main([str(each) for each in arguments])


def run_as_a_module(*arguments) -> str:
    """What the command prints in a process of its own that has no torch, and prints ASCII."""
    code = "import runpy, sys; sys.modules['torch'] = None; del sys.argv[0]\n"
    code += "runpy.run_module('drlora_jax.alpha', run_name='__main__', alter_sys=True)\n"
    environment = os.environ | {
        "PYTHONPATH": str(pathlib.Path(alpha.__file__).parents[1]),
        "PYTHONIOENCODING": "ascii",
    }
    command = [sys.executable, "-c", code, "drlora_jax.alpha", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_command_on_the_bundled_moe(tmp_path, capsys):
    out, svg = tmp_path / "alpha.json", tmp_path / "alpha.svg"
    arguments = ["bundled:tiny_moe", "--experts", 20, "--cache", tmp_path / "cache"]
    shown = run_as_a_module(*arguments, "--out", out, "--svg", svg)
    stored = json.loads(out.read_text())
    assert stored["model"] == "bundled:tiny_moe" and stored["experts"] == 20
    alphas = [layer["alpha"] for layer in stored["layers"]]
    assert [len(layer["matrices"]) for layer in stored["layers"]] == [28] * 4
    for layer in stored["layers"]:
        assert layer["alpha"] == pytest.approx(np.mean([m["alpha"] for m in layer["matrices"]]))
        line = f"{layer['layer']:>5}{layer['alpha']:>10.4f}{28:>10}{layer['experts']:>9}  "
        assert line in shown
    counts = [layer["experts"] for layer in stored["layers"]]
    assert counts == allocate_experts(alphas, 20).tolist()
    bars = [line.count("#") for line in shown.splitlines()]
    bars = [bar for bar in bars if bar]
    np.testing.assert_allclose(np.array(bars) / max(bars), alphas / np.max(alphas), atol=0.02)
    heights = [
        float(each.attrib["height"])
        for each in xml.parse(svg).getroot().iter("{http://www.w3.org/2000/svg}rect")
    ][1:]
    np.testing.assert_allclose(np.array(heights) / heights[0], np.array(counts) / counts[0], 0.01)
    again = tmp_path / "again.json"
    assert run(*arguments, "--out", again) == 0
    assert "spectra of 4 layers from the cache" in capsys.readouterr().out
    assert again.read_text() == out.read_text()


def test_options_reach_the_result(model, tmp_path):
    out = tmp_path / "alpha.json"
    options = ["--beta", 0, "--estimator", "median", "--rounding", "upstream", "--no-cache"]
    assert run(model, "--experts", 9, *options, "--out", out) == 0
    stored = json.loads(out.read_text())
    assert (stored["beta"], stored["estimator"]) == (0, "median")
    expected = fit_layers(read_model_config(model), model, estimator="median")
    assert [layer["alpha"] for layer in stored["layers"]] == [fit.alpha for fit in expected]
    assert sorted(layer["experts"] for layer in stored["layers"]) == [4, 5]
    assert not (tmp_path / "cache").exists()


def test_layers_left_without_an_expert_are_said(model, capsys, monkeypatch):
    monkeypatch.setattr(alpha, "allocate_experts", lambda *_, **__: np.array([0, 9]))
    assert run(model, "--experts", 9, "--no-cache") == 0
    assert "The authors' rounding leaves layers without an expert: [0]." in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["model"], "following arguments are required: --experts"),
        (
            ["model", "--experts", "1"],
            r"--experts 1 --beta 2.5: .* the number of layers \(2\)",
        ),
        (["model", "--experts", "many"], "--experts: invalid int value: 'many'"),
        (["model", "--experts", "9", "--beta", "nan"], "beta must be a number, got nan"),
        (["model", "--experts", "9", "--estimator", "hill"], "invalid choice: 'hill'"),
        (["modle", "--experts", "9"], "MODEL modle: no such directory; did you mean model"),
        (["bundled:huge", "--experts", "9"], "it has bundled:tiny_moe"),
        (["model", "--experts", "9", "--out", "none/a.json"], "--out none/a.json: give a file in"),
        (["model", "--experts", "9", "--svg", "model"], "--svg model: give a file in a directory"),
        (["model", "--experts", "9", "--cache", "file"], "--cache file cannot be written: "),
        (["model", "--experts", "9", "--threads", "0"], "--threads must be 1 or more, got 0"),
        (["model", "--experts", "9", "--cache", "a", "--no-cache"], "not allowed with argument"),
        (["empty", "--experts", "9"], "empty is an empty directory, not a model directory"),
        (["pickled", "--experts", "9"], "pickle files are not read"),
    ],
)
def test_mistakes_end_with_one_message(arguments, message, model, tmp_path, capsys, monkeypatch):
    shutil.copytree(model, tmp_path / "pickled")
    (tmp_path / "pickled" / WEIGHTS).rename(tmp_path / "pickled" / "pytorch_model.bin")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(spectra_read, "_spectrum", lambda _: pytest.fail("not refused"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as end:
        cli.run_and_exit(lambda: alpha.main(arguments))
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    assert re.search(message, lines[0]), lines[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_default_cache_that_can_not_be_is_done_without(model, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert run(model, "--experts", 9) == 0
    assert "no cache    " in capsys.readouterr().err
