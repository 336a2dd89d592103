"""Conversations, and what `write` makes of them beside the template itself."""

import datetime

from transformers.utils import chat_template_utils

from drlora_jax.data.layouts import Conversation, read_row
from drlora_jax.data.segments import GUARD, plain_text
from drlora_jax.data.templates import (
    Style,
    write,
    write_prompt,
)

DATE = "2025-03-04"
STYLE = Style("tokenizer", "split", DATE)
SYSTEM = {"role": "system", "content": "Speak like a pirate, and briefly."}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Köln"}}}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def answer(text: str, **more) -> dict:
    return {"role": "assistant", "content": text} | more


def turns(count: int) -> list[dict]:
    return [m for n in range(count) for m in (user(f"Question {n}?"), answer(f" Answer {n}. "))]


def set_clock(monkeypatch, moment: datetime.datetime) -> None:
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return moment

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


def rendered(tokenizer, messages, *, answering=False, tools=None) -> str:
    return tokenizer.apply_chat_template(
        messages, tools=tools, tokenize=False, add_generation_prompt=answering
    )


def before_answers(documents) -> dict[str, str]:
    """Texts that stand before learned pieces, and these."""
    found = {}
    for document in documents:
        done = ""
        for segment in document.segments:
            if segment.is_response:
                found[done] = segment.text.replace(GUARD, "")
            done += segment.text.replace(GUARD, "")
    return found


def check(tokenizer, kind, row, messages, *, tools=None, learned=None) -> list:
    """Prompts are the template's own, answers are what it puts behind them, up to the turn's end.

    Args:
      row: as the user brings it.
      messages: the same as transformers takes it.
      learned: places of the answers that are learned; all by default.
    """
    conversation = read_row(row, "chat")
    documents = write(conversation, STYLE, tokenizer)
    found = before_answers(documents)
    if learned is None:
        learned = [n for n, m in enumerate(messages) if m["role"] == "assistant"]
    prompts = [rendered(tokenizer, messages[:n], answering=True, tools=tools) for n in learned]
    assert list(found) == prompts
    for place, prompt in zip(learned, prompts, strict=True):
        full = rendered(tokenizer, messages[: place + 1], tools=tools)
        if full.startswith(prompt):
            rest = full[len(prompt) :].removeprefix(found[prompt])
            assert rest != full[len(prompt) :] and not rest.strip()
        if kind.end:
            assert found[prompt].endswith(kind.end) and found[prompt].count(kind.end) == 1
        asked = Conversation(conversation.messages[:place], (False,) * place, conversation.tools)
        assert plain_text(write_prompt(asked, STYLE, tokenizer)) == prompt
    assert all(document.is_ended == (kind.end is not None) for document in documents)
    return documents
