"""Tasks of lm-evaluation-harness on our models: whole tasks, mistakes, no network."""

import json
import math
import socket
from types import SimpleNamespace

import numpy as np
import pytest

from drlora_jax import evaluate
from drlora_jax.data.wording import Writer, named_wording
from drlora_jax.errors import UserError
from drlora_jax.evaluation import harness
from drlora_jax.evaluation.records import Settings
from tests.support.harness import (
    TEMPLATE,
    WORDS,
    greedy,
    ids_of,
    make_model,
    one_by_one,
    requests_of,
    with_template,
)

MULTIPLE_CHOICE = """
task: animals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/animals.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
  - {{metric: mcc, aggregation: matthews_corrcoef, higher_is_better: true}}
metadata: {{version: 3.0}}
"""
TEXTS = """
task: texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/texts.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
"""
WRITTEN = """
task: written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/animals.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[gold]}}}}"
generation_kwargs: {{until: ["e"], max_gen_toks: 6, do_sample: false}}
filter_list:
  - {{name: whole, filter: [{{function: take_first}}]}}
  - name: letters
    filter: [{{function: regex, regex_pattern: "([a-z]+)"}}, {{function: take_first}}]
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
GROUP = """
group: two
task: [animals, other]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
metadata: {version: 2}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Definitions of tasks, with 9 questions and 4 texts."""
    folder = tmp_path_factory.mktemp("tasks")
    draw = np.random.default_rng(0)

    def some(count):
        return " ".join(draw.choice(WORDS, count))

    questions = [
        {"question": some(5), "choices": [some(2), some(2), some(2)], "gold": int(draw.integers(3))}
        for _ in range(9)
    ]
    texts = [{"text": some(count)} for count in (3, 90, 200, 1)]
    for name, rows in (("animals", questions), ("texts", texts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = MULTIPLE_CHOICE.replace("task: animals", "task: other").replace("Question", "Asked")
    for name, text in (("a", MULTIPLE_CHOICE), ("t", TEXTS), ("w", WRITTEN), ("o", other)):
        (folder / f"{name}.yaml").write_text(text.format(folder=folder))
    (folder / "g.yaml").write_text(GROUP)
    return folder


@pytest.fixture
def no_network(monkeypatch):
    """Refuses connections; one that was tried fails the test even if its refusal was swallowed."""
    tried = []

    def refuse(*args, **_):
        tried.append(args[1:] or args)
        raise OSError("no network in this test")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert not tried


# ------------------------------------------------------------------------------------ whole tasks


def run_tasks(loaded, tasks, names, settings=None, **options):
    settings = settings or Settings()
    wording = named_wording("tokenizer", loaded.tokenizer) if settings.chat else None
    writer = Writer(wording, loaded.tokenizer) if wording else None
    prepared = harness.prepare(names, settings, writer=writer, task_path=str(tasks), **options)
    found = harness.run(prepared, loaded)
    return found, {(score.task, score.metric): score for _, scores in found for score in scores}


def test_multiple_choice(lm_eval, loaded, tasks, no_network):
    [(samples, _)], scores = run_tasks(loaded, tasks, ["animals"])
    rows = [json.loads(line) for line in (tasks / "animals.jsonl").read_text().splitlines()]
    right = []
    for row, sample in zip(rows, samples, strict=True):
        prompt = f"Question: {row['question']}\nAnswer:"
        ids = ids_of(loaded, prompt)
        totals = [
            one_by_one(loaded, ids, ids_of(loaded, f"{prompt} {choice}")[len(ids) :])[0]
            for choice in row["choices"]
        ]
        np.testing.assert_allclose(sample.fields["loglikelihoods"], totals, atol=1e-4)
        assert sample.fields["prompt"] == prompt
        right.append(float(np.argmax(totals) == row["gold"]))
    assert [sample.values["acc"] for sample in samples] == right
    score = scores["lm_eval:animals", "acc"]
    assert score.value == pytest.approx(np.mean(right)) and score.n == 9
    assert score.stderr == pytest.approx(np.std(right, ddof=1) / 3)
    assert score.version == "3.0" and score.settings["shots"] == 0
    assert scores["lm_eval:animals", "mcc"].stderr > 0  # has no closed form


def test_texts(lm_eval, loaded, tasks, no_network):
    [(samples, _)], scores = run_tasks(loaded, tasks, ["texts"])
    rows = [json.loads(line)["text"] for line in (tasks / "texts.jsonl").read_text().splitlines()]
    total = sum(make_model(loaded).loglikelihood_rolling(requests_of(*((row,) for row in rows))))
    size, words = sum(len(row.encode()) for row in rows), sum(len(row.split()) for row in rows)
    bits = scores["lm_eval:texts", "bits_per_byte"]
    assert bits.value == pytest.approx(-total / size / math.log(2))
    for name, count in (("byte_perplexity", size), ("word_perplexity", words)):
        score = scores["lm_eval:texts", name]
        assert score.value == pytest.approx(math.exp(-total / count))
        assert score.ci95[0] < score.value < score.ci95[1]
    # Samples say by themselves what the score is.
    weights = [sample.weight for sample in samples]
    values = [sample.values["bits_per_byte"] for sample in samples]
    assert np.average(values, weights=weights) == pytest.approx(bits.value)


def test_written_task_with_filters(lm_eval, loaded, tasks, no_network):
    [(samples, _)], scores = run_tasks(
        loaded, tasks, ["written"], Settings(limit=4, max_new_tokens=3)
    )
    assert {name for _, name in scores} == {"exact_match,whole", "exact_match,letters"}
    rows = [json.loads(line) for line in (tasks / "animals.jsonl").read_text().splitlines()]
    assert len(samples) == 4
    for sample in samples:
        prompt = rows[int(sample.id)]["question"]
        text = greedy(loaded, ids_of(loaded, prompt), 3).partition("e")[0]
        assert sample.fields["prompt"] == prompt and sample.fields["text"] == text
        assert set(sample.fields["extracted"]) == {"whole", "letters"}


def test_limit_and_shots_and_seed(lm_eval, loaded, tasks):
    settings = Settings(limit=3, seed=5)
    [(samples, scores)], _ = run_tasks(loaded, tasks, ["animals"], settings, shots=2)
    [(fewer, _)], _ = run_tasks(loaded, tasks, ["animals"], settings._replace(limit=2))
    assert len(samples) == 3 and {each.id for each in fewer} < {each.id for each in samples}
    assert scores[0].settings["shots"] == 2 and scores[0].settings["limit"] == 3
    assert all(sample.fields["prompt"].count("Question:") == 3 for sample in samples)
    [(_, same)], _ = run_tasks(loaded, tasks, ["animals"], settings, shots=2)
    [(_, other)], _ = run_tasks(loaded, tasks, ["animals"], settings._replace(seed=6), shots=2)
    assert same[0].prompt_hash == scores[0].prompt_hash != other[0].prompt_hash


def test_chat(lm_eval, loaded, tasks):
    with with_template(loaded.tokenizer, TEMPLATE):
        [(samples, _)], _ = run_tasks(
            loaded, tasks, ["written"], Settings(chat=True, limit=1, max_new_tokens=1), shots=1
        )
    prompt = samples[0].fields["prompt"]
    assert prompt.startswith("<user>") and prompt.endswith("\n<assistant>")
    assert prompt.count("<assistant>") == 2  # the example was a turn
    with with_template(loaded.tokenizer, None):
        with pytest.raises(UserError, match="needs a chat template"):
            run_tasks(loaded, tasks, ["written"], Settings(chat=True))


def test_without_chat_a_template_is_not_asked_for(lm_eval, loaded, tasks):
    """Also where the run was trained with one: its words are for --chat."""
    texts = SimpleNamespace(chat_writer=lambda: pytest.fail("the run's words were asked for"))
    given = ["--run", "r", "--tasks", "written", "--task-path", str(tasks), "--limit", "1"]
    with with_template(loaded.tokenizer, TEMPLATE):
        prepared = evaluate._harness_tasks(["written"], evaluate._parse(given), texts)
        [(samples, _)] = harness.run(prepared, loaded)
    assert prepared.writer is None and "<user>" not in samples[0].fields["prompt"]
    for option, value in (("--template", "tulu"), ("--system", "s")):
        with pytest.raises(
            UserError, match=f"{option}: harness tasks use no template .* add --chat"
        ):
            evaluate._harness_tasks(["written"], evaluate._parse([*given, option, value]), texts)


def test_groups(lm_eval, loaded, tasks):
    found, scores = run_tasks(loaded, tasks, ["two"])
    parts = [scores["lm_eval:animals", "acc"], scores["lm_eval:other", "acc"]]
    group = scores["lm_eval:two", "acc"]
    assert group.value == pytest.approx(np.mean([part.value for part in parts]))
    assert group.stderr == pytest.approx(math.hypot(*(part.stderr for part in parts)) / 2)
    assert group.n == 18 and group.version == "2" and found[-1][0] == []


# ---------------------------------------------------------------------------------- user mistakes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unsafe_code: true": ""}, "without isolating them.*--tasks humaneval --allow-code"),
        ({"metadata: {version: 1}": "missing"}, "cannot be loaded: .*missing.*--task-path"),
    ],
)
def test_bad_definitions(lm_eval, loaded, tasks, tmp_path, change, message):
    [(line, broken)] = change.items()
    text = MULTIPLE_CHOICE.format(folder=tasks).replace("task: animals", f"task: bad\n{line}")
    if broken:
        text = text.replace("animals.jsonl", f"{broken}.jsonl").replace(
            "metadata: {version: 3.0}", ""
        )
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        harness.prepare(["bad"], Settings(), task_path=str(tmp_path))


def test_unknown_names(lm_eval, loaded, tasks, monkeypatch):
    from lm_eval.tasks import TaskManager

    # The harness's own definitions are many thousand files.
    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager",
        lambda include_path, **_: TaskManager(include_path=include_path, include_defaults=False),
    )
    with pytest.raises(UserError, match="--tasks animal: no such task .* did you mean animals"):
        harness.prepare(["animal"], Settings(), task_path=str(tasks))
    with pytest.raises(UserError, match="--task-path nowhere is not a directory"):
        harness.prepare(["animals"], Settings(), task_path="nowhere")


def test_a_missing_package_is_named(loaded, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"--tasks piqa_x needs .*drlora-jax\[eval\]"):
        harness.prepare(["piqa_x"], Settings())


def test_the_command_line(lm_eval, directory, tasks, tmp_path, capsys, no_network):
    arguments = ["--model", str(directory), "--tasks", "lm_eval:animals,texts"]
    assert (
        evaluate.main(
            [*arguments, "--task-path", str(tasks), "--out", str(tmp_path), "mesh.data=1"]
        )
        == 0
    )
    assert "lm_eval:animals" in capsys.readouterr().out
    rows = json.loads((tmp_path / "eval.json").read_text())["scores"]
    assert {row["task"] for row in rows} == {"lm_eval:animals", "lm_eval:texts"}
    for row in rows:
        lines = (tmp_path / row["samples"]).read_text().splitlines()
        assert len(lines) == row["n"]
        assert row["stderr"] is not None and row["prompt_hash"] and row["base_fingerprint"]
