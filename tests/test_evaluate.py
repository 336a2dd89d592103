"""Whole evaluations through `main`, of a tiny random model and of a run made with it."""

import json
import math

import numpy as np
import pytest

from drlora_jax import evaluate, train
from drlora_jax.errors import EXIT_DONE, UserError
from drlora_jax.evaluation import compare
from drlora_jax.training.job import prepare
from tests.support.tiny import tiny_config, write_tiny_model

ONE = "mesh.data=1"  # device: sharded programs take longer to compile
ARC = [
    {
        "question": f"What is {number}?",
        "choices": {"text": ["a stone", f"{number}", "a cat"], "label": ["A", "B", "C"]},
        "answerKey": "B",
    }
    for number in range(12)
]
GSM8K = [
    {"question": f"What is {a} and 2?", "answer": f"It is <<{a}+2={a + 2}>>{a + 2}.\n#### {a + 2}"}
    for a in range(6)
]


def write_lines(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    data = folder / "data"
    write_lines(data / "arc_easy_test.jsonl", ARC)
    write_lines(data / "gsm8k" / "test.jsonl", GSM8K)
    write_lines(data / "gsm8k" / "train.jsonl", [GSM8K[0] | {"question": "And 0?"}, GSM8K[1]])
    (folder / "book.txt").write_text("Once upon a time there was a cat. " * 40)
    return folder


@pytest.fixture(scope="module")
def run_dir(folder):
    config = tiny_config(folder, run=dict(keep_last=9), data=dict(template="question_answer"))
    assert train.train(train.build(prepare(config))) == EXIT_DONE
    return folder / "run"


@pytest.fixture(scope="module")
def model(folder):
    return write_tiny_model(folder / "base")


def scores(folder):
    rows = json.loads((folder / "eval.json").read_text())["scores"]
    return {(row["task"], row["metric"], row["step"]): row for row in rows}


def lines(folder, row):
    return [json.loads(line) for line in (folder / row["samples"]).read_text().splitlines()]


def test_a_base_is_evaluated(folder, model, tmp_path, capsys):
    arguments = ["--model", str(model), "--data-dir", str(folder / "data"), "--out", str(tmp_path)]
    tasks = "arc_easy,arc_easy:mixlora,gsm8k"
    found = evaluate.main(
        [*arguments, "--tasks", tasks, "--max-new-tokens", "4", "--limit", "5", ONE]
    )
    assert found == EXIT_DONE
    rows = scores(tmp_path)
    assert set(rows) == {
        ("arc_easy", "acc", None),
        ("arc_easy", "acc_norm", None),
        ("arc_easy:mixlora", "acc", None),
        ("gsm8k", "exact_match_strict", None),
        ("gsm8k", "exact_match_flexible", None),
    }
    row = rows["arc_easy", "acc_norm", None]
    samples = lines(tmp_path, row)
    assert row["n"] == len(samples) == 5 and row["settings"]["limit"] == 5
    assert row["value"] == np.mean([sample["values"]["acc_norm"] for sample in samples])
    for sample in samples:
        number = int(sample["id"]) - 1
        assert sample["prompt"] == f"Question: What is {number}?\nAnswer:"
        assert sample["choices"] == [" a stone", f" {number}", " a cat"] and sample["gold"] == 1
        assert sample["predicted"] == int(np.argmax(sample["loglikelihoods"]))
        assert sample["correct"] == (sample["predicted"] == 1)
    assert row["stderr"] is not None and row["ci95"][0] <= row["value"] <= row["ci95"][1]
    assert row["prompt_hash"] and row["data_fingerprint"] and row["base_fingerprint"]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split()[:3] == ["task", "metric", "value"]
    # Six lines of the table, and one for every accuracy that is not above chance.
    assert all("chance" in line for line in printed[6:])
    assert not any("chance" in line for line in printed[:6])


def test_a_run_and_its_base_are_evaluated(run_dir, capsys):
    """The loss is the one that training measured at a step, and the base's is that of step 0."""
    logged = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    measured = {row["step"]: row["eval_loss"] for row in logged if "eval_loss" in row}
    for arguments, step in ((["--step", "6"], 6), ([], 12), (["--base"], None)):
        assert (
            evaluate.main(["--run", str(run_dir), "--tasks", "loss", ONE, *arguments]) == EXIT_DONE
        )
        row = scores(run_dir)["loss", "loss", step]
        assert row["value"] == pytest.approx(measured[step or 0], rel=1e-6)
        assert row["n"] == 12 and (row["adapter_fingerprint"] is None) == (step is None)
    rows = scores(run_dir)
    assert len(rows) == 6  # of three models, each kept
    perplexity = rows["loss", "perplexity", 12]
    assert perplexity["value"] == pytest.approx(math.exp(rows["loss", "loss", 12]["value"]))
    documents = lines(run_dir, rows["loss", "loss", 12])
    total = sum(document["nll"] for document in documents)
    tokens = sum(document["target_tokens"] for document in documents)
    assert rows["loss", "loss", 12]["value"] == pytest.approx(total / tokens, rel=1e-9)
    pair = [str(run_dir / rows["loss", "loss", step]["samples"]) for step in (None, 12)]
    capsys.readouterr()
    assert compare.main(pair) == EXIT_DONE
    assert capsys.readouterr().out.startswith("loss: second - first = -")


def test_questions_are_asked_as_the_run_was_trained(run_dir, folder):
    arguments = ["--run", str(run_dir), "--data-dir", str(folder / "data"), "--max-new-tokens", "3"]
    assert evaluate.main([*arguments, "--tasks", "gsm8k", "--shots", "2", "--limit", "2", ONE]) == 0
    [sample, _] = lines(run_dir, scores(run_dir)["gsm8k", "exact_match_strict", 12])
    number = int(sample["id"]) - 1
    assert sample["prompt"] == (
        "Question: And 0?\nAnswer: It is 2.\n#### 2\n\n"
        "Question: What is 1 and 2?\nAnswer: It is 3.\n#### 3\n\n"
        f"Question: What is {number} and 2?\nAnswer:"
    )


def test_auto_is_the_template_of_the_run(run_dir, folder):
    arguments = ["--run", str(run_dir), "--tasks", "gsm8k", "--data-dir", str(folder / "data")]
    assert evaluate.settings_of(evaluate._parse(arguments)).template is None
    assert evaluate.settings_of(evaluate._parse([*arguments, "--template", "none"])).template
    arguments += ["--template", "auto", "--max-new-tokens", "1", "--limit", "1", ONE]
    assert evaluate.main(arguments) == EXIT_DONE
    row = scores(run_dir)["gsm8k", "exact_match_strict", 12]
    [sample] = lines(run_dir, row)
    assert sample["prompt"].startswith("Question: ") and sample["prompt"].endswith("\nAnswer:")
    # It is not an option of its own: tasks that read no template take it.
    with pytest.raises(
        UserError, match="--system: arc_easy uses no template by default; add --chat"
    ):
        evaluate.main([*arguments, "--tasks", "arc_easy", "--system", "s"])
    with pytest.raises(UserError, match="--template: arc_easy uses no template by default"):
        evaluate.main([*arguments, "--tasks", "arc_easy", "--template", "tulu"])


def test_loss_of_files_does_not_depend_on_the_mesh_or_rows(folder, model, tmp_path):
    """Windows of a text predict every token but the first once."""
    values = []
    for extra in (["--batch-size", "1", "mesh.data=1"], ["--batch-size", "16", "mesh.expert=2"]):
        arguments = ["--model", str(model), "--out", str(tmp_path), "--max-length", "32"]
        assert evaluate.main([*arguments, "--loss", str(folder / "book.txt"), *extra]) == EXIT_DONE
        row = scores(tmp_path)["loss", "loss", None]
        values.append(row["value"])
        windows = lines(tmp_path, row)
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    tokens, targets = (sum(w[name] for w in windows) for name in ("tokens", "target_tokens"))
    assert tokens - len(windows) == targets and len(windows) > 4


def test_mistakes_are_found_before_a_model_is_loaded(folder, model, run_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("drlora_jax.cli.load_model", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = ["--data-dir", str(folder / "data")]
    broken = tmp_path / "broken.jsonl"
    write_lines(broken, [ARC[0], {"question": "no answer"}])
    train_file = folder / "data" / "gsm8k" / "train.jsonl"
    cases = [
        ([], "one of the arguments --run --model is required|Nothing|ne of"),
        (["--model", str(model)], "Nothing to evaluate"),
        (["--model", str(model), "--tasks", "arc_esy"], "did you mean arc_easy"),
        (["--model", str(model), "--tasks", "piqa", *data], "No data for piqa"),
        (["--model", str(model), "--tasks", f"arc_easy={broken}"], "broken.jsonl:2: not a row of"),
        (["--model", str(model), "--tasks", "arc_easy=absent.jsonl"], "absent.jsonl: no such file"),
        (["--model", str(model), "--tasks", "arc_easy", "--data-dir", "absent"], "not a directory"),
        (["--model", str(model), "--tasks", "humaneval", *data], "--allow-code-execution"),
        (["--model", str(model), "--tasks", "loss"], "no data.eval_path; give a file"),
        (["--model", str(model), "--loss", str(train_file.parent)], "set data.eval_split=test, or"),
        (["--model", str(model), "--loss", "absent.txt"], "absent.txt cannot be read"),
        (["--model", str(model), "--tasks", "arc_easy", "--limit", "0", *data], "1 or more"),
        (["--model", str(model), "--tasks", "arc_easy", "train.steps=1"], "only mesh.field"),
        (["--model", "absent/model", "--tasks", "arc_easy", *data], "absent/model"),
        (["--run", str(tmp_path / "none"), "--tasks", "loss"], "none is absent"),
        (["--run", str(run_dir), "--step", "7", "--tasks", "loss"], "7"),
        (
            ["--model", str(model), "--tasks", "gsm8k", "--shots", "9", *data],
            "--shots 9: .*train.jsonl has 2 rows",
        ),
        (
            ["--model", str(model), "--tasks", f"gsm8k={train_file}", "--shots", "1", *data],
            "come from the evaluated file",
        ),
        (
            ["--model", str(model), "--tasks", "winogrande:mixlora", "--chat", *data],
            "No data for winogrande:mixlora|leave --chat out",
        ),
    ]
    for arguments, message in cases:
        with pytest.raises(UserError, match=message):
            evaluate.main(arguments)


def test_code_is_not_run_without_isolation(folder, model, monkeypatch):
    """Refused before a model is loaded; there is no other way to run it."""
    row = {"task_id": "0", "prompt": "def f():\n", "entry_point": "f", "test": "def check(f): f()"}
    write_lines(folder / "data" / "HumanEval.jsonl", [row])
    monkeypatch.setattr("drlora_jax.cli.load_model", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(
        "drlora_jax.evaluation.sandbox.Sandbox._probe", lambda self: "unavailable: no namespaces"
    )
    arguments = ["--model", str(model), "--data-dir", str(folder / "data"), "--tasks", "humaneval"]
    with pytest.raises(UserError, match="no namespaces"):
        evaluate.main([*arguments, "--allow-code-execution"])
