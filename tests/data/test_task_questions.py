"""Rows of every layout, and the prompts that are made of them, against texts written by hand."""

import pytest

from drlora_jax.data.sources import Row
from drlora_jax.data.task_prompts import label_prompt, likelihood_choices
from drlora_jax.data.task_questions import Question, instruction_options, read_question
from drlora_jax.errors import UserError


def read(dataset, **fields):
    return read_question(Row("rows.jsonl:1", fields), dataset)


def instruct(instruction, answer):
    return {"instruction": instruction, "input": "", "output": "", "answer": answer}


ARC = instruct(
    "Please choose the correct answer to the question: What is ice?\n\nAnswer1: water. Answer2: "
    "air: hot Answer3: stone Answer4: wood\n\nAnswer format: answer1/answer2/answer3/answer4",
    "answer2",
)
PIQA = instruct(
    "Please choose the correct solution to the question: How to?\n\nSolution1: This way.\n\n"
    "Solution2: That way.\n\nAnswer format: solution1/solution2",
    "solution1",
)
WINOGRANDE = instruct(
    "Please choose the correct answer to fill in the blank to complete the given sentence: The cat "
    "ate the mouse so _ was full.\n\nOption1: the cat Option2: the mouse Answer format: "
    "option1/option2",
    "option2",
)
BOOLQ = instruct(
    "Please answer the following question with true or false, question: is it so?\n\n"
    "Answer format: true/false",
    "false",
)

LAYOUTS = [
    ("arc_easy", ARC, Question("What is ice?", ("water.", "air: hot", "stone", "wood"), 1)),
    (
        "arc_challenge",
        {"question": "Q?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"},
        Question("Q?", ("a", "b"), 1, labels=("1", "2")),
    ),
    ("piqa", PIQA, Question("How to?", ("This way.", "That way."), 0)),
    ("piqa", {"goal": "G", "sol1": "a", "sol2": "b", "label": 1}, Question("G", ("a", "b"), 1)),
    (
        "piqa",
        {"query": "Question: G\n", "choices": ["a", "b"], "gold": 1},
        Question("G", ("a", "b"), 1),
    ),
    ("boolq", BOOLQ, Question("is it so", ("no", "yes"), 0)),
    (
        "boolq",
        {"query": "Passage: It is. \nQuestion: is it so?", "choices": ["no", "yes"], "gold": 1},
        Question("is it so", ("no", "yes"), 1, "It is. "),
    ),
    (
        "boolq",
        {"question": "is it so", "passage": "It is.", "answer": True},
        Question("is it so", ("no", "yes"), 1, "It is."),
    ),
    (
        "openbookqa",
        {
            "question_stem": "The sun is",
            "choices": {"text": ["hot", "cold"], "label": ["A", "B"]},
            "answerKey": "A",
        },
        Question("The sun is", ("hot", "cold"), 0, labels=("A", "B")),
    ),
    (
        "openbookqa",
        {"query": "The sun is", "choices": ["hot", "cold"], "gold": 0},
        Question("The sun is", ("hot", "cold"), 0),
    ),
    (
        "siqa",
        {
            "context": "C.",
            "question": "Q?",
            "answerA": "a",
            "answerB": "b",
            "answerC": "c",
            "label": "3",
        },
        Question("C. Q?", ("a", "b", "c"), 2),
    ),
    (
        "winogrande",
        WINOGRANDE,
        Question("The cat ate the mouse so _ was full.", ("the cat", "the mouse"), 1),
    ),
    (
        "winogrande",
        {"sentence": "A _ b.", "option1": "x", "option2": "y", "answer": "1"},
        Question("A _ b.", ("x", "y"), 0),
    ),
    (
        "winogrande",
        {"context_options": ["I saw Sarah", "I saw Sam"], "continuation": "run.", "gold": 1},
        Question("I saw _ run.", ("Sarah", "Sam"), 1),
    ),
    (
        "hellaswag",
        {
            "ctx_a": "A man.",
            "ctx_b": "he",
            "activity_label": "Running",
            "endings": ["a", "b", "c", "d"],
            "label": "2",
        },
        Question("A man.", ("a", "b", "c", "d"), 2, topic="Running", start="he"),
    ),
    (
        "hellaswag",
        {"question": "A man.", "choices": {"A": "a", "B": "b"}, "answer": "B"},
        Question("A man.", ("a", "b"), 1),
    ),
]


@pytest.mark.parametrize(("dataset", "fields", "wanted"), LAYOUTS)
def test_layouts(dataset, fields, wanted):
    assert read(dataset, **fields) == wanted


@pytest.mark.parametrize(
    ("dataset", "fields", "message"),
    [
        ("arc_easy", {"text": "a"}, "rows.jsonl:1: not a row of arc_easy.*got the fields text"),
        ("arc_easy", ARC | {"answer": "answer5"}, "not a row of arc_easy"),
        ("boolq", BOOLQ | {"answer": "maybe"}, "not a row of boolq"),
        ("piqa", {"goal": "G", "sol1": "a", "sol2": "b", "label": 2}, "choice 3 of 2"),
        ("piqa", {"goal": "G", "sol1": "a", "sol2": "b", "label": -1}, "choice 0 of 2"),
        ("openbookqa", {"query": "Q", "choices": ["a"], "gold": 0}, "choice 1 of 1"),
        (
            "winogrande",
            {"sentence": "no blank", "option1": "x", "option2": "y", "answer": "1"},
            "not a row",
        ),
    ],
)
def test_rows_that_are_none(dataset, fields, message):
    with pytest.raises(UserError, match=message):
        read(dataset, **fields)


def test_words_of_the_answer_format():
    assert instruction_options(Row("r:1", PIQA)) == ("solution1", "solution2")
    with pytest.raises(
        UserError, match="r:1: this protocol needs rows with an answer and an instruction"
    ):
        instruction_options(Row("r:1", {"question": "Q"}))


LIKELIHOOD = [
    ("arc_easy", Question("Q?", ("a", "b"), 0), ["Question: Q?\nAnswer:"] * 2, [" a", " b"]),
    ("piqa", Question("G", ("a", "b"), 0), ["Question: G\nAnswer:"] * 2, [" a", " b"]),
    ("openbookqa", Question("The sun is", ("a", "b"), 0), ["The sun is"] * 2, [" a", " b"]),
    ("siqa", Question("C. Q?", ("a", "b"), 0), ["Q: C. Q?\nA:"] * 2, [" a", " b"]),
    (
        "boolq",
        Question("is it so", ("no", "yes"), 1, "It is."),
        ["It is.\nQuestion: is it so?\nAnswer:"] * 2,
        [" no", " yes"],
    ),
    (
        "boolq",
        Question("is it so", ("no", "yes"), 1),
        ["Question: is it so?\nAnswer:"] * 2,
        [" no", " yes"],
    ),
    (
        "winogrande",
        Question("The cat saw _ run.", ("Sarah", "Sam"), 1),
        ["The cat saw Sarah", "The cat saw Sam"],
        [" run."] * 2,
    ),
    (
        "hellaswag",
        Question(
            "[header] How [title] Do it. [step] First, go.",
            ("[substeps] Walk.", "Run [title] fast"),
            0,
            topic="Sports",
            start="then HE",
        ),
        ["Sports: How. Do it. First, go. Then he"] * 2,
        [" Walk.", " Run.  fast".replace("  ", " ")],
    ),
]


@pytest.mark.parametrize(("dataset", "question", "contexts", "continuations"), LIKELIHOOD)
def test_loglikelihood_prompts(dataset, question, contexts, continuations):
    choices = likelihood_choices(question, dataset)
    assert [choice.context for choice in choices] == contexts
    assert [choice.continuation.replace("  ", " ") for choice in choices] == continuations


def test_length_of_a_choice_is_its_answers():
    """Not the space in front, and of the cleaned text."""
    assert [choice.answer for choice in likelihood_choices(LIKELIHOOD[-1][1], "hellaswag")][1] == (
        "Run.  fast".replace("  ", " ")
    )


ARC_LABELS = ("1", "2", "3", "4", "A", "B", "C", "D", "E")
LABELS = [
    (
        "arc_easy",
        Question("Q?", ("a", "b"), 1, labels=("1", "2")),
        "Please choose the correct answer to the question: Q? (1) a (2) b\nAnswer:",
        ARC_LABELS,
        1,
    ),
    (
        "arc_easy",
        Question("Q?", ("a", "b"), 1),
        "Please choose the correct answer to the question: Q? (A) a (B) b\nAnswer:",
        ARC_LABELS,
        5,
    ),
    (
        "openbookqa",
        Question("S", ("a", "b", "c", "d"), 3),
        "Please choose the correct answer to the question: S (A) a (B) b (C) c (D) d\nAnswer:",
        ("A", "B", "C", "D"),
        3,
    ),
    (
        "boolq",
        Question("is it so", ("no", "yes"), 1, "It is."),
        "Please answer the following question with true or false: is it so?\nAnswer:",
        ("true", "false"),
        0,
    ),
    (
        "piqa",
        Question("G", ("a", "b"), 1),
        "Below is a common task along with two possible solutions labeled (A) and (B). Please "
        "select the appropriate solution to achieve the task:\nG\n\n(A) a\n(B) b\n\n"
        "Correct solution:",
        ("A", "B"),
        1,
    ),
    (
        "siqa",
        Question("C. Q?", ("a", "b", "c"), 2),
        "Please choose the correct answer to the question.\nQuestion: C. Q?\n(A) a\n(B) b\n(C) c\n"
        "Answer:",
        ("A", "B", "C"),
        2,
    ),
    (
        "hellaswag",
        Question("A man.", ("a", "b", "c", "d"), 0, topic="Running", start="he"),
        "Please choose the correct ending to complete the given sentence.\nSentence: Running. "
        "A man. he\n(A) a\n(B) b\n(C) c\n(D) d\nAnswer:",
        ("A", "B", "C", "D"),
        0,
    ),
    (
        "winogrande",
        Question("A _ b.", ("x", "y"), 1),
        "Please choose the correct answer to fill in the blank to complete the given sentence.\n"
        "Sentence: A _ b.\n(A) x\n(B) y\nAnswer:",
        ("A", "B"),
        1,
    ),
]


@pytest.mark.parametrize(("dataset", "question", "prompt", "labels", "gold"), LABELS)
def test_label_prompts(dataset, question, prompt, labels, gold):
    assert label_prompt(question, dataset) == (prompt, labels, gold)
