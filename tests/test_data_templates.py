"""Rendering of rows: exact texts, borders of responses, and what is refused."""

import pytest
import tokenizers
import transformers

from drlora_jax.data.templates import (
    BadRow,
    FieldNames,
    choose_template,
    detect_format,
    render,
    render_prompt,
)
from drlora_jax.errors import UserError

OWN = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
FORGETFUL = (  # drops earlier answers, as templates for reasoning models do with earlier thoughts
    "{% for m in messages %}[{{ m.role }}]"
    "{% if m.role == 'user' or loop.last %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U1"},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "U2"},
    {"role": "assistant", "content": "A2"},
]
PAIR = {"prompt": "P", "response": "R"}
ALPACA_PREAMBLE = "Below is an instruction that describes a task"


def make_tokenizer(**options):
    """Only special tokens and a chat template matter here, not the vocabulary."""
    vocabulary = {"<s>": 0, "</s>": 1, "?": 2}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="?")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model),
        bos_token="<s>",
        eos_token="</s>",
        **options,
    )


def _marked(segments) -> str:
    """The text with responses in braces."""
    return "".join("{" + s.text + "}" if s.is_response else s.text for s in segments)


def _render(fields, row_format, template, **options) -> str:
    tokenizer = make_tokenizer(**options)
    segments = render(fields, row_format=row_format, template=template, tokenizer=tokenizer)
    return _marked(segments)


@pytest.mark.parametrize(
    ("fields", "row_format"),
    [
        (PAIR, "prompt_response"),
        ({"instruction": "a", "output": "b"}, "alpaca"),
        ({"messages": CHAT}, "chat"),
        ({"text": "a"}, "text"),
    ],
)
def test_format_is_found(fields, row_format):
    assert detect_format(fields, FieldNames()) == row_format


def test_format_is_found_by_own_names():
    names = FieldNames(prompt="question", response="answer")
    assert detect_format({"question": "a", "answer": "b"}, names) == "prompt_response"
    with pytest.raises(
        UserError, match="cannot tell the format .* fields question, answer; it looks"
    ):
        detect_format({"question": "a", "answer": "b"}, FieldNames())


def test_prompt_templates():
    assert _render(PAIR, "prompt_response", "plain") == "P\n{R}"
    assert _render(PAIR, "prompt_response", "question_answer") == "Question: P\nAnswer:{ R}"
    row = {"instruction": "I", "input": "X", "output": "R"}
    assert _render(row, "alpaca", "plain") == "I\nX\n{R}"
    text = _render(row, "alpaca", "alpaca")
    assert text.startswith(ALPACA_PREAMBLE + ", paired with an input")
    assert text.endswith("\n\n### Instruction:\nI\n\n### Input:\nX\n\n### Response:\n{R}")
    for missing in ({"input": ""}, {"input": None}, {}):
        text = _render({"instruction": "I", "output": "R"} | missing, "alpaca", "alpaca")
        assert text.startswith(ALPACA_PREAMBLE + ". Write")
        assert text.endswith("\n\n### Instruction:\nI\n\n### Response:\n{R}")
    assert _render({"text": "abc"}, "text", "as is") == "{abc}"


def test_chat_templates():
    tulu = "<|system|>\nS\n<|user|>\nU1\n<|assistant|>\n{A1</s>}\n"
    tulu += "<|user|>\nU2\n<|assistant|>\n{A2</s>}"
    assert _render({"messages": CHAT}, "chat", "tulu") == tulu
    turn = "<|im_start|>{}\n{}<|im_end|>"
    answer = "<|im_start|>assistant\n{{{}<|im_end|>}}"
    chatml = [turn.format("system", "S"), turn.format("user", "U1"), answer.format("A1")]
    chatml += [turn.format("user", "U2"), answer.format("A2")]
    assert _render({"messages": CHAT}, "chat", "chatml") == "\n".join(chatml)
    own = "<s>[system]S\n[user]U1\n[assistant]{A1</s>}\n[user]U2\n[assistant]{A2</s>}"
    assert _render({"messages": CHAT}, "chat", "tokenizer", chat_template=OWN) == own
    pair = "<s>[user]P\n[assistant]{R</s>}"
    assert _render(PAIR, "prompt_response", "tokenizer", chat_template=OWN) == pair
    row = {"instruction": "I", "input": "X", "output": "R"}
    assert _render(row, "alpaca", "tulu") == "<|user|>\nI\nX\n<|assistant|>\n{R</s>}"


def test_own_template_as_the_tokenizer_renders_it():
    tokenizer = make_tokenizer(chat_template=OWN)
    segments = render(
        {"messages": CHAT}, row_format="chat", template="tokenizer", tokenizer=tokenizer
    )
    whole = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert "".join(segment.text for segment in segments) + "\n" == whole


def test_prompt_is_what_stands_before_the_response():
    tokenizer = make_tokenizer(chat_template=OWN)
    for template in ("plain", "question_answer", "alpaca", "chatml", "tulu", "tokenizer"):
        segments = render(
            PAIR, row_format="prompt_response", template=template, tokenizer=tokenizer
        )
        prompt = render_prompt("P", template=template, tokenizer=tokenizer)
        assert prompt == segments[0].text and not segments[0].is_response


def test_automatic_template():
    bare, own = make_tokenizer(), make_tokenizer(chat_template=OWN)
    assert choose_template("auto", "alpaca", bare) == "alpaca"
    assert choose_template("auto", "prompt_response", own) == "plain"
    assert choose_template("auto", "text", own) == "as is"
    assert choose_template("auto", "chat", bare) == "tulu"
    assert choose_template("auto", "chat", own) == "tokenizer"


@pytest.mark.parametrize(
    ("template", "row_format", "message"),
    [
        ("chat_ml", "chat", "'chat_ml' does not exist; did you mean chatml?"),
        ("zzz", "chat", "does not exist; known: plain, question_answer"),
        ("tokenizer", "chat", "the tokenizer has no chat template; use chatml or tulu"),
        ("tulu", "text", "template=tulu does not apply to data.format=text"),
        ("plain", "chat", "template=plain writes one prompt .* data.format=chat has messages"),
    ],
)
def test_templates_refused(template, row_format, message):
    with pytest.raises(UserError, match=message):
        choose_template(template, row_format, make_tokenizer())


def test_template_that_rewrites_earlier_turns_is_refused():
    assert _render(PAIR, "prompt_response", "tokenizer", chat_template=FORGETFUL)
    with pytest.raises(UserError, match=r"rewrites earlier turns \(message 5\)"):
        _render({"messages": CHAT}, "chat", "tokenizer", chat_template=FORGETFUL)


def _roles(*roles) -> dict:
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


@pytest.mark.parametrize(
    ("row_format", "fields", "reason", "message"),
    [
        (
            "prompt_response",
            {"prompt": "a"},
            "missing field",
            "'response' is missing, got .* prompt",
        ),
        ("prompt_response", {}, "missing field", "got the fields none"),
        ("prompt_response", {"prompt": None, "response": "b"}, "null", "'prompt' is null"),
        ("prompt_response", {"prompt": 3, "response": "b"}, "wrong type", "a string, got int"),
        (
            "prompt_response",
            {"prompt": "a", "response": " \n"},
            "empty response",
            "'response' is empty",
        ),
        ("prompt_response", {"prompt": "\ud800", "response": "b"}, "invalid text", "surrogate"),
        ("alpaca", {"instruction": "a", "output": ""}, "empty response", "'output' is empty"),
        ("alpaca", {"instruction": "a", "input": 1, "output": "b"}, "wrong type", "'input' must"),
        ("text", {"text": ""}, "empty text", "'text' is empty"),
        ("chat", {}, "missing field", "'messages' is missing"),
        ("chat", {"messages": None}, "null", "'messages' is null"),
        ("chat", {"messages": []}, "empty messages", "empty list"),
        ("chat", {"messages": "hello"}, "wrong type", "must be a list of messages, got str"),
        ("chat", {"messages": ["hello"]}, "wrong type", "message 1 must be an object, got str"),
        ("chat", {"messages": [{"from": "a"}]}, "missing field", "needs a 'role', got .* from"),
        ("chat", {"messages": [{"role": "user", "content": None}]}, "null", "needs a 'content'"),
        (
            "chat",
            {"messages": [{"role": "user", "content": []}]},
            "wrong type",
            "content of message 1",
        ),
        ("chat", _roles("user"), "role order", "ending with assistant, got user"),
        ("chat", _roles("assistant", "user"), "role order", "got assistant, user"),
        ("chat", _roles("system"), "role order", "got system"),
        ("chat", _roles("user", "system", "assistant"), "role order", "got user, system"),
        ("chat", _roles("user", "assistant", "tool"), "role order", "assistant, tool"),
    ],
)
def test_bad_rows(row_format, fields, reason, message):
    with pytest.raises(BadRow, match=message) as caught:
        _render(fields, row_format, "tulu")
    assert caught.value.reason == reason


def test_empty_answer_in_a_chat():
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]
    with pytest.raises(BadRow, match=r"message 2 \(assistant\) is empty"):
        _render({"messages": messages}, "chat", "tulu")


def test_template_that_refuses_a_row():
    refusing = "{{ raise_exception('no system role') }}"
    with pytest.raises(BadRow, match="refuses the messages: no system role"):
        _render({"messages": CHAT}, "chat", "tokenizer", chat_template=refusing)
