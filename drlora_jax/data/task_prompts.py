"""Prompts of multiple-choice tasks, by protocol; neither model nor tokenizer is needed.

`loglikelihood`, the default, ranks full answers as lm-evaluation-harness does for these tasks.
`mixlora` ranks the labels (A), (B), ... behind the prompts that MixLoRA's evaluation uses.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from drlora_jax.data.task_questions import LETTERS, Question


class Choice(NamedTuple):
    """A context, a possible continuation, and the text whose length normalises the score."""

    context: str
    continuation: str
    answer: str


def likelihood_choices(question: Question, dataset: str) -> list[Choice]:
    """Returns one choice per answer; all share one context, except in WinoGrande."""
    if dataset == "winogrande":
        return _partial_choices(question)
    context = _CONTEXTS.get(dataset, _question_answer)(question)
    answers = question.choices
    if dataset == "hellaswag":
        answers = tuple(_without_wikihow_marks(answer) for answer in answers)
    return [Choice(context, f" {answer}", answer) for answer in answers]


def label_prompt(question: Question, dataset: str) -> tuple[str, tuple[str, ...], int]:
    """Returns a prompt, the labels that are ranked, and the index of the right one."""
    if dataset == "boolq":
        prompt = f"Please answer the following question with true or false: {question.text}?"
        return f"{prompt}\nAnswer:", ("true", "false"), 1 - question.gold
    labels = question.labels or LETTERS[: len(question.choices)]
    prompt = _LABEL_PROMPTS.get(dataset, _inline_options)(question, labels)
    # ARC's labels are letters in most rows and digits in some: all are ranked in every row.
    ranked = _ARC_LABELS if dataset.startswith("arc") else LETTERS[: _LABELS[dataset]]
    return prompt, ranked, ranked.index(labels[question.gold])


# ------------------------------------------------------------------------------------ loglikelihood


def _question_answer(question: Question) -> str:
    return f"Question: {question.text}\nAnswer:"


def _boolq(question: Question) -> str:
    passage = f"{question.passage}\n" if question.passage else ""
    return f"{passage}Question: {question.text}?\nAnswer:"


def _hellaswag(question: Question) -> str:
    topic = f"{question.topic}: " if question.topic else ""
    return _without_wikihow_marks(f"{topic}{question.text} {question.start.capitalize()}")


_CONTEXTS: dict[str, Callable[[Question], str]] = {
    "boolq": _boolq,
    "openbookqa": lambda question: question.text,
    "siqa": lambda question: f"Q: {question.text}\nA:",
    "hellaswag": _hellaswag,
}


def _without_wikihow_marks(text: str) -> str:
    """Removes the marks [header], [title] and [step] of HellaSwag's sentences from WikiHow."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _partial_choices(question: Question) -> list[Choice]:
    """Returns the rest of the sentence behind each option; only this shared part is scored."""
    before, _, after = question.text.partition("_")
    rest = after.strip()
    return [Choice(before + option, f" {rest}", option) for option in question.choices]


# ------------------------------------------------------------------------------------------ mixlora

_ARC_LABELS = ("1", "2", "3", "4", "A", "B", "C", "D", "E")
_LABELS = {"openbookqa": 4, "piqa": 2, "siqa": 3, "hellaswag": 4, "winogrande": 2}


def _lines(question: Question, labels) -> str:
    pairs = zip(labels, question.choices, strict=True)
    return "".join(f"\n({label}) {choice}" for label, choice in pairs)


def _inline_options(question: Question, labels) -> str:
    pairs = zip(labels, question.choices, strict=True)
    options = "".join(f" ({label}) {choice}" for label, choice in pairs)
    opening = "Please choose the correct answer to the question: "
    return f"{opening}{question.text}{options}\nAnswer:"


def _piqa_labels(question: Question, labels) -> str:
    opening = (
        "Below is a common task along with two possible solutions labeled (A) and (B). "
        "Please select the appropriate solution to achieve the task:\n"
    )
    return f"{opening}{question.text}\n{_lines(question, labels)}\n\nCorrect solution:"


def _siqa_labels(question: Question, labels) -> str:
    opening = "Please choose the correct answer to the question.\nQuestion: "
    return f"{opening}{question.text}{_lines(question, labels)}\nAnswer:"


def _hellaswag_labels(question: Question, labels) -> str:
    opening = "Please choose the correct ending to complete the given sentence.\nSentence: "
    topic = f"{question.topic}. " if question.topic else ""
    sentence = f"{question.text} {question.start}".strip()
    return f"{opening}{topic}{sentence}{_lines(question, labels)}\nAnswer:"


def _winogrande_labels(question: Question, labels) -> str:
    opening = (
        "Please choose the correct answer to fill in the blank to complete the given sentence.\n"
        "Sentence: "
    )
    return f"{opening}{question.text}{_lines(question, labels)}\nAnswer:"


_LABEL_PROMPTS: dict[str, Callable[..., str]] = {
    "piqa": _piqa_labels,
    "siqa": _siqa_labels,
    "hellaswag": _hellaswag_labels,
    "winogrande": _winogrande_labels,
}
