"""A run and its base: found where they are, and what is said when they are elsewhere."""

import json
import pathlib
import shutil

import pytest

from drlora_jax.errors import UserError
from drlora_jax.interop.hf_files import fingerprint, legacy_fingerprint
from drlora_jax.runs.directory import RunDirectory
from drlora_jax.runs.source import find_run, read_stored
from drlora_jax.training.job import prepare
from tests.support.tiny import tiny_config


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A run in ./run on the base ./model, as its first checkpoint leaves it."""
    monkeypatch.chdir(tmp_path)
    config = tiny_config(pathlib.Path("."))
    run = RunDirectory("run")
    origin = {"base_fingerprint": fingerprint(tmp_path / "model"), "data_fingerprint": "d"}
    run.create(config, origin, 12)
    (run.checkpoints / "5").mkdir(parents=True)
    return tmp_path


def change(place, **values):
    """Values of the run's config.json; ... takes one out."""
    file = place / "run" / "config.json"
    stored = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in stored.items() if value is not ...}))


def resolved() -> dict:
    """The block of a new run in this place."""
    return prepare(tiny_config(pathlib.Path("."), "other")).resolved.to_json()


def test_a_run_finds_its_base(place):
    source = find_run("run")
    assert source.step == 5 and source.directory == pathlib.Path("model")
    assert find_run((place / "run").as_uri()).run_dir == place / "run"


def test_an_older_run_finds_its_base(place):
    older = legacy_fingerprint(place / "model")
    change(place, base_fingerprint=older)
    assert find_run("run").base_fingerprint == older  # as results before had it
    change(place, resolved=resolved())
    with pytest.raises(UserError, match="model is not the base model of run.*with --model-path"):
        find_run("run")


def test_an_older_run_goes_on(place):
    """Its base is known by the fingerprint that it has, and keeps it."""
    job = prepare(tiny_config(pathlib.Path("."), "older"))
    origin = job.origin | {"base_fingerprint": legacy_fingerprint(job.directory)}
    job.run_dir.create(job.config, origin, job.schedule_steps)
    (job.run_dir.checkpoints / "5").mkdir(parents=True)
    again = prepare(job.config)
    assert not again.is_new and again.origin == origin != job.origin
    flip = bytearray((place / "model" / "model.safetensors").read_bytes())
    flip[-3] ^= 1
    (place / "model" / "model.safetensors").write_bytes(flip)
    with pytest.raises(UserError, match="base_fingerprint"):
        prepare(job.config)


def test_a_base_that_is_written_otherwise_is_the_same(place):
    file = place / "model" / "config.json"
    values = json.loads(file.read_text())
    values |= {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "dtype": "x"}
    file.write_text(json.dumps(values, indent=7))
    assert find_run("run").step == 5
    file.write_text(json.dumps(values | {"rope_parameters": {"rope_theta": 5e4}}))
    with pytest.raises(UserError, match="model is not the base model of run"):
        find_run("run")


def test_a_relative_base_from_another_folder(place, monkeypatch):
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    with pytest.raises(UserError) as caught:
        find_run("../run")
    message = str(caught.value)
    assert message.startswith("model.path=model: no such directory.")
    assert "relative to the folder where it was started" in message and "--model-path" in message
    assert find_run("../run", model_path="../model").step == 5
    with pytest.raises(UserError, match="^--model-path nowhere: no such directory"):
        find_run("../run", model_path="nowhere")


def test_an_absolute_base_that_has_moved(place):
    stored = json.loads((place / "run" / "config.json").read_text())
    stored["config"]["model"]["path"] = str(place / "gone")
    change(place, **stored)
    with pytest.raises(UserError, match="gone: no such directory.*with --model-path") as caught:
        find_run("run")
    assert "relative" not in str(caught.value)


def test_a_hub_name_is_loaded_in_its_revision(place, monkeypatch):
    import huggingface_hub

    asked = []

    def give(name, *, revision, allow_patterns):
        asked.append((name, revision))
        return str(place / "model")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", give)
    stored = json.loads((place / "run" / "config.json").read_text())
    stored["config"]["model"]["path"] = "owner/name"
    change(place, **stored)
    assert find_run("run").step == 5
    change(place, resolved=resolved() | {"model_revision": "a" * 40})
    assert find_run("run").step == 5
    assert asked == [("owner/name", None), ("owner/name", "a" * 40)]


def test_what_is_no_run_is_named_for_a_reader(place):
    for path, message in (
        ("model", "--run model is a model directory, not a run; use it with --model"),
        ("run/checkpoints", "inside the run run, not a run; give run"),
        ("run/checkpoints/5", "inside the run run, not a run; give run"),
        (".", "a folder of runs .run., not a run; give one of them, such as run"),
        ("absent", "--run absent is absent; give the run.dir of a training"),
        ("gs://b/run", "--run gs://b/run is a URL"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            find_run(path)
        assert "new" not in str(caught.value)


def test_a_run_without_a_checkpoint(place):
    shutil.rmtree(place / "run" / "checkpoints")
    with pytest.raises(UserError, match="run has no finished checkpoint"):
        read_stored("run")
    (place / "run" / "checkpoints").write_text("")
    with pytest.raises(UserError, match="checkpoints must be a directory of checkpoints"):
        read_stored("run")
