"""What is said about memory before compiling, against the compiled step."""

import json
import pathlib
import runpy

import jax
import pytest

from drlora_jax import train
from drlora_jax.config import load_config
from drlora_jax.interop.hf_files import find_model
from drlora_jax.models.families import parse_config
from drlora_jax.training.memory import (
    Layout,
    bytes_on_one_device,
    compiled_bytes,
    predicted_step_bytes,
)
from drlora_jax.training.program import abstract_batch, memory_layout

ROOT = pathlib.Path(__file__).parents[2]
abstract_job = runpy.run_path(ROOT / "benchmarks" / "jobs.py")["abstract_job"]


def build(remat, *overrides):
    overrides = (f"model.remat={remat}", "model.dtype=float32", *overrides)
    config = load_config("bundled:tiny", overrides)
    values = json.loads((find_model(config.model.path) / "config.json").read_text())
    return train.build(abstract_job(config, values, 1), jax.devices()[:1])


@pytest.mark.parametrize(
    "remat, rows, experts",
    [
        ("selective", 4, "native"),  # as shipped
        ("full", 16, "native"),
        ("selective", 4, "block"),
        ("full", 16, "dense"),
        pytest.param("full", 4, "block", marks=pytest.mark.slow),
        pytest.param("selective", 16, "block", marks=pytest.mark.slow),
        pytest.param("full", 48, "block", marks=pytest.mark.slow),
    ],
)
def test_forecast(remat, rows, experts):
    """Within 15 % of the compiled step, everything counted."""
    run = build(remat, f"train.batch_size={rows}", f"model.experts={experts}")
    inputs = (run.abstract_params, run.abstract_state, abstract_batch(run))
    compiled = run.step.lower(*inputs).compile()
    analysis, measured = compiled.memory_analysis(), compiled_bytes(compiled).total
    parts = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes
    assert measured == pytest.approx(parts, rel=0.01)  # what is returned lies in what was given
    layout = memory_layout(run.job, run.mesh, experts)
    lora = bytes_on_one_device(run.abstract_state.lora)
    resident = bytes_on_one_device(inputs)
    predicted = resident + predicted_step_bytes(run.job.model_config, layout, lora, remat)
    assert abs(predicted / measured - 1) <= 0.15, (predicted / 2**20, measured / 2**20)
    assert f"with model.remat={remat}" in run.forecast


MIXTRAL, QWEN, DEEPSEEK = "Mixtral-8x7B-v0.1", "Qwen3-30B-A3B-shape", "DeepSeek-V3-shape"
OLMOE = "OLMoE-1B-7B-0924"
COMPILED = [  # model, tokens, expert shards, fsdp, tensor, slices, remat, GiB of factors, GiB added
    (MIXTRAL, 2048, 8, 8, 1, 1, "selective", 0.145, 11.27),
    (MIXTRAL, 8192, 2, 8, 4, 1, "selective", 0.145, 14.23),
    (MIXTRAL, 4096, 8, 1, 1, 1, "selective", 0.145, 21.69),
    (MIXTRAL, 2048, 8, 2, 1, 1, "selective", 0.145, 11.48),
    (MIXTRAL, 2048, 8, 4, 1, 2, "selective", 0.145, 13.72),
    (QWEN, 2048, 8, 8, 1, 1, "selective", 0.5625, 7.28),
    (QWEN, 2048, 8, 4, 1, 2, "selective", 0.5625, 8.23),
    (DEEPSEEK, 2048, 8, 4, 8, 1, "full", 0.953, 15.05),
    (OLMOE, 4096, 8, 1, 1, 1, "selective", 0.1016, 7.27),
    (OLMOE, 2048, 8, 1, 1, 1, "selective", 0.1016, 3.81),
    (OLMOE, 4096, 4, 2, 1, 1, "selective", 0.1953, 5.38),
    (OLMOE, 2048, 8, 1, 1, 2, "selective", 0.1016, 6.30),
    (QWEN, 2048, 8, 2, 1, 1, "selective", 0.5625, 7.34),
    (MIXTRAL, 4096, 4, 1, 2, 1, "full", 0.145, 9.67),
]


@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_forecast_of_steps_compiled_for_tpus(case):
    """As benchmarks/aot_tpu.py said, with jax 0.12.0.1 and libtpu 0.0.50.1 (docs/scaling.md)."""
    model, tokens, experts, fsdp, tensor, slices, remat, lora, added = case
    values = json.loads((ROOT / "benchmarks" / "models" / f"{model}.json").read_text())
    layout = Layout(tokens, 2, "ragged", experts, fsdp, tensor, 32, roles=2, slices=slices)
    predicted = predicted_step_bytes(parse_config(values), layout, int(lora * 2**30), remat)
    assert abs(predicted / 2**30 / added - 1) <= 0.15, predicted / 2**30


def test_what_a_forecast_depends_on():
    config = build("selective").job.model_config
    layout = Layout(tokens=4096, item=2, experts="ragged", max_rank=16, roles=2)

    def predict(remat="selective", lora=0, **changes):
        return predicted_step_bytes(config, layout._replace(**changes), lora, remat)

    full, selective, none = (predict(remat) for remat in ("full", "selective", "none"))
    assert full < selective < none
    assert predict(lora=1000) == selective + 2000
    # An expert shard keeps no pre-activations, of which most are others'.
    assert predict(expert_shards=4) < selective * 4
    assert predict(tokens=8192) < 2 * selective
    assert jax.tree.all(jax.tree.map(lambda size: size > 0, [full, selective, none]))
