"""A run that an earlier version made (old_run.tar.gz) is still used, or says what it lacks.

The run was made before config.json had a block `resolved`: 48 chat rows with data.format=auto and
data.template=auto on bundled:tiny_moe, eight steps of rank 1 on `down`.
"""

import json
import pathlib
import shutil
import tarfile

import pytest

from drlora_jax import evaluate, export, generate, train
from drlora_jax.errors import EXIT_DONE, UserError
from drlora_jax.inference.words import of_run
from drlora_jax.runs.source import find_run

STORED = pathlib.Path(__file__).with_name("old_run.tar.gz")
TRAIN = (
    "--config bundled:tiny data.path=rows.jsonl data.eval_path= data.format=auto "
    "data.template=auto adapter.targets=down allocation.kind=dr_lora allocation.r_init=1 "
    "allocation.r_target=1 allocation.r_max=2 train.batch_size=4 train.sequence_length=128 "
    "run.dir=run run.checkpoint_every=4 allocation.interval=1 run.keep_last=1 run.log_every=1 "
    "mesh.data=1"
).split()
QUESTION = "What is 2 plus 3?"
PROMPT = "<|user|>What is 2 plus 3?<|assistant|>"  # by the tokenizer's own chat template
ONE = "mesh.data=1"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    with tarfile.open(STORED) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_its_words_are_found_again(folder):
    words = of_run(find_run("run"))
    assert words.resolved is None
    wording = words.wording()
    assert (wording.format, wording.template) == ("chat", "tokenizer")
    # Control tokens in users' text were taken for what they are.
    assert wording.special_tokens == "keep"


def test_rows_that_are_gone_or_changed_are_not_guessed(folder):
    rows = pathlib.Path("rows.jsonl")
    text = rows.read_text()
    asked = ["--run", "run", "--prompt", QUESTION, "--max-new-tokens", "1"]
    rows.write_text(text.replace("What is 1", "What was 1"))
    with pytest.raises(UserError, match="rows, or what reads them, have changed.*--template NAME"):
        generate.main(asked)
    rows.unlink()
    with pytest.raises(UserError, match=r"rows cannot be read .*--template NAME.*--format NAME"):
        generate.main(asked)
    tasks = pathlib.Path("gsm8k.jsonl")
    tasks.write_text(json.dumps({"question": QUESTION, "answer": "#### 5"}) + "\n")
    with pytest.raises(UserError, match="--template NAME"):
        evaluate.main(["--run", "run", "--tasks", f"gsm8k={tasks}", ONE])


def test_it_generates_evaluates_and_exports(folder, capsys):
    """The same words in generate and evaluate; named ones need no rows."""
    rows = pathlib.Path("rows.jsonl")
    tasks = pathlib.Path("gsm8k.jsonl")
    tasks.write_text(json.dumps({"question": QUESTION, "answer": "#### 5"}) + "\n")
    options = ["--max-new-tokens", "2", "--run", "run"]
    assert evaluate.main(["--tasks", f"gsm8k={tasks}", *options, ONE]) == EXIT_DONE
    [score] = json.loads(pathlib.Path("run/eval.json").read_text())["scores"][:1]
    [sample] = (pathlib.Path("run") / score["samples"]).read_text().splitlines()
    assert json.loads(sample)["prompt"] == PROMPT
    rows.unlink()
    named = [*options, "--template", "tokenizer"]
    assert generate.main(["--prompt", QUESTION, *named]) == EXIT_DONE
    written = json.loads((pathlib.Path("run") / score["samples"]).read_text())["text"]
    assert capsys.readouterr().out.rstrip("\n").endswith(written)
    assert export.main(["--run", "run", "--format", "peft", "--out", "adapter"]) == EXIT_DONE


def test_it_goes_on(folder, capsys):
    """The same rows by today's code: the losses are those that the code of its time had."""
    shutil.copytree("run", "other")
    assert train.main([*TRAIN, "train.steps=12"]) == EXIT_DONE
    rows = [json.loads(line) for line in pathlib.Path("run/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["step"] > 8]
    assert losses == pytest.approx([4.182389, 4.141812, 4.084000, 4.148409], abs=2e-5)
    assert "resolved" not in json.loads(pathlib.Path("run/config.json").read_text())
