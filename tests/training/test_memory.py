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
from drlora_jax.training.program import memory_layout

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
    inputs = (run.abstract_params, run.abstract_state, run.abstract_batch)
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


# As benchmarks/aot_tpu.py said, with jax 0.12.0.1 and libtpu 0.0.50.1.
LINES = (ROOT / "benchmarks" / "tpu_steps.jsonl").read_text(encoding="utf-8").splitlines()
FOR_TPUS = [json.loads(line) for line in LINES]


def mesh_of(case: dict) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in case["mesh"].items())


@pytest.mark.parametrize("case", FOR_TPUS, ids=lambda case: f"{case['model']} {mesh_of(case)}")
def test_forecast_of_steps_compiled_for_tpus(case):
    values = json.loads((ROOT / "benchmarks" / "models" / f"{case['model']}.json").read_text())
    experts, fsdp, tensor = (case["mesh"].get(axis, 1) for axis in ("expert", "fsdp", "tensor"))
    slices = case.get("slices", 1)
    layout = Layout(case["tokens"], 2, "ragged", experts, fsdp, tensor, 32, roles=2, slices=slices)
    factors = int(case["factors_gib"] * 2**30)
    predicted = predicted_step_bytes(parse_config(values), layout, factors, case["remat"]) / 2**30
    assert abs(predicted / case["added_gib"] - 1) <= 0.15, predicted


def test_the_table_of_the_documentation_has_the_same_steps():
    """A row for each whose whole size is known: the model, its mesh, and GiB on each device."""
    pages = (page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md"))
    (page,) = (page for page in pages if "| GiB per device |" in page)
    (table,) = (part for part in page.split("\n\n") if "| GiB per device |" in part)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    found = {(row[0][:5], row[2], row[4]) for row in cells[2:] if row[4]}
    known = [case for case in FOR_TPUS if "on_each_gib" in case]
    assert found == {(case["model"][:5], mesh_of(case), str(case["on_each_gib"])) for case in known}


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
