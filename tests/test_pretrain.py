"""Pretraining from scratch on two small domains: learns, resumes, and writes a model that loads."""

import json
import signal

import pytest

from drlora_jax import pretrain
from drlora_jax.errors import EXIT_DONE, EXIT_RESUMABLE, UserError
from drlora_jax.interop.hf_read import load_model
from drlora_jax.runs.directory import RunDirectory
from tests.support.tiny import OLMOE, write_tiny_model

CONFIG = """
from drlora_jax.config import *
def get_config():
    return TrainConfig(
        run=RunSection(dir="{run}", log_every=2, checkpoint_every=4),
        model=ModelSection(path="{model}"),
        data=DataSection(path=("{folder}/a.jsonl", "{folder}/b.jsonl"),
                         eval_path=("{folder}/a.jsonl", "{folder}/b.jsonl"),
                         format="text", too_long="split", loss_on="all"),
        train=TrainSection(steps=8, batch_size=4, sequence_length=32, learning_rate=1e-2,
                           balance_loss=0.01, balance_form="per_layer", z_loss=1e-4, eval_every=8),
    )
"""


@pytest.fixture
def config_file(tmp_path):
    write_tiny_model(tmp_path / "model", OLMOE)
    for name, word in (("a", "cat sat on the mat. "), ("b", "return x + 1\n")):
        rows = [json.dumps({"text": word * count}) for count in range(3, 30)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    values = {"run": tmp_path / "run", "model": tmp_path / "model", "folder": tmp_path}
    file = tmp_path / "config.py"
    file.write_text(CONFIG.format(**values))
    return file


def test_pretraining_learns_and_writes_a_model(tmp_path, config_file, capsys):
    assert pretrain.main(["--config", str(config_file)]) == EXIT_DONE
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(row)["loss"] for row in rows if "loss" in json.loads(row)]
    assert losses[-1] < losses[0] - 1
    report = json.loads((tmp_path / "run" / "pretrain.json").read_text())
    assert set(report["heldout"]) == {"a", "b"}
    assert all(abs(sum(load) - 1) < 1e-3 for load in report["heldout"]["a"]["load"])
    model, params = load_model(str(tmp_path / "run" / "model"))
    assert params["embedding"].shape == (model.config.vocab_size, model.config.width)


def test_another_config_is_refused_and_more_steps_go_on(tmp_path, config_file):
    arguments = ["--config", str(config_file)]
    assert pretrain.main(arguments) == EXIT_DONE
    with pytest.raises(UserError, match="created with train.learning_rate"):
        pretrain.main([*arguments, "train.learning_rate=0.5"])
    assert pretrain.main([*arguments, "train.steps=10"]) == EXIT_DONE
    assert json.loads((tmp_path / "run" / "pretrain.json").read_text())["steps"] == 10


def test_a_signal_stops_it_and_the_same_command_goes_on(tmp_path, config_file, monkeypatch):
    arguments = ["--config", str(config_file)]

    def mixed(domains, step):
        if step == 3:
            signal.raise_signal(signal.SIGTERM)
        return mixed_batch(domains, step)

    mixed_batch = pretrain.mixed_batch
    monkeypatch.setattr(pretrain, "mixed_batch", mixed)
    assert pretrain.main(arguments) == EXIT_RESUMABLE
    assert not (tmp_path / "run" / "model").exists()
    seen = []
    monkeypatch.setattr(
        pretrain, "mixed_batch", lambda *given: seen.append(given[1]) or mixed_batch(*given)
    )
    assert pretrain.main(arguments) == EXIT_DONE
    assert seen[0] == 4
    with RunDirectory(str(tmp_path / "run")).locked(), pytest.raises(UserError, match="in use by"):
        pretrain.main(arguments)


@pytest.mark.parametrize(
    "override, message",
    [
        ("model.dtype=bfloat16", "needs model.dtype=float32"),
        ("data.loss_on=response", "needs data.loss_on=all"),
        ("train.batch_size=3", "must be a multiple of the number of domains .2."),
        ("train.epochs=1", "counts steps"),
    ],
)
def test_mistakes_are_named(config_file, override, message):
    with pytest.raises(UserError, match=message):
        pretrain.main(["--config", str(config_file), override])
