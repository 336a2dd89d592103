"""Directories that were given as a model or as a run and are something else."""

import json
import pathlib

import pytest

from drlora_jax.errors import UserError
from drlora_jax.inference.words import of_base
from drlora_jax.interop.directories import describe, is_run, read_run
from drlora_jax.interop.hf_files import find_model, read_model_config
from drlora_jax.reporting.read import read_run as read_log
from tests.support.tiny import OLMOE

RUN = {
    "config": {"model": {"path": "owner/base"}, "run": {"dir": "r"}},
    "base_fingerprint": "b",
    "data_fingerprint": "d",
    "schedule_steps": 12,
}
ADAPTER = {"base_model_name_or_path": "owner/base", "peft_type": "LORA"}


def write(folder: pathlib.Path, **files) -> pathlib.Path:
    """Files by their names, dots written as __; a dict as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text)
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Models, runs and other directories, each by what it is."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "model", config__json=OLMOE)
    write(tmp_path / "runs" / "a", config__json=RUN)
    write(tmp_path / "runs" / "a" / "checkpoints" / "5" / "arrays", x="")
    write(tmp_path / "adapter", adapter_config__json=ADAPTER)
    write(tmp_path / "runs" / "a" / "peft", adapter_config__json=ADAPTER)
    write(tmp_path / "no_base", adapter_config__json={})
    write(tmp_path / "gguf", model__Q4__gguf="GGUF")
    write(tmp_path / "pickles", pytorch_model__bin="", tokenizer__json="{}")
    write(tmp_path / "meta", consolidated__00__pth="", params__json="{}")
    write(tmp_path / "empty")
    write(tmp_path / "owner" / "name")
    write(tmp_path / "other", a__txt="")
    write(tmp_path / "models" / "x", config__json=OLMOE)
    write(tmp_path / "pipe", config__json={"_class_name": "StableDiffusion"})
    write(tmp_path / "hub" / "models--owner--base" / "snapshots" / "abc", config__json=OLMOE)
    return tmp_path


AS_MODEL = {
    "runs/a": "runs/a is a run directory, .* use it with --run; its base model is owner/base",
    "runs/a/checkpoints": "is inside the run runs/a, .* use --run runs/a",
    "runs/a/checkpoints/5": "is inside the run runs/a, .* use --run runs/a",
    "runs/a/checkpoints/5/arrays": "is inside the run runs/a, .* use --run runs/a",
    "runs": r"a folder of runs \(a\), .* use --run with one of them",
    "adapter": "a PEFT adapter of the base model owner/base, .* give that base model",
    "runs/a/peft": "a PEFT adapter of the base model owner/base, .* give that base model",
    "no_base": "is a PEFT adapter, .* give its base",
    "gguf": r"a directory of GGUF weights \(model.Q4.gguf\), .* GGUF is not read",
    "pickles": r"pickle files \(pytorch_model.bin\), .* convert them to safetensors",
    "meta": r"weights in Meta's own format \(consolidated.00.pth\)",
    "empty": "is an empty directory, .* give one that has a config.json",
    "owner/name": "is an empty directory, .* remove it to have the hub's model of this name",
    "models": r"a folder of models \(x\), .* such as models/x",
    "hub/models--owner--base": "the hub cache's folder of owner/base, .* give the name owner/base",
    "hub/models--owner--base/snapshots": "the hub cache's folder of owner/base, .*/snapshots/abc",
    "pipe": "does not name a model_type.*it has _class_name",
    "other": "other has no config.json; give a Hugging Face model directory",
}
AS_RUN = {
    "model": "--run model is a model directory, not a run; use it with --model",
    "runs/a/checkpoints/5": "is inside the run runs/a, not a run; give runs/a",
    "runs/a/config.json": "is a file; give runs/a",
    "model/config.json": "is a file; give the run.dir of a training",
    "runs": "is a folder of runs .*give one of them, such as runs/a",
    "runs/a/peft": "a PEFT adapter .* give the run.dir that it was exported from",
    "empty": "an empty directory, not a run; give the run.dir of a training that saved",
    "other": "is not a run: it has no config.json of one; give the run.dir",
    "absent": "--run absent is absent; give the run.dir of a training",
}


@pytest.mark.parametrize("path", AS_MODEL)
def test_what_is_no_model(place, path):
    with pytest.raises(UserError, match=AS_MODEL[path]):
        read_model_config(find_model(path))
    with pytest.raises(UserError, match=AS_MODEL[path]):  # rather than that it has no tokenizer
        of_base(find_model(path))


@pytest.mark.parametrize("path", AS_RUN)
def test_what_is_no_run(place, path):
    with pytest.raises(UserError, match=AS_RUN[path]) as caught:
        read_run(pathlib.Path(path), f"--run {path}")
    assert "new" not in str(caught.value)  # nothing is to be written there


@pytest.mark.parametrize("path", ["model", "runs", "runs/a/peft", "empty", "other"])
def test_a_report_says_the_same(place, path):
    with pytest.raises(UserError, match=AS_RUN[path].removeprefix("--run ")):
        read_log(pathlib.Path(path))


def test_models_and_runs_are_what_they_are(place):
    assert read_run(pathlib.Path("runs/a"), "") == RUN
    assert read_model_config(find_model("model")).family == "olmoe"
    write(place / "runs" / "a" / "model", config__json=OLMOE)  # made by pretraining
    assert read_model_config(find_model("runs/a/model")).family == "olmoe"
    assert describe(place / "other") is None


@pytest.mark.parametrize(
    "changes",
    [{"config": 3}, {"config": {"run": 3}}, {"base_fingerprint": None}, {"schedule_steps": 0}],
)
def test_a_damaged_config_is_no_run(place, changes):
    assert is_run(RUN) and not is_run(RUN | changes)
    write(place / "runs" / "a", config__json=RUN | changes)
    with pytest.raises(
        UserError, match="has a config.json that lacks values of a run. Is it damaged"
    ):
        read_run(pathlib.Path("runs/a"), "--run runs/a")
