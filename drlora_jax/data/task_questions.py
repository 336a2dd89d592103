"""Reads multiple-choice rows of several published layouts into one form.

    instruct     {instruction, answer}; the instruction is "... question: Q", an empty line,
                 "Answer1: a Answer2: b", an empty line, "Answer format: answer1/answer2"
    structured   {query, choices, gold}; WinoGrande {context_options, continuation, gold}
    hub          the fields of the data sets on the Hugging Face hub

A row with another layout is refused; the message lists the supported ones.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from drlora_jax.data.sources import Row
from drlora_jax.errors import UserError


class Question(NamedTuple):
    """One question; WinoGrande's has a `_` where the choices go."""

    text: str
    choices: tuple[str, ...]
    gold: int
    passage: str = ""
    topic: str = ""  # HellaSwag's activity
    start: str = ""  # HellaSwag's beginning of the sentence that the choices end
    labels: tuple[str, ...] = ()  # the choices' own, where the row names them


LETTERS = ("A", "B", "C", "D", "E", "F", "G", "H")
_INSTRUCTION = re.compile(r"(?:question|sentence): (.*?)\n\n(.*?)\s*Answer format: (.*)", re.S)
_OPTION = re.compile(r"\s*(?:Answer|Solution|Option|Ending)\d+: ")


def read_question(row: Row, dataset: str) -> Question:
    """Reads a row of a data set by whichever layout its fields show."""
    try:
        question = _read(row.fields, dataset)
    except (KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise UserError(
            f"{row.where}: not a row of {dataset}: {type(error).__name__}: {error}. Supported "
            "layouts are {instruction, answer}, {query, choices, gold} and that of the hub's data "
            f"set, got the fields {', '.join(map(str, row.fields))}."
        ) from error
    if not 0 <= question.gold < len(question.choices) or len(question.choices) < 2:
        raise UserError(
            f"{row.where}: the answer is choice {question.gold + 1} of {len(question.choices)}; "
            "correct the row."
        )
    return question


def instruction_options(row: Row) -> tuple[str, ...]:
    """Returns the possible answers to an instruction row: answer1, answer2, ..."""
    found = re.search(r"Answer format: (\S.*)", row.fields.get("instruction", ""))
    if not found or "answer" not in row.fields:
        raise UserError(
            f"{row.where}: this protocol needs rows with an answer and an instruction that ends in "
            "'Answer format: a/b'; use the task without a protocol, or another file."
        )
    return tuple(option.strip() for option in found[1].split("/"))


def _read(fields: dict, dataset: str) -> Question:
    if "instruction" in fields:
        return _instruct_boolq(fields) if dataset == "boolq" else _instruct(fields)
    if "gold" in fields:
        return _STRUCTURED.get(dataset, _structured)(fields)
    return _HUB[dataset](fields)


# ----------------------------------------------------------------------------------------- instruct


def _instruct(fields: dict) -> Question:
    found = _INSTRUCTION.search(fields["instruction"])
    if found is None:
        raise ValueError("the instruction has no question and options")
    choices = tuple(option.strip() for option in _OPTION.split(" " + found[2])[1:])
    options = [option.strip() for option in found[3].split("/")]
    if len(options) != len(choices):
        raise ValueError(f"{len(choices)} options, but the answer format has {len(options)}")
    return Question(found[1].strip(), choices, options.index(fields["answer"]))


def _instruct_boolq(fields: dict) -> Question:
    text = fields["instruction"].partition("question: ")[2].partition("\n\nAnswer format")[0]
    if not text:
        raise ValueError("the instruction has no question")
    return _yes_or_no(text, {"true": True, "false": False}[fields["answer"]], "")


# --------------------------------------------------------------------------------------- structured


def _structured(fields: dict) -> Question:
    return Question(fields["query"].strip(), tuple(fields["choices"]), int(fields["gold"]))


def _structured_boolq(fields: dict) -> Question:
    passage, _, question = fields["query"].rpartition("\nQuestion: ")
    if not question or list(fields["choices"]) != ["no", "yes"]:
        raise ValueError("query must be 'Passage: ...\\nQuestion: ...', choices must be no and yes")
    return _yes_or_no(question, bool(fields["gold"]), passage.removeprefix("Passage: "))


def _structured_piqa(fields: dict) -> Question:
    question = _structured(fields)
    return question._replace(text=question.text.removeprefix("Question: "))


def _structured_winogrande(fields: dict) -> Question:
    """Rebuilds the sentence: what both beginnings share, `_`, the continuation."""
    first, second = fields["context_options"]
    common = 0
    while common < min(len(first), len(second)) and first[common] == second[common]:
        common += 1
    common = first.rfind(" ", 0, common) + 1  # options may share letters: back to a whole word
    text = f"{first[:common]}_ {fields['continuation']}"
    return Question(text, (first[common:], second[common:]), int(fields["gold"]))


_STRUCTURED: dict[str, Callable[[dict], Question]] = {
    "boolq": _structured_boolq,
    "piqa": _structured_piqa,
    "winogrande": _structured_winogrande,
}


# ---------------------------------------------------------------------------------------------- hub


def _arc(fields: dict) -> Question:
    choices, labels = fields["choices"]["text"], tuple(map(str, fields["choices"]["label"]))
    stem = fields["question_stem"] if "question_stem" in fields else fields["question"]
    return Question(
        stem, tuple(choices), labels.index(str(fields["answerKey"]).strip()), labels=labels
    )


def _boolq(fields: dict) -> Question:
    answer = fields["answer"] if "answer" in fields else fields["label"]
    if answer not in (0, 1):
        raise ValueError(f"the answer must be true or false, got {answer!r}")
    return _yes_or_no(fields["question"], bool(answer), fields.get("passage", ""))


def _piqa(fields: dict) -> Question:
    return Question(fields["goal"], (fields["sol1"], fields["sol2"]), int(fields["label"]))


def _siqa(fields: dict) -> Question:
    choices = tuple(fields[f"answer{letter}"] for letter in "ABC")
    return Question(f"{fields['context']} {fields['question']}", choices, int(fields["label"]) - 1)


def _winogrande(fields: dict) -> Question:
    fields["sentence"].index("_")
    choices = (fields["option1"], fields["option2"])
    return Question(fields["sentence"], choices, int(fields["answer"]) - 1)


def _hellaswag(fields: dict) -> Question:
    if "endings" in fields:
        return Question(
            fields["ctx_a"],
            tuple(fields["endings"]),
            int(fields["label"]),
            topic=fields["activity_label"],
            start=fields["ctx_b"],
        )
    choices = fields["choices"]  # {question, choices: {A: ...}, answer: "A"}
    gold = list(choices).index(fields["answer"])
    return Question(fields["question"], tuple(choices.values()), gold)


def _yes_or_no(question: str, is_true: bool, passage: str) -> Question:
    return Question(question.strip().rstrip("?"), ("no", "yes"), int(is_true), passage)


_HUB: dict[str, Callable[[dict], Question]] = {
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "openbookqa": _arc,
    "boolq": _boolq,
    "piqa": _piqa,
    "siqa": _siqa,
    "winogrande": _winogrande,
    "hellaswag": _hellaswag,
}
DATASETS = tuple(_HUB)
