"""Defines the table of tasks, and how rows become samples.

A task defines where its rows are, how rows become items, and how a model answers items. `NAME`
ranks full answers by log-likelihood, `NAME:mixlora` ranks labels as MixLoRA's evaluation does, and
`NAME:instruct` lets the model generate an answer to rows {instruction, answer}. A new task is one
row of a table here, and one function that makes items.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from drlora_jax.config import DataSection
from drlora_jax.data.sources import Row
from drlora_jax.data.task_questions import read_question
from drlora_jax.data.wording import Writer, named_wording
from drlora_jax.errors import UserError
from drlora_jax.evaluation import code_tasks, generated, loss, multiple_choice
from drlora_jax.evaluation.records import Sample, Settings
from drlora_jax.evaluation.sources import Source
from drlora_jax.inference.model import Loaded
from drlora_jax.system.text import did_you_mean


class Texts(NamedTuple):
    """Provides what is needed to make items; no weights are needed."""

    tokenizer: object
    # Returns a writer with the wording of the run or of --template; None: neither, or plain text.
    # Called on demand: a run of an earlier version may not have recorded its wording, and not every
    # task needs it.
    find_own: Callable[[], Writer | None]
    section: DataSection  # for the loss: how a run reads its data
    length: int  # for the loss: tokens per row
    date: str | None = None  # date for templates that read the clock

    def named(self, template: str) -> Writer:
        """Returns a writer with the template that a task or an option names."""
        wording = named_wording(template, self.tokenizer, date=self.date)
        return Writer(wording, self.tokenizer)

    def writer(self, settings: Settings, default: str) -> Writer:
        """Returns the writer of prompts. `--chat`: the run's wording, or else the tokenizer's chat
        template; `--no-chat`: the task's own prompts; neither: the run's wording, or else the
        task's own prompts.
        """
        if settings.chat is None:
            return self.find_own() or self.named(default)
        return self.chat_writer() if settings.chat else self.named(default)

    def chat_writer(self) -> Writer:
        return self.find_own() or self.named("tokenizer")


class Tools(NamedTuple):
    """Provides what is needed to answer items."""

    loaded: Loaded
    score: multiple_choice.Score
    generate: generated.Generate  # (texts, stops, maximum tokens) -> Generations
    run_program: Callable | None  # runs a program in the sandbox, for code tasks


class Work(NamedTuple):
    """Holds the rows of one task, and how to process them."""

    path: str
    rows: Sequence[Row]
    shots: Sequence[Row]
    settings: Settings
    texts: Texts


class Task(NamedTuple):
    """Defines a benchmark. `items` runs before a model is loaded and finds mistakes in rows."""

    name: str
    source: Source
    metrics: tuple[str, ...]
    items: Callable[[Work], list]
    strings: Callable[[object], list[str]]  # the texts of an item that the prompt hash covers
    answer: Callable[[Sequence, Work, Tools], list[Sample]]
    options: tuple[str, ...]  # the settings that its scores depend on
    shots: Source | None = None  # source of examples; None: the task supports none
    is_code: bool = False
    reads_itself: bool = False  # items are read from the path, not from rows
    chance: Callable[[object], float] | None = None  # probability of guessing an item's answer
    version: str = "1"


def suggest(name: str) -> str:
    return did_you_mean(name, TASKS) or f"known: {', '.join(TASKS)}."


def chosen(items: Sequence, settings: Settings) -> list:
    """Returns at most `limit` items: a seeded sample, in the order of the file. The sample of a
    smaller limit is a subset of that of a larger one.
    """
    if settings.limit is None or settings.limit >= len(items):
        return list(items)
    order = np.random.default_rng(settings.seed).permutation(len(items))
    return [items[index] for index in sorted(order[: settings.limit].tolist())]


def _given(settings: Settings, *names: str) -> str | None:
    """Returns the first of these options that the user gave, to be refused where it is not used."""
    values = {name: getattr(settings, name) for name in names}
    return next((f"--{name}" for name, value in values.items() if value not in (None, False)), None)


# -------------------------------------------------------------------------------- multiple choice

_TEST = {  # data set: (files, hub, split, metrics)
    "arc_easy": (("arc_easy_test", "ARC-Easy/test"), "allenai/ai2_arc:ARC-Easy", "test"),
    "arc_challenge": (
        ("arc_challenge_test", "ARC-Challenge/test"),
        "allenai/ai2_arc:ARC-Challenge",
        "test",
    ),
    "boolq": (("boolq_val", "boolq_test"), "google/boolq", "validation"),
    "openbookqa": (("openbookqa_test",), "allenai/openbookqa:main", "test"),
    "piqa": (("piqa_val", "piqa_test"), "baber/piqa", "validation"),
    "siqa": (("siqa_val", "siqa_test"), "lighteval/siqa", "validation"),
    "winogrande": (
        ("winogrande_val", "winogrande_test"),
        "allenai/winogrande:winogrande_xl",
        "validation",
    ),
    "hellaswag": (
        ("hellaswag_val", "hellaswag_test", "hellaswag_val1000"),
        "Rowan/hellaswag",
        "validation",
    ),
}
# lm-evaluation-harness reports only acc here: answers have one form, or are not what is scored.
_ACC_ONLY = {"boolq", "siqa", "winogrande"}
_FOLDERS = ("", "commonsense_structured/", "commonsense/")


def _source(dataset: str, folders=_FOLDERS) -> Source:
    stems, hub, split = _TEST[dataset]
    return Source(tuple(folder + stem for folder in folders for stem in stems), hub, split)


def _likelihood_task(dataset: str) -> Task:
    def items(work: Work) -> list:
        writer = None
        if work.settings.chat:
            if dataset == "winogrande":
                raise UserError("winogrande scores the end of a sentence; leave --chat out.")
            writer = work.texts.chat_writer()
        elif given := _given(work.settings, "system", "template"):
            raise UserError(f"{given}: {dataset} uses no template by default; add --chat.")
        return [
            multiple_choice.likelihood_item(
                name,
                read_question(row, dataset),
                dataset,
                work.texts.tokenizer,
                writer=writer,
                system=work.settings.system,
            )
            for name, row in _named(work)
        ]

    metrics = ("acc",) if dataset in _ACC_ONLY else ("acc", "acc_norm")
    return _choice_task(dataset, dataset, metrics, items)


def _label_task(dataset: str) -> Task:
    def items(work: Work) -> list:
        if given := _given(work.settings, "chat", "system", "template"):
            raise UserError(f"{dataset}:mixlora has its own prompts; leave {given} out.")
        return [
            multiple_choice.label_item(
                name, read_question(row, dataset), dataset, work.texts.tokenizer
            )
            for name, row in _named(work)
        ]

    return _choice_task(f"{dataset}:mixlora", dataset, ("acc",), items)


def _choice_task(name: str, dataset: str, metrics: tuple[str, ...], items) -> Task:
    return Task(
        name=name,
        source=_source(dataset),
        metrics=metrics,
        items=items,
        strings=multiple_choice.item_texts,
        answer=lambda items, work, tools: multiple_choice.answer_items(items, tools.score),
        options=("limit", "chat", "template", "system", "max_length"),
        chance=lambda item: 1 / item.answers,
    )


# -------------------------------------------------------------------------------------- generated

_WRITTEN = ("limit", "shots", "chat", "template", "system", "max_new_tokens")


def _instruct_task(dataset: str) -> Task:
    def items(work: Work) -> list:
        writer = work.texts.writer(work.settings, "alpaca")
        return [
            generated.instruct_item(name, row, writer, work.settings.system)
            for name, row in _named(work)
        ]

    return _written_task(
        f"{dataset}:instruct",
        _source(dataset, ("", "commonsense/"))._replace(elsewhere=None),
        ("exact_match",),
        items,
        _answer_instruct,
    )


def _answer_instruct(items, work: Work, tools: Tools) -> list[Sample]:
    stop = generated.stop_strings(work.texts.writer(work.settings, "alpaca"))
    tokens = work.settings.max_new_tokens or 32
    return generated.answer_instruct(items, tools.generate, stop, tokens)


def _gsm8k_items(work: Work) -> list:
    writer = work.texts.writer(work.settings, "question_answer")
    return [
        generated.gsm8k_item(name, row, work.shots, writer, work.settings.system)
        for name, row in _named(work)
    ]


def _answer_gsm8k(items, work: Work, tools: Tools) -> list[Sample]:
    writer = work.texts.writer(work.settings, "question_answer")
    stop = generated.stop_strings(writer, shots=work.settings.shots)
    tokens = work.settings.max_new_tokens or 256
    return generated.answer_gsm8k(items, tools.generate, stop, tokens)


def _written_task(name: str, source: Source, metrics, items, answer, **more) -> Task:
    return Task(
        name=name,
        source=source,
        metrics=metrics,
        items=items,
        strings=lambda item: [item.prompt],
        answer=answer,
        options=_WRITTEN,
        **more,
    )


# ------------------------------------------------------------------------------------------- loss


def _loss_items(work: Work) -> list[loss.Item]:
    if given := _given(work.settings, "system", "template"):
        raise UserError(
            f"{given} does not apply to the loss, which reads rows as in training; leave it out, "
            "or set data.template=NAME for another template."
        )
    texts = work.texts
    items = loss.read_items(work.path, texts.section, texts.tokenizer, texts.length, texts.date)
    return chosen(items, work.settings)


_LOSS = Task(
    name="loss",
    source=Source(()),
    metrics=("loss",),
    items=_loss_items,
    strings=loss.item_texts,
    answer=lambda items, work, tools: loss.answer_items(
        tools.loaded, items, length=work.texts.length, batch_size=work.settings.batch_size
    ),
    options=("limit", "max_length"),
    reads_itself=True,
)


# ------------------------------------------------------------------------------------------- code


def _code_items(name: str, read: Callable[[Sequence[Row]], list]) -> Callable[[Work], list]:
    def items(work: Work) -> list:
        if given := _given(work.settings, "chat", "system", "template"):
            raise UserError(f"{name} has its own prompts; leave {given} out.")
        return chosen(read(work.rows), work.settings)

    return items


def _answer_code(stop, tokens: int):
    def answer(items, work: Work, tools: Tools) -> list[Sample]:
        tokens_now = work.settings.max_new_tokens or tokens
        return code_tasks.answer_code(items, tools.generate, stop, tokens_now, tools.run_program)

    return answer


def _named(work: Work) -> list[tuple[str, Row]]:
    """Returns rows with their number in the file, which identifies them under any limit."""
    return chosen([(str(number), row) for number, row in enumerate(work.rows, 1)], work.settings)


_GSM8K = _written_task(
    "gsm8k",
    Source(("gsm8k_test", "gsm8k/test"), "openai/gsm8k:main", "test"),
    ("exact_match_strict", "exact_match_flexible"),
    _gsm8k_items,
    _answer_gsm8k,
    # The bundled rows are of the train split, so examples are available on every machine.
    shots=Source(("gsm8k_train", "gsm8k/train"), "bundled:gsm8k/train.jsonl", "train"),
)
_HUMANEVAL = _written_task(
    "humaneval",
    Source(("HumanEval", "humaneval", "humaneval/HumanEval"), "openai/openai_humaneval", "test"),
    ("pass@1",),
    _code_items("humaneval", lambda rows: list(map(code_tasks.humaneval_item, rows))),
    _answer_code(code_tasks.HUMANEVAL_STOPS, 512),
    is_code=True,
)
_MBPP = Task(
    name="mbpp",
    source=Source(("mbpp", "mbpp/mbpp"), "google-research-datasets/mbpp:full", "train+test"),
    metrics=("pass@1",),
    items=_code_items("mbpp", code_tasks.mbpp_items),
    strings=lambda item: [item.prompt],
    answer=_answer_code(code_tasks.MBPP_STOPS, 512),
    options=_WRITTEN,
    is_code=True,
)

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        *(_likelihood_task(dataset) for dataset in _TEST),
        *(_label_task(dataset) for dataset in _TEST),
        *(_instruct_task(dataset) for dataset in _TEST),
        _LOSS,
        _GSM8K,
        _HUMANEVAL,
        _MBPP,
    )
}
