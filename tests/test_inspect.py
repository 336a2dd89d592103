"""What inspect says of models and runs is what their files hold; it starts no device."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from safetensors import safe_open

from drlora_jax import cli, inspect
from drlora_jax.interop.hf_files import read_model_config
from drlora_jax.models.families import parse_config
from drlora_jax.training.costs import active_parameters, flops_per_token
from tests.support.run_logs import logged, write_run
from tests.support.tiny import BUNDLED, MIXTRAL, write_tiny_model

MODEL = BUNDLED / "tiny_moe"


def show(capsys, path) -> str:
    assert inspect.main([str(path)]) == 0
    return capsys.readouterr().out


def test_parameters_are_those_of_the_weight_file(capsys):
    with safe_open(MODEL / "model.safetensors", "numpy") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]
    matrices = sum(int(np.prod(shape)) for shape in shapes if len(shape) > 1)
    total = re.search(r"^total +([\d,]+) +([\d,]+)$", show(capsys, MODEL), re.M)
    assert int(total[1].replace(",", "")) == matrices
    active = active_parameters(read_model_config(MODEL))
    assert int(total[2].replace(",", "")) == active


@pytest.mark.parametrize("ties", [True, False])
def test_active_parameters_agree_with_the_plan(ties):
    config = parse_config(MIXTRAL | {"tie_word_embeddings": ties})
    kinds = inspect.parameters_by_kind(config)
    assert sum(kind.active for kind in kinds) == active_parameters(config)


@pytest.mark.parametrize("window", [None, 16, 100])
def test_flops_count_the_keys_that_a_token_sees(window):
    config, length = parse_config(MIXTRAL | {"sliding_window": window}), 64
    keys = sum(min(token + 1, window or length) for token in range(length)) / length
    (segment,) = config.segments
    attention = segment.unit[0].attention
    scores = 4 * keys * attention.num_heads * attention.head_dim * segment.repeats
    expected = 4 * active_parameters(config) + 3.5 * scores
    assert flops_per_token(config, length) == pytest.approx(expected, rel=2e-3)


def test_a_model_is_described(capsys):
    shown = show(capsys, "bundled:tiny_moe")
    assert "olmoe, 4 layers of width 192" in shown
    assert "8 per layer in 4 layers, 2 per token" in shown and "BF16 in 1 file," in shown


def make_run(tmp_path):
    """A run on a small Mixtral, whose config was stored by hand."""
    run = write_run(tmp_path / "run")
    stored = json.loads(run.config_file.read_text())
    stored["config"]["model"]["path"] = str(write_tiny_model(tmp_path / "model", MIXTRAL))
    run.config_file.write_text(json.dumps(stored))
    for step in (20, 40):
        (run.checkpoints / str(step)).mkdir(parents=True)
    (run.checkpoints / "40.orbax-checkpoint-tmp").mkdir()
    return run


def test_a_run_is_described(tmp_path, capsys):
    run = make_run(tmp_path)
    shown = show(capsys, run.path)
    rows, event = logged(run.metrics_file), logged(run.ranks_file)[-1]
    assert re.search(r"^checkpoints +20, 40$", shown, re.M)
    assert f"{rows[-1]['eval_loss']:.4f}" in shown and "mixtral, 2 layers" in shown
    assert re.search(r"moe/up .*LoRA, rank up to 8", shown)
    for layer, ranks in zip(event["layers"], event["ranks"], strict=True):
        figures = f"{sum(ranks)} of 20 +{np.mean(ranks):.2f} +{min(ranks)} +{max(ranks)}"
        assert re.search(rf"^{layer} +{figures}$", shown, re.M)


def test_a_run_whose_base_is_elsewhere_is_described_without_it(tmp_path, capsys):
    run = make_run(tmp_path)
    (tmp_path / "model").rename(tmp_path / "moved")
    shown = show(capsys, run.path)
    assert "no such directory" in shown and "ranks after step 30" in shown


@pytest.mark.parametrize("name", ["nowhere", "some/hub-name"])
def test_what_is_not_here_is_refused_without_a_network(name, capsys, monkeypatch):
    monkeypatch.setattr("drlora_jax.interop.hf_files._download", lambda *_: pytest.fail("network"))
    with pytest.raises(SystemExit) as end:
        cli.run_and_exit(lambda: inspect.main([name]))
    assert end.value.code == 2 and "no such directory" in capsys.readouterr().err


def test_it_runs_as_a_module_and_starts_no_device():
    code = (
        "import runpy, sys; sys.argv = ['inspect', 'bundled:tiny_moe']\n"
        "try: runpy.run_module('drlora_jax.inspect', run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "import inspect; from jax._src import xla_bridge\n"
        "assert inspect.signature and not xla_bridge.backends_are_initialized()\n"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "active per token" in result.stdout
