"""Evaluates tasks with generated answers: GSM8K, and instruction rows with an answer format.

Prompts are formatted as in training, by the run's own template. Examples before the question
(`shots`) are formatted by the same template: as earlier turns of a chat, or as blocks separated by
an empty line.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from drlora_jax.data.sources import Row
from drlora_jax.data.task_questions import instruction_options
from drlora_jax.data.wording import Writer
from drlora_jax.errors import UserError
from drlora_jax.evaluation.answers import last_number, option_of, strict_number, without_notes
from drlora_jax.evaluation.records import Sample

# (prompts as texts or token ids, stop strings, maximum tokens) -> answers with `.text` and
# `.finish`.
Generate = Callable[[Sequence[str | list[int]], Sequence[str], int], Sequence]

# Text with which the next turn or example would begin.
_STOPS = {
    "question_answer": ("Question:",),
    "alpaca": ("### Instruction:",),
    "chatml": ("<|im_end|>", "<|im_start|>"),
    "tulu": ("<|user|>", "<|system|>"),
}


class Item(NamedTuple):
    """Holds a prompt and its reference answer."""

    id: str
    prompt: str
    ids: list[int]  # token ids of the prompt
    gold: str
    options: tuple[str, ...] = ()  # possible answers of an instruction row


def gsm8k_item(
    name: str, row: Row, shots: Sequence[Row], writer: Writer, system: str | None = None
) -> Item:
    question, answer = question_and_answer(row)
    if strict_number(answer) is None:
        raise UserError(f"{row.where}: the reference has no number after ####; correct the row.")
    examples = [question_and_answer(shot) for shot in shots]
    prompt = writer.question(question, system=system, shots=examples)
    return Item(name, prompt.text, prompt.ids, answer)


def question_and_answer(row: Row) -> tuple[str, str]:
    """Reads GSM8K's own fields, or prompt and response, without calculator notes."""
    for names in (("question", "answer"), ("prompt", "response")):
        texts = [row.fields.get(name) for name in names]
        if all(isinstance(text, str) for text in texts):
            return texts[0].strip(), without_notes(texts[1]).strip()
    raise UserError(
        f"{row.where}: needs question and answer, or prompt and response, as texts; got the fields "
        f"{', '.join(map(str, row.fields))}."
    )


def instruct_item(name: str, row: Row, writer: Writer, system: str | None = None) -> Item:
    options = instruction_options(row)
    answer = row.fields["answer"]
    if answer not in options:
        raise UserError(f"{row.where}: the answer {answer!r} is not one of {', '.join(options)}.")
    extra = row.fields.get("input") or ""
    prompt = writer.question(row.fields["instruction"], extra=extra, system=system)
    return Item(name, prompt.text, prompt.ids, answer, options)


def stop_strings(writer: Writer, *, shots: int = 0) -> tuple[str, ...]:
    """Returns the strings that end an answer, besides the end-of-text token."""
    template = writer.wording.template
    if template == "plain":
        return ("\n\n",) if shots else ()
    return _STOPS.get(template, ())


def answer_gsm8k(items: Sequence[Item], generate: Generate, stop, tokens: int) -> list[Sample]:
    samples = []
    for item, written in _written(items, generate, stop, tokens):
        gold, strict = strict_number(item.gold), strict_number(written.text)
        flexible = last_number(written.text)
        values = {
            "exact_match_strict": float(strict is not None and strict == gold),
            "exact_match_flexible": float(flexible is not None and flexible == gold),
        }
        predicted = None if flexible is None else str(flexible)
        is_correct = bool(values["exact_match_strict"])
        samples.append(_sample(item, written, str(gold), predicted, is_correct, values))
    return samples


def answer_instruct(items: Sequence[Item], generate: Generate, stop, tokens: int) -> list[Sample]:
    samples = []
    for item, written in _written(items, generate, stop, tokens):
        predicted = option_of(written.text, item.options)
        is_correct = predicted == item.gold
        values = {"exact_match": float(is_correct)}
        samples.append(_sample(item, written, item.gold, predicted, is_correct, values))
    return samples


def _written(items: Sequence[Item], generate: Generate, stop, tokens: int):
    answers = generate([item.ids for item in items], stop, tokens)
    return zip(items, answers, strict=True)


def _sample(item: Item, written, gold: str, predicted, is_correct: bool, values: dict) -> Sample:
    fields = {
        "prompt": item.prompt,
        "text": written.text,
        "finish": written.finish,
        "gold": gold,
        "predicted": predicted,
        "correct": is_correct,
    }
    return Sample(item.id, values, fields)
