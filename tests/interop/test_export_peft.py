"""Exports loaded by `peft` and `transformers` themselves."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest

from drlora_jax.export import FORMATS
from tests.support.exports import export

SCRIPT = pathlib.Path(__file__).parents[1] / "oracles" / "load_export.py"
MAX_KL = 1e-5


@pytest.fixture(scope="module")
def libraries():
    for name in ("torch", "peft"):
        pytest.importorskip(name, reason="only peft itself can say what it loads")
    from tests.oracles import load_export

    return load_export


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
# peft doubles the rank of gate_up itself when it reads pairs by expert, and does not see its match.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
@pytest.mark.parametrize(
    ("family", "targets", "has_router"),
    [
        ("olmoe", ("up", "down", "k"), False),
        ("olmoe", ("gate", "up", "down", "q", "v"), True),
        ("mixtral", ("gate_up", "down"), False),
        ("mixtral", ("gate",), True),
        ("llama", ("gate", "up", "down", "q", "v"), False),
    ],
)
def test_logits_are_those_of_the_run(tmp_path, libraries, family, targets, has_router):
    base, prompts, logits = export(tmp_path, family, targets, has_router=has_router)
    for layout in FORMATS:
        for name, model in libraries.load_models(base, tmp_path / layout, layout):
            kl = libraries.largest_kl(model, prompts, logits)
            print(f"{family} {targets} {name}: KL {kl:.1e}")
            assert kl <= MAX_KL, name
    # The bar means something: the base alone is far from it.
    assert libraries.largest_kl(libraries.load_model(base), prompts, logits) > 100 * MAX_KL


def test_a_process_without_this_package_loads_it(tmp_path, libraries):
    base, prompts, logits = export(tmp_path, "mixtral", ("gate", "up", "down", "q"))
    arrays = {f"tokens_{i}": tokens for i, tokens in enumerate(prompts)}
    arrays |= {f"logits_{i}": array for i, array in enumerate(logits)}
    np.savez(tmp_path / "reference.npz", **arrays)
    command = [sys.executable, "-I", SCRIPT, base, tmp_path / "peft", "peft"]
    result = subprocess.run(
        [*command, tmp_path / "reference.npz"], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "merge_and_unload" in result.stdout
