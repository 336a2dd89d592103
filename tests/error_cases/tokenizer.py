"""Tokenizers of model directories: missing, broken, of another model, or with code in them."""

import json
import os
import pathlib
import sys
from unittest import mock

from tests.error_cases.case import HACKED, PAGE, Case

CHAT = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


def _case(what: str, message: str, make, **more) -> Case:
    varies = r"(?<=does not load: ).*(?=; copy)|(?<=is not JSON: ).*(?=; is it)"
    return Case("tokenizer", what, message, make=make, varies=varies, **more)


def _file(name: str, content: str | bytes):
    def make(folder: pathlib.Path) -> None:
        data = content.encode() if isinstance(content, str) else content
        (folder / "model" / name).write_bytes(data)

    return make


def _settings(**changes):
    """Other values of tokenizer_config.json; ... takes one out."""

    def make(folder: pathlib.Path) -> None:
        file = folder / "model" / "tokenizer_config.json"
        values = json.loads(file.read_text()) | changes
        values = {name: value for name, value in values.items() if value is not ...}
        file.write_text(json.dumps(values))

    return make


def _absent(folder: pathlib.Path) -> None:
    for file in (folder / "model").glob("tokenizer*"):
        file.unlink()


def _pipe(folder: pathlib.Path) -> None:
    (folder / "model" / "tokenizer.json").unlink()
    os.mkfifo(folder / "model" / "tokenizer.json")


def _sentencepiece(folder: pathlib.Path) -> None:
    """The start of a SentencePiece model in the place of tokenizer.json."""
    (folder / "model" / "tokenizer.json").unlink()
    (folder / "model" / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02")


def _ranked(folder: pathlib.Path) -> None:
    (folder / "model" / "tokenizer.json").unlink()
    (folder / "model" / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")


def _without(package: str):
    return lambda: mock.patch.dict(sys.modules, {package: None})


def _added_token(folder: pathlib.Path) -> None:
    """A word behind the end of the embedding, as after an extension that the model did not get."""
    file = folder / "model" / "tokenizer.json"
    values = json.loads(file.read_text())
    values["added_tokens"].append(
        {
            "id": 4096,
            "content": "<new>",
            "special": False,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
    )
    file.write_text(json.dumps(values))


def _chat(what: str, message: str, template, **row) -> Case:
    def make(folder: pathlib.Path) -> None:
        _settings(chat_template=template)(folder)
        (folder / "rows.jsonl").write_text(json.dumps(json.loads(CHAT) | row) + "\n")

    varies = "(?<=refuses the messages: ).*?(?=; fix)"
    options = ("data.template=tokenizer",)
    return Case("chat template", what, message, options, make, varies=varies)


USER, ANSWER = json.loads(CHAT)["messages"]
TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
TURNS += "{% if add_generation_prompt %}assistant: {% endif %}"
# Its generation prompt has closed the block that an answer with reasoning would fill.
THOUGHTLESS = "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}"
THOUGHTLESS += "<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}\n{% endfor %}"
THOUGHTLESS += "{% if add_generation_prompt %}assistant: <think></think>{% endif %}"
ESCAPE = "{{ cycler.__init__.__globals__.os.system('touch HACKED') }}".replace("HACKED", HACKED)
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
CASES = (
    _case("no tokenizer", "has no tokenizer: none of tokenizer.json", _absent),
    _case(
        "a tokenizer.json that is cut off",
        "tokenizer.json does not load: .*; copy it again",
        _file("tokenizer.json", "{"),
    ),
    _case(
        "a tokenizer.json that is a list",
        "tokenizer.json does not load",
        _file("tokenizer.json", "[]"),
    ),
    _case(
        "a tokenizer.json that is not UTF-8",
        "tokenizer.json does not load",
        _file("tokenizer.json", b"\xff"),
    ),
    _case(
        "a tokenizer.json that git-lfs has not fetched",
        "tokenizer.json is a git-lfs pointer, not the file itself: run `git lfs pull`",
        _file("tokenizer.json", POINTER),
    ),
    _case(
        "a web page as tokenizer.json",
        "tokenizer.json is a web page .HTML., not the file itself: download it again",
        _file("tokenizer.json", PAGE),
    ),
    _case(
        "a chat template that git-lfs has not fetched",
        "chat_template.jinja is a git-lfs pointer",
        _file("chat_template.jinja", POINTER),
    ),
    _case(
        "a SentencePiece model without sentencepiece",
        r"tokenizer.model is a SentencePiece model without .* pip install sentencepiece .*"
        r"or convert it once .*from_pretrained\('model'\)",
        _sentencepiece,
        around=_without("sentencepiece"),
    ),
    _case(
        "a list of ranked tokens without tiktoken",
        "tokenizer.model is a list of ranked tokens without .* pip install tiktoken",
        _ranked,
        around=_without("tiktoken"),
    ),
    _case("a named pipe as tokenizer.json", "has no tokenizer", _pipe),
    _case(
        "settings that are no JSON",
        "tokenizer_config.json is not JSON",
        _file("tokenizer_config.json", "{oops"),
    ),
    _case(
        "a token that only added_tokens.json has",
        "tokenizer.json disagree: .*'Tom.* remove them there",
        _file("added_tokens.json", '{"Tom": 4095, "pears": 4096}'),
    ),
    _case("no end-of-text token", "has no eos token", _settings(eos_token=...)),
    _case(
        "a word behind the embedding",
        r"4096 embedding rows, but none for the token <new> \(4096\)",
        _added_token,
    ),
    _chat("a syntax error", "chat template is not valid Jinja", "{% if %}"),
    _chat(
        "words that it draws",
        "rows.jsonl:1: .* writes different text each time it is used .the Jinja filter random",
        "{{ ['a', 'b'] | random }}" + TURNS,
    ),
    _chat("an exception", "refuses the messages: no", "{{ raise_exception('no') }}"),
    _chat("a division by zero", "refuses the messages: ZeroDivisionError", "{{ 1 / 0 }}"),
    _chat("a sum of text and number", "refuses the messages: TypeError", "{{ 'a' + 1 }}"),
    _chat("a call into Python", "refuses the messages", ESCAPE),
    _chat(
        "a call into Python by way of attributes",
        "refuses the messages",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    ),
    _chat(
        "names, and none of them is default",
        "has the chat templates tool_use, but none named default",
        [{"name": "tool_use", "template": TURNS}],
    ),
    _chat(
        "an exception at tool calls",
        "refuses the messages: no; fix them, or use a chat template that writes them",
        TURNS + "{{ raise_exception('no') }}",
        messages=[USER, ANSWER | {"tool_calls": [{"name": "search", "arguments": {}}]}],
    ),
    _chat("no tools", "chat template writes no tools", TURNS, tools=[{"name": "search"}]),
    _chat(
        "no tool calls",
        r"chat template writes no tool_calls \(message 2\)",
        TURNS,
        messages=[USER, ANSWER | {"tool_calls": [{"name": "search", "arguments": {}}]}],
    ),
    _chat(
        "no reasoning",
        r"chat template writes no reasoning_content \(message 2\)",
        TURNS,
        messages=[USER, ANSWER | {"reasoning": "because"}],
    ),
    _chat(
        "no turns of tools",
        r"chat template writes no tool message \(message 2\)",
        "{% for m in messages if m.role != 'tool' %}{{ m.content }}{% endfor %}",
        messages=[USER, {"role": "tool", "content": "x"}, ANSWER],
    ),
    _chat(
        "an answer that is not written behind the generation prompt",
        "does not write message 2 after its own generation prompt",
        THOUGHTLESS,
        messages=[USER, ANSWER | {"reasoning": "because"}],
    ),
)
