"""The configs of the repository that no other test runs: they load, and mean what they say."""

import ast
import json
import pathlib

import pytest
from tiny import OLMOE, write_tiny_model

from drlora_jax.adapters.targets import coverage
from drlora_jax.config import load_config
from drlora_jax.models.families import parse_config
from drlora_jax.prepare import make_adapter, prepare, with_adapter_experts

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
MIXLORA = str(CONFIGS / "mixlora_smollm2.py")
ALPHALORA = str(CONFIGS / "alphalora_smollm2.py")
SMOLLM2_135M = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
MULTI_TASK = (
    "data.path=arc_easy=allenai/ai2_arc:ARC-Easy,arc_challenge=allenai/ai2_arc:ARC-Challenge,"
    "boolq=google/boolq,openbookqa=allenai/openbookqa:main,piqa=baber/piqa"
)


def docstring(config=MIXLORA) -> str:
    return ast.get_docstring(ast.parse(pathlib.Path(config).read_text()))


def trained(config) -> int:
    model_config = with_adapter_experts(parse_config(SMOLLM2_135M), config.adapter)
    adapter = make_adapter(config, model_config)
    return sum(row.trained for row in coverage(model_config, adapter, config.adapter.targets))


def test_mixlora_and_its_baseline_train_as_many_parameters_as_the_docstring_says():
    config = load_config(MIXLORA)
    baseline = load_config(MIXLORA, ["adapter.kind=lora", "adapter.rank=43"])
    text = docstring()
    for each, count in ((config, 13_224_960), (baseline, 13_127_040)):
        assert trained(each) == count
        assert f"{count:,}" in text


@pytest.mark.parametrize("layers", ["5555", ",".join(["4", "6"] * 15)])
def test_alphalora_trains_as_many_parameters_as_the_docstring_says(layers):
    config = load_config(ALPHALORA, [f"adapter.experts_per_layer={layers}"])
    assert trained(config) == 12_960_000
    assert "12,960,000" in docstring(ALPHALORA)


def test_alphalora_in_one_step():
    overrides = "adapter.experts_per_layer=none allocation.kind=alphalora allocation.experts=150"
    assert overrides in docstring(ALPHALORA)
    config = load_config(ALPHALORA, overrides.split())
    assert config.allocation.experts == 5 * 30 and config.adapter.num_experts == 8


def test_the_documented_overrides_are_in_the_docstring_and_load():
    text = docstring().replace("\\\n", "")
    assert MULTI_TASK in text
    config = load_config(MIXLORA, [MULTI_TASK])
    assert len(config.data.path) == 5
    assert config.data.path[3] == "openbookqa=allenai/openbookqa:main"


@pytest.mark.parametrize("overrides", [(), ("adapter.kind=lora", "adapter.rank=3")])
def test_it_prepares_from_a_local_file(tmp_path, overrides):
    (tmp_path / "model").mkdir()
    write_tiny_model(tmp_path / "model", OLMOE | {"model_type": "llama"})
    row = {"query": "What falls?", "choices": ["salt", "rain"], "gold": 1}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    local = [
        f"model.path={tmp_path / 'model'}",
        f"data.path=arc_easy={tmp_path / 'rows.jsonl'}",
        "data.eval_path=",
        f"run.dir={tmp_path / 'run'}",
    ]
    job = prepare(load_config(MIXLORA, [*local, *overrides]))
    (document,) = job.loader.documents
    assert job.adapter.experts_module == ("moe" if overrides else "mlp")
    assert document.is_target.any() and not document.is_target.all()
