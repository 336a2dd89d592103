"""A dense LLaMA from training to use: plain LoRA on attention and FFN, no experts anywhere."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drlora_jax import train
from drlora_jax.config import MeshSection
from drlora_jax.inference.model import load_run
from drlora_jax.models.transformer import unroll
from drlora_jax.training.job import prepare
from tests.support.tiny import TINY_LLAMA, tiny_config, write_rows, write_tiny_model

SECTIONS = dict(
    adapter=dict(kind="lora", targets=("gate", "up", "down", "q", "v")),
    allocation=dict(kind="uniform"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    (folder / "model").mkdir()
    write_tiny_model(folder / "model", TINY_LLAMA)
    write_rows(folder / "train.jsonl", 60)
    write_rows(folder / "heldout.jsonl", 12, seed=1)
    assert train.train(train.build(prepare(tiny_config(folder, **SECTIONS)))) == 0
    return folder


def log_of(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_and_keeps_no_ranks(folder):
    rows = log_of(folder / "run")
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"] - 0.05
    assert load_run(str(folder / "run")).ranks_LE.shape == (0, 0)


def test_a_resumed_run_is_the_same(folder):
    half = tiny_config(folder, name="half", train=dict(steps=6), **SECTIONS)
    assert train.train(train.build(prepare(half))) == 0
    whole = tiny_config(folder, name="half", **SECTIONS)
    run = train.build(prepare(whole))
    assert run.job.schedule_steps == 6  # as it was made: only the learning rate ends later
    assert train.train(run) == 0
    assert load_run(str(folder / "half")).step == 12


def test_its_loaded_model_gives_the_logged_loss(folder):
    run = train.build(prepare(tiny_config(folder, **SECTIONS)))
    loaded = load_run(str(folder / "run"), mesh=MeshSection(data=1))
    nll, targets = 0.0, 0.0
    for batch in run.job.eval_batches:
        mask_LER = jnp.zeros((0, 0, run.job.adapter.max_rank))
        params, lora = loaded.variables["params"], loaded.variables["lora"]
        measured = run.eval_step(params, lora, mask_LER, batch)
        nll, targets = nll + float(measured[0]), targets + float(measured[1])
    logged = log_of(folder / "run")[-1]["eval_loss"]
    assert nll / targets == pytest.approx(logged, rel=1e-6)


def test_unrolled_layers_compute_the_same(folder):
    loaded = load_run(str(folder / "run"), mesh=MeshSection(data=1))
    tokens_BT = jnp.arange(24).reshape(2, 12) + 5
    rest = (jnp.ones_like(tokens_BT), jnp.tile(jnp.arange(12), (2, 1)))
    model, variables = unroll(loaded.model, loaded.variables)
    assert len(model.config.segments) == 3 and model.config.num_layers == 3
    scanned, _ = jax.jit(loaded.model.apply)(loaded.variables, tokens_BT, *rest)
    unrolled, _ = jax.jit(model.apply)(variables, tokens_BT, *rest)
    np.testing.assert_allclose(scanned, unrolled, atol=1e-5)
