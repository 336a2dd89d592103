"""Tasks of lm-evaluation-harness on our models: requests, truncation, whole tasks, no network."""

import functools
import json
import math
import shutil
import socket
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drlora_jax import evaluate
from drlora_jax.config import MeshSection
from drlora_jax.data.wording import Writer, named_wording
from drlora_jax.errors import RunError, UserError
from drlora_jax.evaluation import harness
from drlora_jax.evaluation.records import Settings
from drlora_jax.inference.generation import Sampling
from drlora_jax.inference.model import load_base
from drlora_jax.models.transformer import logits
from tests.support.tiny import OLMOE, write_tiny_model

WORDS = "the cat sat on a mat and saw two old dogs run over green hills in rain".split()
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
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
def lm_eval():
    return pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return write_tiny_model(folder, OLMOE | {"max_position_embeddings": 96})


@pytest.fixture(scope="module")
def loaded(directory):
    return load_base(str(directory), mesh=MeshSection(data=1))


@pytest.fixture(scope="module")
def model(lm_eval, loaded):
    return make_model(loaded)


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


def make_model(loaded, **options):
    from drlora_jax.evaluation.harness_model import JaxLM

    return JaxLM(loaded, **options)


def requests_of(*arguments):
    return [SimpleNamespace(args=each, task_name="test") for each in arguments]


@functools.cache
def forward(model):
    def apply(variables, tokens_BT, segments_BT):
        positions_BT = jnp.arange(tokens_BT.shape[1])[None]
        hidden_BTD, _ = model.apply(variables, tokens_BT, segments_BT, positions_BT)
        return logits(model.config, variables["params"], hidden_BTD)[0]

    return jax.jit(apply)


def log_probabilities(loaded, ids):
    """Of one text alone in a row, by NumPy's log-softmax in f64 [T, V]."""
    padding = (0, 128 - len(ids))  # one length: one program
    tokens_BT = np.pad(np.array(ids, np.int32), padding)[None]
    segments_BT = np.pad(np.ones(len(ids), np.int32), padding)[None]
    scores = np.asarray(forward(loaded.model)(loaded.variables, tokens_BT, segments_BT))
    scores = scores[: len(ids)].astype(np.float64)
    top = scores.max(axis=-1, keepdims=True)
    return scores - top - np.log(np.exp(scores - top).sum(axis=-1, keepdims=True))


def one_by_one(loaded, context, continuation, *, max_length=96):
    """The log-likelihood of token ids, and whether greedy decoding would write them."""
    ids = [*context, *continuation][-(max_length + 1) :]
    table = log_probabilities(loaded, ids[:-1])[-len(continuation) :]
    total = sum(row[token] for row, token in zip(table, continuation, strict=True))
    return total, bool((table.argmax(axis=-1) == np.array(continuation)).all())


def ids_of(loaded, text):
    return loaded.tokenizer(text, add_special_tokens=False).input_ids


# ------------------------------------------------------------------------------------- the model


def test_log_likelihoods_are_those_of_single_passes(model, loaded):
    pairs = [("a cat sat", " on the mat"), ("two  ", "dogs"), ("", "rain in hills"), ("  ", "run")]
    found = model.loglikelihood(requests_of(*pairs))
    start = [loaded.tokenizer.eos_token_id]
    expected = [
        (ids_of(loaded, "a cat sat"), ids_of(loaded, "a cat sat on the mat")[3:]),
        # Spaces at the end of a context belong to the continuation.
        (ids_of(loaded, "two"), ids_of(loaded, "two  dogs")[len(ids_of(loaded, "two")) :]),
        (start, ids_of(loaded, "rain in hills")),
        (start, ids_of(loaded, "  run")),
    ]
    assert len(ids_of(loaded, "a cat sat")) == 3
    for (total, is_greedy), ids in zip(found, expected, strict=True):
        wanted = one_by_one(loaded, *ids)
        assert total == pytest.approx(wanted[0], abs=1e-4)
        assert is_greedy == wanted[1]


def test_a_greedy_continuation_is_known_as_such(model, loaded):
    context = ids_of(loaded, "the old dogs")
    best = int(log_probabilities(loaded, context)[-1].argmax())
    assert [found[1] for found in model._loglikelihood_tokens([(("", ""), context, [best])])] == [
        True
    ]


def test_a_long_context_loses_its_start(model, loaded):
    context = " ".join(WORDS * 12)
    assert len(ids_of(loaded, context)) > 150
    [(total, _)] = model.loglikelihood(requests_of((context, " green hills")))
    whole = ids_of(loaded, context + " green hills")
    cut = len(ids_of(loaded, context))
    assert total == pytest.approx(one_by_one(loaded, whole[:cut], whole[cut:])[0], abs=1e-4)


def test_too_long_answers_and_empty_ones_are_refused(model):
    with pytest.raises(UserError, match=r"An answer has \d+ tokens .* sees 96; .*--max-length"):
        model.loglikelihood(requests_of(("a", " ".join(WORDS * 12))))
    with pytest.raises(RunError, match="no text to score"):
        model.loglikelihood(requests_of(("a", "")))


def test_rolling_predicts_every_token_once(model, loaded):
    text = " ".join(WORDS * 16)
    found = model.loglikelihood_rolling(requests_of((text,), ("cat",), ("",)))
    ids = [loaded.tokenizer.eos_token_id, *ids_of(loaded, text)]
    assert len(ids) > 2 * 96
    expected, start = 0.0, 1
    while start < len(ids):  # windows of 96; the last one is filled up with context
        end = min(start + 96, len(ids))
        first = max(0, end - 97)
        expected += one_by_one(loaded, ids[first:start], ids[start:end])[0]
        start = end
    assert found[0] == pytest.approx(expected, rel=1e-5)
    single = one_by_one(loaded, ids[:1], ids_of(loaded, "cat"))[0]
    assert found[1:] == [pytest.approx(single, abs=1e-4), 0]


def test_results_do_not_depend_on_the_batch(model, loaded):
    draw = np.random.default_rng(1)
    pairs = [
        (" ".join(draw.choice(WORDS, draw.integers(1, 30))), f" {draw.choice(WORDS)}")
        for _ in range(20)
    ]
    other = make_model(loaded, batch_size=3)
    first, second = (each.loglikelihood(requests_of(*pairs)) for each in (model, other))
    np.testing.assert_allclose([x[0] for x in first], [x[0] for x in second], atol=1e-5)
    options = {"until": [], "max_gen_toks": 5}
    asked = requests_of(*((context[-40:], options) for context, _ in pairs[:9]))
    assert model.generate_until(asked) == other.generate_until(asked)


def greedy(loaded, ids, count):
    """The text that follows, by a full forward pass for every token."""
    written = []
    for _ in range(count):
        best = int(log_probabilities(loaded, [*ids, *written])[-1].argmax())
        if best == loaded.tokenizer.eos_token_id:
            break
        written.append(best)
    return loaded.tokenizer.decode(written, clean_up_tokenization_spaces=False)


def test_written_answers(model, loaded):
    asked = [
        ("two old dogs", {"until": [], "max_gen_toks": 8}),
        ("the cat", {"until": "zzz", "max_gen_toks": 3, "do_sample": False}),
        ("two old dogs", {"until": [], "max_new_tokens": 8, "temperature": 0.0}),
        # 96 - 8 tokens of the context are left: the end of it.
        (" ".join(WORDS * 12), {"until": ["zzz"], "max_gen_toks": 8}),
    ]
    found = model.generate_until(requests_of(*asked))
    assert found[0] == found[2] == greedy(loaded, ids_of(loaded, "two old dogs"), 8)
    assert found[1] == greedy(loaded, ids_of(loaded, "the cat"), 3)
    assert found[3] == greedy(loaded, ids_of(loaded, asked[3][0])[-88:], 8)
    # The answer ends before the first of the stop strings.
    middle = found[0][2:4]
    [cut] = model.generate_until(
        requests_of(("two old dogs", {"until": ["@@", middle], "max_gen_toks": 8}))
    )
    assert cut == found[0][: found[0].index(middle)]


def test_a_special_token_can_end_an_answer(lm_eval, tmp_path, directory):
    """As a stop string, and as an end token of generation_config.json."""
    shutil.copytree(directory, tmp_path / "m")
    free = make_model(load_base(str(tmp_path / "m"), mesh=MeshSection(data=1)))
    prompt, options = "two old dogs", {"until": [], "max_gen_toks": 8}
    ids = ids_of(free._loaded, prompt)
    [answer] = free._generator.generate([ids], max_new_tokens=8)
    token = answer.tokens[4]
    assert token not in answer.tokens[:4]
    text = free.tokenizer.decode(ids + answer.tokens[:4])[len(free.tokenizer.decode(ids)) :]
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, token]}))
    ending = make_model(load_base(str(tmp_path / "m"), mesh=MeshSection(data=1)))
    assert ending.generate_until(requests_of((prompt, options))) == [text]

    special = free.tokenizer.convert_ids_to_tokens(token)
    free.tokenizer.add_special_tokens({"additional_special_tokens": [special]})
    asked = requests_of((prompt, options | {"until": ["zzz", special]}))
    assert free.generate_until(asked) == [text]


def test_room_for_the_answer_is_needed(model):
    with pytest.raises(UserError, match="asks for 96 new tokens, the model sees 96 in all"):
        model.generate_until(requests_of(("a", {"until": [], "max_gen_toks": 96})))


def test_generation_settings(lm_eval):
    from drlora_jax.evaluation.harness_model import read_options

    assert read_options({"until": "x"})[:2] == (("x",), 256)
    options = read_options(
        {"until": ["a", ""], "max_tokens": 5, "do_sample": True, "top_p": 0.9, "top_k": 0}
    )
    assert options == (("a",), 5, Sampling(1.0, None, 0.9))
    assert read_options({"temperature": 0.7}).sampling == Sampling(0.7)
    assert read_options({"temperature": 0.7, "do_sample": False, "num_beams": 1}).sampling == (
        Sampling()
    )
    with pytest.raises(UserError, match="settings repetition_penalty, which are not known"):
        read_options({"repetition_penalty": 2})
    with pytest.raises(UserError, match="beam search"):
        read_options({"num_beams": 4})


def test_chat_template_and_context_length(lm_eval, loaded, directory):
    from drlora_jax.evaluation.harness_model import context_length

    assert context_length(loaded) == 96
    model = make_model(loaded, max_length=20)
    assert model.max_length == 20
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    with with_template(loaded.tokenizer, TEMPLATE):
        assert model.apply_chat_template(turns) == "<system>s\n<user>q\n<assistant>"
        assert model.chat_template(True) == TEMPLATE
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    with with_template(loaded.tokenizer, refusing + TEMPLATE):
        assert model.apply_chat_template(turns) == "<user>q\n<assistant>"


class with_template:
    def __init__(self, tokenizer, template):
        self.tokenizer, self.template = tokenizer, template

    def __enter__(self):
        self.before, self.tokenizer.chat_template = self.tokenizer.chat_template, self.template

    def __exit__(self, *_):
        self.tokenizer.chat_template = self.before


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
        with pytest.raises(UserError, match="no chat template"):
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
        with pytest.raises(UserError, match=f"{option}: tasks of the harness ask .* add --chat"):
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
        ({"metadata: {version: 1}": "missing"}, "does not load: .*missing.*--task-path"),
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
    with pytest.raises(UserError, match="--tasks animal: no task .* did you mean animals"):
        harness.prepare(["animal"], Settings(), task_path=str(tasks))
    with pytest.raises(UserError, match="--task-path nowhere is no directory"):
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
