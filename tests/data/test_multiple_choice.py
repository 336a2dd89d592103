"""Training text of multiple-choice rows: what evaluation asks, token by token, and the answer."""

import json

import numpy as np
import pytest

from drlora_jax.config import DataSection
from drlora_jax.data.documents import load_documents
from drlora_jax.data.sources import read_rows
from drlora_jax.data.task_questions import read_question
from drlora_jax.data.tokenize import load_tokenizer
from drlora_jax.errors import UserError
from drlora_jax.evaluation.multiple_choice import label_item, likelihood_item
from tests.support.tiny import BUNDLED

LABELLED = {"text": ["salt", "a loud bell", "rain"], "label": ["A", "B", "C"]}
ROWS = {
    "arc_easy": {"question": "What falls?", "choices": LABELLED, "answerKey": "C"},
    "openbookqa": {"question_stem": "What rings", "choices": LABELLED, "answerKey": "B"},
    "boolq": {"question": "is rain wet", "answer": True, "passage": "Rain is water."},
    "piqa": {"goal": "Open it", "sol1": "Pull.", "sol2": "Push, then pull.", "label": 1},
    "hellaswag": {
        "activity_label": "Baking",
        "ctx_a": "He mixes.",
        "ctx_b": "he",
        "endings": ["bakes it.", "sings [title] aloud."],
        "label": "0",
    },
    "winogrande": {
        "sentence": "The cup is on the table, and the _ is full.",
        "option1": "cup",
        "option2": "table",
        "answer": "1",
    },
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(BUNDLED / "tiny_moe")


def section(*paths, **more) -> DataSection:
    return DataSection(path=paths, format="choice", **more)


def write(folder, dataset, *more) -> str:
    file = folder / f"{dataset}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (ROWS[dataset], *more)))
    return str(file)


@pytest.mark.parametrize("protocol", ["", ":mixlora"])
@pytest.mark.parametrize("dataset", ROWS)
def test_the_prompt_is_that_of_evaluation(tmp_path, tokenizer, dataset, protocol):
    file = write(tmp_path, dataset)
    config = section(f"{dataset}{protocol}={file}")
    ((tokens, is_target),), report = load_documents(config, tokenizer, 200)
    question = read_question(next(read_rows(file)), dataset)
    make = label_item if protocol else likelihood_item
    item = make("1", question, dataset, tokenizer)
    context, continuation = item.pairs[item.gold]
    assert tokens[-1] == tokenizer.eos_token_id and is_target[-1]
    np.testing.assert_array_equal(tokens[: len(context)], context)
    assert not is_target[: len(context)].any() and is_target[len(context) :].all()
    # Of a label, evaluation ranks the last piece.
    assert tokens[:-1][-len(continuation) :].tolist() == list(continuation)
    if not protocol:
        assert len(tokens) == len(context) + len(continuation) + 1
    [wording] = report.wordings.values()
    assert (wording.format, wording.template) == ("choice", "as is")


def test_tasks_are_mixed_and_local_rows_too(tmp_path, tokenizer):
    local = {
        "instruction": "Choose the answer to the question: What falls?\n\nAnswer1: salt Answer2: "
        "rain\n\nAnswer format: answer1/answer2",
        "answer": "answer2",
    }
    paths = [f"arc_easy={write(tmp_path, 'arc_easy', local)}"]
    paths.append(f"boolq:mixlora={write(tmp_path, 'boolq')}")
    documents, _ = load_documents(section(*paths), tokenizer, 200)
    first, second, third = (tokenizer.decode(each.tokens[:-1]) for each in documents)
    assert first == second == "Question: What falls?\nAnswer: rain"
    assert third.endswith("is rain wet?\nAnswer: true")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("rows.jsonl", "needs paths TASK=PATH"),
        ("arc_esay=rows.jsonl", "no multiple-choice task 'arc_esay'; did you mean arc_easy"),
        ("arc_easy:instruct=rows.jsonl", "no multiple-choice task 'arc_easy:instruct'"),
        ("arc_easy=rows.jsonl", "rows.jsonl: no such file"),
    ],
)
def test_paths_that_are_refused(tmp_path, monkeypatch, tokenizer, path, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        load_documents(section(path), tokenizer, 200)


def test_rows_that_are_no_questions_and_templates(tmp_path, tokenizer):
    path = f"boolq={write(tmp_path, 'boolq', {'question': 'is it'})}"
    with pytest.raises(UserError, match=r"boolq.jsonl:2: not a row of boolq"):
        load_documents(section(path), tokenizer, 200)
    documents, report = load_documents(section(path, bad_rows="skip"), tokenizer, 200)
    assert len(documents) == 1 and report.skipped == {"not a question": 1}
    with pytest.raises(UserError, match="has the prompts of its tasks"):
        load_documents(section(path, template="alpaca"), tokenizer, 200)
