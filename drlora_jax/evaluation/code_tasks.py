"""Evaluates HumanEval and MBPP: the model writes a function, whose tests run in the sandbox (pass@1
with greedy decoding).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from drlora_jax.data.sources import Row
from drlora_jax.errors import UserError
from drlora_jax.evaluation.generated import Generate
from drlora_jax.evaluation.records import Sample

HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
MBPP_STOPS = ("[DONE]",)
MBPP_SHOTS, MBPP_TEST = (2, 3, 4), range(11, 511)  # task ids


class Item(NamedTuple):
    """Holds a prompt, and the program around the generated text: `before` + text + `after`."""

    id: str
    prompt: str
    before: str
    after: str


def humaneval_item(row: Row) -> Item:
    prompt, tests, name = (_text(row, field) for field in ("prompt", "test", "entry_point"))
    return Item(_text(row, "task_id"), prompt, prompt, f"\n{tests}\ncheck({name})\n")


def mbpp_items(rows: Sequence[Row]) -> list[Item]:
    """Returns tasks 11 to 510, each after three solved examples from the same file."""
    by_id = {row.fields.get("task_id"): row for row in rows}
    missing = [number for number in MBPP_SHOTS if number not in by_id]
    if missing:
        raise UserError(
            f"{rows[0].where}: MBPP's examples are its tasks {MBPP_SHOTS}, but the file has no "
            f"task_id {missing[0]}; use the full file."
        )
    shots = "".join(
        f"{_mbpp_prompt(by_id[number])}{_text(by_id[number], 'code')}\n[DONE]\n\n"
        for number in MBPP_SHOTS
    )
    tasks = [by_id[number] for number in MBPP_TEST if number in by_id]
    return [
        # Set-up code follows the function, which it uses in two tasks.
        Item(
            str(row.fields["task_id"]),
            shots + _mbpp_prompt(row),
            "",
            "\n".join(["", row.fields.get("test_setup_code") or "", *_tests(row), ""]),
        )
        for row in tasks
    ]


def answer_code(
    items: Sequence[Item],
    generate: Generate,
    stop: Sequence[str],
    tokens: int,
    run: Callable[[str], NamedTuple],
) -> list[Sample]:
    """Generates programs and tests them: `run` executes a program and returns an outcome with
    `is_passed`, `verdict` and `detail`.
    """
    samples = []
    answers = generate([item.prompt for item in items], stop, tokens)
    for item, written in zip(items, answers, strict=True):
        outcome = run(item.before + written.text + item.after)
        fields = {
            "prompt": item.prompt,
            "text": written.text,
            "finish": written.finish,
            "gold": item.after,
            "predicted": outcome.verdict,
            "detail": outcome.detail,
            "correct": outcome.is_passed,
        }
        samples.append(Sample(item.id, {"pass@1": float(outcome.is_passed)}, fields))
    return samples


def _mbpp_prompt(row: Row) -> str:
    tests = "\n".join(_tests(row))
    return (
        "You are an expert Python programmer, and here is your task: "
        f"{_text(row, 'text')} Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


def _tests(row: Row) -> list[str]:
    tests = row.fields.get("test_list")
    if not tests or not all(isinstance(test, str) for test in tests):
        raise UserError(f"{row.where}: test_list must be a list of texts; use MBPP's rows.")
    return list(tests)


def _text(row: Row, name: str) -> str:
    value = row.fields.get(name)
    if not isinstance(value, str):
        raise UserError(
            f"{row.where}: needs the text field {name}; got the fields "
            f"{', '.join(map(str, row.fields))}."
        )
    return value
