"""A run that grew under the code before the folders is resumed, evaluated, exported."""

import json
import pathlib
import tarfile

import pytest

from drlora_jax import evaluate, export, generate, train
from drlora_jax.errors import EXIT_DONE
from tests.oracles.grown_run import ARCHIVE, RESULTS, STOPPED_AT, TRAIN, machine, result_of

RUN = pathlib.Path("run")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)


def test_it_goes_on_as_if_never_stopped(folder, capsys):
    """Bit for bit where jax and the processor are those that the results were made with."""
    expected = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert train.main([*TRAIN, "run.dir=run"]) == EXIT_DONE
    assert f"resuming at step {STOPPED_AT}" in capsys.readouterr().out
    found = json.loads(json.dumps(result_of(RUN)))
    if machine() == expected.pop("machine"):
        assert found == expected
    for name in ("step", "tokens", "ranks"):
        assert found[name] == expected[name]
    for name in ("losses", "grad_norms"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3)
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-3)
    assert found["arrays"].keys() == expected["arrays"].keys()


def test_an_event_was_before_the_stop_and_one_after_it():
    events = {int(step): ranks for step, ranks in json.loads(RESULTS.read_text())["ranks"].items()}
    assert min(events) < max(step for step in events if step < STOPPED_AT) < max(events)
    assert len({json.dumps(ranks) for ranks in events.values()}) == len(events)


def test_it_is_evaluated(folder, capsys):
    assert evaluate.main(["--run", "run", "--tasks", "loss", "mesh.data=1"]) == EXIT_DONE
    scores = json.loads((RUN / "eval.json").read_text())["scores"]
    values = {score["metric"]: score["value"] for score in scores}
    assert values["loss"] == pytest.approx(8.5797, abs=1e-3)  # what the code of its time says
    assert {score["step"] for score in scores} == {STOPPED_AT}


def test_it_generates_and_is_exported(folder, capsys, monkeypatch):
    monkeypatch.setattr(export, "check_opened", lambda made: [])  # torch takes seconds
    asked = ["--run", "run", "--prompt", "What is 2 plus 3?", "--max-new-tokens", "4"]
    assert generate.main(asked) == EXIT_DONE
    assert capsys.readouterr().out.strip().startswith("soon will")  # as the code of its time wrote
    assert export.main(["--run", "run", "--format", "peft", "--out", "adapter"]) == EXIT_DONE
    assert pathlib.Path("adapter/adapter_model.safetensors").is_file()
