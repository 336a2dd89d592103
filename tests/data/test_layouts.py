"""Rows of every layout as conversations: what is read, refused, and named unread."""

import json

import pytest

from drlora_jax.data.layouts import FieldNames, detect_format, read_row, read_text
from drlora_jax.data.segments import BadRow
from drlora_jax.errors import UserError

USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
CHAT = [{"role": "system", "content": "S"}, USER, ANSWER]
SHARE = [
    {"from": "system", "value": "S"},
    {"from": "human", "value": "a"},
    {"from": "gpt", "value": "b"},
]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
DEFAULT = FieldNames()


@pytest.mark.parametrize(
    ("fields", "row_format", "changed"),
    [
        ({"prompt": "a", "response": "b"}, "prompt_response", {}),
        ({"prompt": "a", "completion": "b"}, "prompt_response", {"response": "completion"}),
        ({"prompt": "a", "completion": "b", "response": "c"}, "prompt_response", {}),
        ({"prompt": "a", "response": '[{"role": "x"}]'}, "prompt_response", {}),
        ({"instruction": "a", "output": "b", "text": "a b"}, "alpaca", {}),
        ({"messages": CHAT}, "chat", {}),
        ({"messages": CHAT, "prompt": "a", "response": "b"}, "chat", {}),
        ({"messages": None, "prompt": "a", "response": "b"}, "prompt_response", {}),
        ({"messages": json.dumps(CHAT)}, "chat", {}),
        ({"conversations": SHARE}, "chat", {"messages": "conversations"}),
        ({"conversations": SHARE, "text": "a b"}, "chat", {"messages": "conversations"}),
        ({"messages": None, "conversations": CHAT}, "chat", {"messages": "conversations"}),
        ({"conversation": CHAT}, "chat", {"messages": "conversation"}),
        ({"prompt": [USER], "completion": [ANSWER]}, "chat", {"response": "completion"}),
        ({"prompt": [USER], "response": "b"}, "chat", {}),
        ({"text": "a"}, "text", {}),
    ],
)
def test_format_and_names_are_found(fields, row_format, changed):
    assert detect_format(fields, DEFAULT) == (row_format, DEFAULT._replace(**changed))
    if row_format != "text":
        assert read_row(fields, *detect_format(fields)).messages


def test_own_names_are_not_replaced_by_usual_ones():
    names = FieldNames(messages="dialogue")
    assert detect_format({"dialogue": CHAT}, names) == ("chat", names)
    with pytest.raises(UserError, match="Set data.messages_field=conversations"):
        detect_format({"conversations": CHAT}, names)


@pytest.mark.parametrize(
    ("fields", "help_"),
    [
        (
            {"question": "a", "answer": "b"},
            "data.prompt_field=question data.response_field=answer",
        ),
        (
            {"system_prompt": "s", "question": "a", "response": "b"},
            "data.prompt_field=question data.response_field=response",
        ),
        (
            {"prompt": CHAT[:2], "chosen": CHAT[2:], "rejected": CHAT[2:]},
            "data.prompt_field=prompt data.response_field=chosen",
        ),
        (
            {"prompt": CHAT[:2], "answer": "b"},
            "data.prompt_field=prompt data.response_field=answer",
        ),
        ({"prompt": "a", "chosen": CHAT, "rejected": CHAT}, "data.messages_field=chosen to read"),
        ({"id": 1, "dialog": SHARE}, "data.messages_field=dialog to read"),
        ({"chosen": CHAT, "rejected": CHAT}, "data.messages_field=chosen to read"),
        ({"dialog": json.dumps(SHARE)}, "data.messages_field=dialog to read"),
        ({"version": "1", "data": [{"prompt": "a"}]}, "'data' is a list of rows: write one of its"),
        ({"train": [{"a": "b"}], "test": [{"a": "b"}]}, "'train', 'test' are lists of rows: "),
        ({"a": "b", "c": "d", "tools": [{"e": 1}]}, "to the names of two text fields"),
        ({"a": "b", "c": "d"}, "to the names of two text fields, or data.messages_field"),
        ({}, "fields none; it needs"),
    ],
)
def test_what_cannot_be_told_names_the_setting(fields, help_):
    with pytest.raises(UserError, match="cannot detect the format") as caught:
        detect_format(fields)
    assert help_ in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": CHAT},
        {"messages": json.dumps(CHAT)},
        {"messages": {"role": ["system", "user", "assistant"], "content": ["S", "a", "b"]}},
        {"messages": [m | {"name": None, "tool_calls": None} for m in CHAT]},
        {"messages": [m | {"content": [{"type": "text", "text": m["content"]}]} for m in CHAT]},
        {"messages": [{"role": m["role"].upper(), "content": m["content"]} for m in CHAT]},
        {"conversations": SHARE},
        {"conversations": json.dumps(SHARE)},
        {"conversations": [m | {"role": None, "content": None} for m in SHARE]},
        {"conversations": SHARE[1:], "system": "S"},
        {"messages": CHAT[1:], "system_prompt": "S"},
        {"messages": CHAT, "system": "S"},
        {"prompt": CHAT[:2], "completion": CHAT[2:]},
        {"prompt": CHAT[:2], "response": "b"},
        {"prompt": {"role": ["system", "user"], "content": ["S", "a"]}, "response": "b"},
        {"prompt": "a", "response": "b", "system": "S"},
        {"instruction": "a", "output": "b", "system": "S", "input": "", "history": []},
    ],
)
def test_layouts_of_one_conversation(fields):
    conversation = read_row(fields, *detect_format(fields))
    assert list(conversation.messages) == CHAT
    assert conversation.is_learned == (False, False, True)
    assert conversation.unread == () and conversation.tools is None


@pytest.mark.parametrize("name", ["gpt", "assistant", "model", "ai", "bot", "ChatGPT", "chatbot"])
def test_names_of_speakers(name):
    row = {"conversations": [{"from": "user", "value": "a"}, {"from": name, "value": "b"}]}
    assert list(read_row(row, "chat").messages) == [USER, ANSWER]


def test_tools_in_sharegpt():
    turns = [
        {"from": "human", "value": "a"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "7"},
        {"from": "gpt", "value": "b"},
    ]
    for tools in ([TOOL], json.dumps([TOOL]), [json.dumps(TOOL)]):
        conversation = read_row({"conversations": turns, "tools": tools}, "chat")
        assert conversation.tools == (TOOL,)
        assert list(conversation.messages) == [
            USER,
            {"role": "assistant", "tool_calls": [CALL]},
            {"role": "tool", "content": "7"},
            ANSWER,
        ]
        assert conversation.is_learned == (False, True, False, True)


def test_calls_reasoning_and_names_are_kept():
    call = {"id": "x", "type": "function", "index": None}
    for function in ({"name": "f", "arguments": '{"x": 1}'}, {"name": "f", "arguments": {"x": 1}}):
        calls = [call | {"function": function}]
        answer = {"role": "assistant", "content": None, "tool_calls": calls}
        result = {"role": "tool", "content": "7", "tool_call_id": "x", "name": "f"}
        last = ANSWER | {"reasoning": "hm"}
        row = {"messages": [USER, answer, result, last]}
        conversation = read_row(row, "chat")
        assert conversation.messages[1] == {
            "role": "assistant",
            "tool_calls": [{"id": "x", "type": "function", "function": function}],
        }
        assert conversation.messages[2] == result
        assert conversation.messages[3] == ANSWER | {"reasoning_content": "hm"}
        assert conversation.unread == ()
    old = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": ""}}
    (call,) = read_row({"messages": [USER, old]}, "chat").messages[1]["tool_calls"]
    assert call == {"type": "function", "function": {"name": "f", "arguments": {}}}


@pytest.mark.parametrize("key", ["weight", "train", "trainable", "training", "loss", "loss_weight"])
@pytest.mark.parametrize(
    ("mark", "is_learned"), [(0, False), (False, False), (1.0, True), (None, True)]
)
def test_marks_of_turns(key, mark, is_learned):
    messages = [USER, ANSWER | {key: mark}, USER | {key: 0}, ANSWER]
    conversation = read_row({"messages": messages}, "chat")
    assert conversation.is_learned == (False, is_learned, False, True)
    assert conversation.unread == () and list(conversation.messages) == [USER, ANSWER] * 2


def test_marks_that_ask_to_learn_a_question_are_named():
    row = {"messages": [USER | {"train": True}, ANSWER]}
    assert read_row(row, "chat").unread == ("messages[].train",)


def test_prompts_are_not_learned_and_nothing_behind_the_last_answer_is_kept():
    row = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}
    assert read_row(row, "chat").is_learned == (False, False, False, True)
    row = {"messages": [USER, ANSWER, USER, ANSWER | {"weight": 0}]}
    conversation = read_row(row, "chat")
    assert list(conversation.messages) == [USER, ANSWER]
    assert conversation.unread == ("messages[] after the last learned answer",)


def test_alpaca_history():
    row = {"instruction": "c", "input": "x", "output": "d", "history": [["a", "b"]]}
    conversation = read_row(row, "alpaca")
    assert [m["content"] for m in conversation.messages] == ["a", "b", "c", "d"]
    assert conversation.is_learned == (False, True, False, True) and conversation.extra == "x"
    assert read_row(row | {"history": '[["a", "b"]]'}, "alpaca") == conversation


def test_unread_fields_are_named_unless_they_are_empty():
    empty = {"a": None, "b": "", "c": [], "d": {}, "e": {"x": None, "y": ""}, "tools": []}
    row = {"messages": [USER | {"id": "1"}, ANSWER | {"id": "2", "name": ""}], "source": "web"}
    conversation = read_row(row | empty | {"weight": 0.5}, "chat")
    assert conversation.unread == ("messages[].id", "source", "weight")
    assert read_row({"conversations": SHARE, "messages": None}, "chat").unread == ()
    row = {"prompt": "a", "response": "b", "reasoning": "c", "history": [["x", "y"]]}
    assert read_row(row, "prompt_response").unread == ("reasoning", "history")
    row = {"messages": CHAT, "system": "another"}
    assert read_row(row, "chat").unread == ("system",)
    assert read_text({"text": "a", "id": 3, "tag": ""}) == ("a", ("id",))


def test_a_prompt_needs_no_answer():
    for fields in (
        {"messages": CHAT},
        {"messages": CHAT[:2]},
        {"prompt": CHAT[:2]},
        {"prompt": CHAT[:2], "response": None},
    ):
        asked = read_row(fields, "chat", needs_answer=False)
        assert list(asked.messages) == CHAT[:2] and asked.unread == ()
    asked = read_row({"prompt": "a"}, "prompt_response", needs_answer=False)
    assert list(asked.messages) == [USER]
    asked = read_row({"instruction": "a", "input": "x"}, "alpaca", needs_answer=False)
    assert list(asked.messages) == [USER] and asked.extra == "x"
    for only in ({"messages": [ANSWER]}, {"prompt": []}):
        with pytest.raises(BadRow):
            read_row(only, "chat", needs_answer=False)


def _roles(*roles) -> dict:
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


def _with(message: dict) -> dict:
    return {"messages": [USER, message]}


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
        (
            "prompt_response",
            {"prompt": "a", "response": "b", "system": 3},
            "wrong type",
            "'system'",
        ),
        ("alpaca", {"instruction": "a", "output": ""}, "empty response", "'output' is empty"),
        ("alpaca", {"instruction": "a", "input": 1, "output": "b"}, "wrong type", "'input' must"),
        (
            "alpaca",
            {"instruction": "a", "output": "b", "history": [["x"]]},
            "wrong type",
            "'history'",
        ),
        ("chat", {}, "missing field", "'messages' is missing"),
        ("chat", {"messages": None}, "null", "'messages' is null"),
        ("chat", {"messages": []}, "empty messages", "empty list"),
        ("chat", {"messages": "hello"}, "wrong type", "must be a list of messages, got str"),
        ("chat", {"messages": ["hello"]}, "wrong type", "message 1 must be an object, got str"),
        ("chat", {"messages": [{"from": "a"}]}, "missing field", "needs a 'value', got .* from"),
        (
            "chat",
            {"messages": [{"speaker": "a"}]},
            "missing field",
            "needs a 'role', got .* speaker",
        ),
        ("chat", {"messages": {"role": ["user"], "content": []}}, "wrong type", "list of messages"),
        ("chat", {"messages": [{"role": "user", "content": None}]}, "null", "needs a 'content'"),
        (
            "chat",
            {"messages": [{"role": "user", "content": []}]},
            "wrong type",
            "content of message 1",
        ),
        ("chat", {"messages": [{"role": "user", "content": [1]}]}, "wrong type", "a list of int"),
        (
            "chat",
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "x.png"}]}]},
            "not text",
            "message 1 has a part of type 'image'",
        ),
        (
            "chat",
            _with(ANSWER | {"weight": 0.5}),
            "weight of a turn",
            "weight of message 2 must be .* got 0.5",
        ),
        (
            "chat",
            _with(ANSWER | {"train": "no"}),
            "weight of a turn",
            r"train of message 2 must be .* got 'no'",
        ),
        ("chat", _with(ANSWER | {"content": ""}), "empty response", r"message 2 \(assistant\)"),
        (
            "chat",
            _with(ANSWER | {"tool_calls": [{"x": 1}]}),
            "tool call",
            "tool call 1 of message 2",
        ),
        (
            "chat",
            _with(ANSWER | {"tool_calls": [{"name": "f", "arguments": "not JSON"}]}),
            "tool call",
            "arguments of tool call 1 of message 2",
        ),
        ("chat", _with({"from": "function_call", "value": "f()"}), "tool call", "tool call 1"),
        ("chat", {"messages": CHAT, "tools": ["f"]}, "tools", "'tools' must be a list of tools"),
        ("chat", _roles("user"), "no answer to learn", "got the roles user"),
        ("chat", _roles("system"), "no answer to learn", "got the roles system"),
        ("chat", _roles("assistant", "user"), "role order", "message 1 is an answer"),
        (
            "chat",
            {"messages": [USER, ANSWER | {"weight": 0}]},
            "no answer to learn",
            "no assistant",
        ),
    ],
)
def test_bad_rows(row_format, fields, reason, message):
    with pytest.raises(BadRow, match=message) as caught:
        read_row(fields, row_format)
    assert caught.value.reason == reason


def test_empty_text():
    with pytest.raises(BadRow, match="'text' is empty"):
        read_text({"text": " "})
