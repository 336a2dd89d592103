"""Writes multiple-choice rows as training text: the prompt of `evaluate`, and the right answer.

With `data.format=choice` a path is `TASK=PATH`. TASK is a task of `evaluate`: `arc_easy` writes the
whole answer behind the question, `arc_easy:mixlora` the label behind a prompt that lists all
choices. PATH is any data path. Several tasks may be mixed.
"""

from collections.abc import Iterator, Sequence

from drlora_jax.data.segments import BadRow, Segment
from drlora_jax.data.sources import Row, read_rows
from drlora_jax.data.task_prompts import label_prompt, likelihood_choices
from drlora_jax.data.task_questions import DATASETS, read_question
from drlora_jax.errors import UserError
from drlora_jax.system.text import did_you_mean

FORMAT = "choice"
PROTOCOLS = ("", "mixlora")


def split_task(path: str) -> tuple[str, str]:
    """Splits `TASK=PATH` into task and data."""
    task, separator, rows = path.partition("=")
    dataset, _, protocol = task.partition(":")
    if not separator or not rows:
        raise UserError(
            f"data.format={FORMAT} needs paths TASK=PATH, for example arc_easy=FILE.jsonl, got "
            f"{path!r}."
        )
    if dataset not in DATASETS or protocol not in PROTOCOLS:
        hint = did_you_mean(dataset, () if dataset in DATASETS else DATASETS) or "known are"
        names = f"{', '.join(DATASETS)}, each alone or with :mixlora"
        raise UserError(f"{path}: no multiple-choice task {task!r}; {hint} ({names}).")
    return task, rows


def read_choices(paths: Sequence[str], *, split: str) -> Iterator[tuple[str, Row]]:
    """Yields (task, row) for every row of every path."""
    tasks = [split_task(path) for path in paths]  # checked before any path is read
    for task, path in tasks:
        for row in read_rows(path, split=split):
            yield task, row


def render_choice(task: str, row: Row) -> list[Segment]:
    """Writes the prompt and the right answer of a row; raises BadRow if it is no question of its
    task.
    """
    dataset, _, protocol = task.partition(":")
    try:
        question = read_question(row, dataset)
    except UserError as error:
        message = str(error).removeprefix(f"{row.where}: ").rstrip(".")
        raise BadRow("not a question", message) from error
    if protocol:
        context, labels, gold = label_prompt(question, dataset)
        continuation = f" {labels[gold]}"
    else:
        context, continuation, _ = likelihood_choices(question, dataset)[question.gold]
    prompt = context.rstrip()  # as in evaluation: a leading space belongs to the word
    return [Segment(prompt, False), Segment(context[len(prompt) :] + continuation, True)]
