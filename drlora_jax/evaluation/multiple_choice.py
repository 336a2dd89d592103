"""Evaluates multiple choice by log-likelihood: the model generates nothing, its probabilities are
compared.

`acc` selects the choice with the largest log-likelihood, `acc_norm` the largest log-likelihood per
character of the choice (without the leading space), as lm-evaluation-harness does. Ties go to the
first choice.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from drlora_jax.data.segments import Segment
from drlora_jax.data.task_prompts import Choice, label_prompt, likelihood_choices
from drlora_jax.data.task_questions import Question
from drlora_jax.data.tokenize import encode_document, encode_prompt
from drlora_jax.data.wording import Prompt, Writer
from drlora_jax.errors import RunError, UserError
from drlora_jax.evaluation.records import Sample

Score = Callable[[Sequence[tuple[list[int], list[int]]]], Sequence]  # pairs -> LogLikelihoods


class Item(NamedTuple):
    """Holds the choices of a question, one of which is correct, and the pairs to score."""

    id: str
    choices: tuple[Choice, ...]
    pairs: tuple[tuple[list[int], list[int]], ...]
    gold: int
    answers: int  # answers of the question; labels of other questions may compete too


def likelihood_item(
    name: str,
    question: Question,
    dataset: str,
    tokenizer,
    *,
    writer: Writer | None = None,
    system: str | None = None,
) -> Item:
    """Returns an item that scores full answers; a writer formats the question."""
    choices = likelihood_choices(question, dataset)
    if writer is None:
        pairs = [encode_pair(choice.context, choice.continuation, tokenizer) for choice in choices]
        return Item(name, tuple(choices), tuple(pairs), question.gold, len(choices))
    prompts = [writer.question(choice.context, system=system) for choice in choices]
    asked, pairs = [], []
    for choice, prompt in zip(choices, prompts, strict=True):
        continuation = choice.continuation.lstrip()
        asked.append(Choice(prompt.text, continuation, choice.answer))
        pairs.append(_behind(prompt, writer.as_is(continuation, True), tokenizer))
    return Item(name, tuple(asked), tuple(pairs), question.gold, len(asked))


def _behind(prompt: Prompt, answer: Segment, tokenizer) -> tuple[list[int], list[int]]:
    """Returns the ids of prompt and answer, which are tokenized as one text as in training."""
    document = encode_document([*prompt.segments, answer], tokenizer, "response")
    is_answer = document.is_target.copy()
    is_answer[-1] = False  # the end-of-text token
    whole = document.tokens.tolist()
    if whole[: len(prompt.ids)] == prompt.ids:
        return prompt.ids, whole[len(prompt.ids) : -1]
    start = int(is_answer.argmax())  # the prompt's last token holds the answer's first letters
    return whole[:start], whole[start:-1]


def label_item(name: str, question: Question, dataset: str, tokenizer) -> Item:
    """Returns an item that scores labels, one token each, after a prompt that lists the choices."""
    prompt, labels, gold = label_prompt(question, dataset)
    ids = encode_prompt(prompt, tokenizer)
    choices = tuple(Choice(prompt, f" {label}", label) for label in labels)
    # Only the last token: some tokenizers split off the space or the first letters.
    pairs = tuple((ids, _ids(f" {label}", tokenizer)[-1:]) for label in labels)
    return Item(name, choices, pairs, gold, len(question.choices) or len(labels))


def encode_pair(context: str, continuation: str, tokenizer) -> tuple[list[int], list[int]]:
    """Returns the token ids of a context and of its continuation.

    Both are tokenized as one text, which is split where the context's own ids end. Trailing spaces
    of the context are moved to the continuation, since tokens contain the space before a word.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    if not stripped:
        return encode_prompt("", tokenizer) or [_start(tokenizer)], _ids(continuation, tokenizer)
    whole = encode_prompt(stripped + continuation, tokenizer)
    start = len(encode_prompt(stripped, tokenizer))
    return whole[:start], whole[start:]


def answer_items(items: Sequence[Item], score: Score) -> list[Sample]:
    """Scores all pairs at once and selects the choices."""
    found = list(score([pair for item in items for pair in item.pairs]))
    samples, start = [], 0
    for item in items:
        part = found[start : start + len(item.pairs)]
        start += len(item.pairs)
        totals = np.array([each.total for each in part], np.float64)
        if not np.isfinite(totals).all():
            raise RunError(
                f"Item {item.id} has the log-likelihoods {totals.tolist()}: the model is broken."
            )
        samples.append(_sample(item, totals))
    return samples


def item_texts(item: Item) -> list[str]:
    """Returns the texts of an item, for the prompt hash."""
    return [text for choice in item.choices for text in choice[:2]]


def _sample(item: Item, totals: np.ndarray) -> Sample:
    lengths = np.array([max(len(choice.answer), 1) for choice in item.choices])
    best, best_norm = int(np.argmax(totals)), int(np.argmax(totals / lengths))
    is_shared = len({choice.context for choice in item.choices}) == 1
    return Sample(
        id=item.id,
        values={"acc": float(best == item.gold), "acc_norm": float(best_norm == item.gold)},
        fields={
            "prompt": item.choices[0].context
            if is_shared
            else [choice.context for choice in item.choices],
            "choices": [choice.continuation for choice in item.choices],
            "loglikelihoods": totals.tolist(),
            "gold": item.gold,
            "predicted": best,
            "correct": best == item.gold,
        },
    )


def _ids(text: str, tokenizer) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _start(tokenizer) -> int:
    """Returns the token that precedes a text without context."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise UserError(
            "The tokenizer has neither a bos nor an eos token, so there is no token to precede a "
            "text without context. Set eos_token in tokenizer_config.json."
        )
    return start
