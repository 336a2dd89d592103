"""The configs of the repository that no other test runs: they load, and mean what they say."""

import ast
import json
import math
import pathlib
import re

import pytest

from drlora_jax.adapters.targets import coverage
from drlora_jax.config import load_config
from drlora_jax.config.resolve import make_adapter
from drlora_jax.errors import UserError
from drlora_jax.models.families import parse_config
from drlora_jax.parallel.mesh import AXES, resolve_sizes
from drlora_jax.parallel.mesh_checks import check_mesh
from drlora_jax.training.job import prepare
from tests.support.llama import LLAMA_2_7B
from tests.support.tiny import OLMOE, write_tiny_model

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
MIXTRAL_8X7B = {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
MULTI_TASK = (
    "data.path=arc_easy=allenai/ai2_arc:ARC-Easy,arc_challenge=allenai/ai2_arc:ARC-Challenge,"
    "boolq=google/boolq,openbookqa=allenai/openbookqa:main,piqa=baber/piqa"
)


def docstring(config=MIXLORA) -> str:
    return ast.get_docstring(ast.parse(pathlib.Path(config).read_text()))


def trained(config, values=SMOLLM2_135M) -> int:
    model_config = parse_config(values)
    adapter = make_adapter(config, model_config)
    return sum(row.trained for row in coverage(model_config, adapter, config.adapter.targets))


def test_mixlora_and_its_baseline_train_as_many_parameters_as_the_docstring_says():
    config = load_config(MIXLORA)
    baseline = load_config(MIXLORA, ["adapter.kind=lora", "adapter.rank=43"])
    text = docstring()
    for each, count in ((config, 13_224_960), (baseline, 13_127_040)):
        assert trained(each) == count
        assert f"{count:,}" in text


def test_mixlora_on_a_dense_model_trains_as_many_parameters_as_the_docstring_says():
    config = CONFIGS / "mixlora.py"
    assert trained(load_config(str(config)), LLAMA_2_7B) == 203_423_744
    assert "203,423,744" in docstring(config)


@pytest.mark.parametrize("config", ["mixlora.py"])
def test_it_prepares_with_a_model_alone(tmp_path, config):
    (tmp_path / "model").mkdir()
    write_tiny_model(tmp_path / "model", OLMOE | {"model_type": "llama"})
    local = [f"model.path={tmp_path / 'model'}", f"run.dir={tmp_path / 'run'}", "data.max_rows=20"]
    job = prepare(load_config(str(CONFIGS / config), local))
    assert job.adapter.kind == "mixlora" and len(job.loader.documents) == 20


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
    assert job.adapter.kind == ("lora" if overrides else "mixlora")
    assert document.is_target.any() and not document.is_target.all()


def documented_commands():
    """Arguments of every command in README, docs and launch/ that trains a config of ours."""
    root = CONFIGS.parent
    files = [
        root / "README.md",
        *root.glob("docs/**/*.md"),
        *root.glob("launch/*"),
        *CONFIGS.iterdir(),
    ]
    for file in files:
        if file.is_file():
            text = file.read_text().replace("\\\n", " ")
            for words in re.findall(
                r"--config (configs/mixtral\.py(?: +[a-z]+\.\w+=[^\s`]+)*)", text
            ):
                yield file.name, words.split()


DOCUMENTED = list(documented_commands())


def check_mixtral(path: str, overrides: list[str]) -> tuple[int, ...]:
    """Sizes of the mesh that a command asks for, on eight devices where it leaves one open."""
    config = load_config(str(CONFIGS.parent / path), overrides)
    sizes = [getattr(config.mesh, axis) for axis in AXES]
    wanted = resolve_sizes(config.mesh, 8 if -1 in sizes else math.prod(sizes))
    check_mesh(config, parse_config(MIXTRAL_8X7B), wanted)
    return wanted


def test_documented_meshes_of_mixtral_are_accepted():
    meshes = [check_mixtral(path, overrides) for _, (path, *overrides) in DOCUMENTED]
    assert len(meshes) > 3 and max(map(math.prod, meshes)) >= 64
    path, *overrides = DOCUMENTED[0][1]
    with pytest.raises(UserError, match="must be a multiple of mesh.data"):
        check_mixtral(path, [*overrides, "train.batch_size=1", "train.micro_batches=1"])
