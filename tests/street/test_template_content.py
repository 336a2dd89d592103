"""What chat templates make of reasoning, of tools and of keys that they pass over."""

import json

import pytest

from drlora_jax.data.layouts import Conversation, read_row
from drlora_jax.data.segments import GUARD, BadRow, plain_text
from drlora_jax.data.templates import Style, opens_thinking, unwritten, write, write_prompt
from tests.street.chat_templates import KINDS, NAMED, PARTS_ONLY, QWEN2, QWEN3, QWEN3_THINKING
from tests.street.writing import (
    CALL,
    STYLE,
    TOOLS,
    answer,
    before_answers,
    check,
    rendered,
    turns,
    user,
)

pytestmark = pytest.mark.usefixtures("the_date")
THOUGHT = "They ask for a sum.\nIt is two."


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.has_reasoning])
def test_reasoning(name, tokenizers):
    """It is learned once, as the template writes it behind its own generation prompt."""
    kind, tokenizer = KINDS[name], tokenizers[name]
    plain = [user("1 + 1?"), answer("It is 2.")]
    for key in ("reasoning_content", "reasoning", "thinking"):
        messages = [*turns(1), user("1 + 1?"), answer("It is 2.", **{key: THOUGHT})]
        (*_, last) = write(read_row({"messages": messages}, "chat"), STYLE, tokenizer)
        prompt = rendered(tokenizer, messages[:-1], answering=True)
        text = plain_text(last.segments)
        assert text.startswith(prompt) and text.endswith(
            f"{THOUGHT}\n</think>\n\nIt is 2.{kind.end}"
        )
        assert text[len(prompt) - 8 :].count("<think>") == 1
    block = [user("1 + 1?"), answer(f"<think>\n{THOUGHT}\n</think>\n\nIt is 2.")]
    (same,) = write(read_row({"messages": block}, "chat"), STYLE, tokenizer)
    assert plain_text(same.segments).endswith(f"<think>\n{THOUGHT}\n</think>\n\nIt is 2.{kind.end}")
    assert plain_text(same.segments).count("</think>") == 1
    (bare,) = write(read_row({"messages": plain}, "chat"), STYLE, tokenizer)
    assert opens_thinking(STYLE, tokenizer).endswith("\n</think>\n\n")
    assert bare.segments[-1].text == opens_thinking(STYLE, tokenizer) + f"It is 2.{kind.end}"


def test_reasoning_in_a_channel_of_its_own(tokenizers):
    tokenizer = tokenizers["channels"]
    result = {"role": "tool", "content": '"21" degrees\n'}
    calling = {"role": "assistant", "thinking": "Look it up.", "tool_calls": [CALL]}
    messages = [user("Weather?"), calling, result, answer("21.", thinking="I know.")]
    row = {"messages": messages, "tools": TOOLS}
    found = before_answers(write(read_row(row, "chat"), STYLE, tokenizer))
    texts = list(found.values())
    for place, text in zip((1, 3), texts, strict=True):
        prompt = rendered(tokenizer, messages[:place], answering=True, tools=TOOLS)
        assert found[prompt] == text
    head = "<|channel|>analysis<|message|>"
    assert texts[0].startswith(f"{head}Look it up.<|end|>") and texts[0].endswith("<|call|>")
    assert (
        texts[1]
        == f"{head}I know.<|end|><|start|>assistant<|channel|>final<|message|>21.<|return|>"
    )


def test_a_generation_prompt_that_has_closed_the_block(tokenizers):
    tokenizer = tokenizers["qwen3 closed"]
    assert opens_thinking(STYLE, tokenizer) == ""
    for more in ({"reasoning": THOUGHT}, {"content": f"<think>\n{THOUGHT}\n</think>\n\nIt is 2."}):
        row = {"messages": [user("1 + 1?"), answer("It is 2.") | more]}
        with pytest.raises(BadRow, match="not write message 2 after its own generation prompt"):
            write(read_row(row, "chat"), STYLE, tokenizer)


def test_content_that_is_not_written_is_refused(load):
    tokenizer = load(PARTS_ONLY)
    row = {"messages": turns(1)}
    with pytest.raises(BadRow, match=r"writes no content \(message 2\)"):
        write(read_row(row, "chat"), STYLE, tokenizer)
    asked = Conversation((user("What is it?"),), (False,))
    with pytest.raises(BadRow, match=r"writes no user message \(message 1\)"):
        write_prompt(asked, STYLE, tokenizer)


def test_each_named_template_is_known_by_itself(load):
    """The one for tools may open a block of reasoning where the default one does not."""
    row = {"messages": [user("a"), answer("b")]}
    template = {"default": NAMED["default"], "tool_use": QWEN3_THINKING}
    tokenizer = load(template, KINDS["named"].tokens)
    assert opens_thinking(STYLE, tokenizer) == ""
    for tools, words in ((None, ""), (TOOLS, "\n</think>\n\n")):
        documents = write(read_row(row | {"tools": tools}, "chat"), STYLE, tokenizer)
        prompt = rendered(tokenizer, row["messages"][:1], answering=True, tools=tools)
        assert before_answers(documents) == {prompt: f"{words}b<|im_end|>"}


def test_a_block_without_line_breaks_and_one_without_its_beginning(tokenizers):
    tokenizer = tokenizers["deepseek r1"]
    for content in ("<think>So.</think>2", "So.</think>2"):
        row = {"messages": [user("1 + 1?"), answer(content)]}
        (document,) = write(read_row(row, "chat"), STYLE, tokenizer)
        prompt = rendered(tokenizer, row["messages"][:1], answering=True)
        assert plain_text(document.segments) == prompt + "So.</think>2<｜end▁of▁sentence｜>"


def test_other_names_of_the_block(load):
    """The closing text is the template's own where it shows one, else made from the name."""
    turn = "<|{{ m.role }}|>{{ m.content }}<|endoftext|>"
    prompt = "{% if add_generation_prompt %}<|assistant|><reflect>{% endif %}"
    tokenizer = load(f"{{% for m in messages %}}{turn}{{% endfor %}}{prompt}")
    assert opens_thinking(STYLE, tokenizer) == "\n</reflect>\n\n"
    shown = "{% if m.reasoning_content %}<reflect>{{ m.reasoning_content }}</reflect>{% endif %}"
    turn = f"<|{{{{ m.role }}}}|>{shown}{{{{ m.content }}}}<|endoftext|>"
    tokenizer = load(f"{{% for m in messages %}}{turn}{{% endfor %}}{prompt}")
    assert opens_thinking(STYLE, tokenizer) == "</reflect>"
    row = {"messages": [user("a"), answer("b", reasoning_content="c")]}
    (document,) = write(read_row(row, "chat"), STYLE, tokenizer)
    assert plain_text(document.segments) == rendered(tokenizer, row["messages"])


@pytest.mark.parametrize("special_tokens", ["split", "keep"])
def test_thinking_marks_that_are_control_tokens(special_tokens, load):
    """The template must still find them in an answer, but not in the user's text."""
    tokens = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
    tokenizer = load(QWEN3, tokens)
    style = STYLE._replace(special_tokens=special_tokens)
    row = {"messages": [user("What is <think>?"), answer("<think>\nA sum.\n</think>\n\nIt is 2.")]}
    (document,) = write(read_row(row, "chat"), style, tokenizer)
    assert plain_text(document.segments) == rendered(tokenizer, row["messages"]).rstrip("\n")
    guarded = f"<{GUARD}think>" in document.segments[0].text
    assert guarded == (special_tokens == "split")
    assert "<think>\nA sum.\n</think>" in document.segments[1].text


@pytest.mark.parametrize("name", ["qwen3", "qwen3 thinking", "named"])
def test_tools(name, tokenizers):
    kind, tokenizer = KINDS[name], tokenizers[name]
    result = {"role": "tool", "content": '{"temperature": 21}', "name": "get_weather"}
    messages = [user("Weather in Köln?"), answer("", tool_calls=[CALL]), result, answer("21.")]
    messages += [user("And tomorrow?"), answer("The same.")]
    given = [dict(message) for message in messages]
    given[1]["content"] = None
    as_text = CALL["function"] | {"arguments": '{"city": "K\\u00f6ln"}'}
    given[1]["tool_calls"] = [CALL | {"id": "x", "function": as_text}]
    if name == "named":  # it writes the content of every turn
        given[1]["content"] = ""
    for tools in (TOOLS, json.dumps(TOOLS)):
        check(tokenizer, kind, {"messages": given, "tools": tools}, messages, tools=TOOLS)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if not kind.has_tools])
def test_what_a_template_does_not_write_is_refused(name, tokenizers):
    tokenizer = tokenizers[name]
    for row, field in (
        ({"messages": turns(1), "tools": TOOLS}, "tools"),
        ({"messages": [user("a"), answer("b", tool_calls=[CALL])]}, "tool_calls"),
        ({"messages": [user("a"), answer("b", weight=0, tool_calls=[CALL]), *turns(1)]},
         "tool_calls"),
    ):  # fmt: skip
        with pytest.raises(BadRow, match=f"chat template writes no {field}"):
            write(read_row(row, "chat"), STYLE, tokenizer)
    if not KINDS[name].has_reasoning:
        row = {"messages": [user("a"), answer("b", thinking="hm hm")]}
        with pytest.raises(BadRow, match="chat template writes no reasoning_content"):
            write(read_row(row, "chat"), STYLE, tokenizer)


@pytest.mark.parametrize("name", ["zephyr", "deepseek r1"])
def test_roles_that_a_template_passes_over_are_refused(name, tokenizers):
    for content in ("x", "21 degrees, and no wind at all"):
        messages = [*turns(1), {"role": "tool", "content": content}, answer("b")]
        conversation = read_row({"messages": messages}, "chat")
        with pytest.raises(BadRow, match=r"writes no tool message \(message 3\)"):
            write(conversation, STYLE, tokenizers[name])
        asked = conversation._replace(messages=conversation.messages[:-1])
        with pytest.raises(BadRow, match=r"writes no tool message \(message 3\)"):
            write_prompt(asked, STYLE, tokenizers[name])


@pytest.mark.parametrize(
    ("written", "right"),
    [
        ("{{ c.function.arguments | tojson }}", '{"city": "Köln"}'),
        ("{{ '' + c.function.arguments }}", '{"city": "Köln"}'),  # DeepSeek's way
        ("{{ c.function.arguments }}", '{"city": "Köln"}'),
        ("{{ c.function.arguments | tojson(ensure_ascii=true) }}", '{"city": "K\\u00f6ln"}'),
        ("{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}", "city=Köln"),
    ],
)
def test_arguments_as_the_template_takes_them(written, right, load):
    calls = (
        f"{{% for c in m.tool_calls or [] %}}[{{{{ c.function.name }}}} {written}]{{% endfor %}}"
    )
    tokenizer = load(
        f"{{% for m in messages %}}<|{{{{ m.role }}}}|>{calls}{{{{ m.content }}}}<|endoftext|>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    for arguments in ({"city": "Köln"}, '{"city": "Köln"}'):
        call = {"function": {"name": "get_weather", "arguments": arguments}}
        row = {"messages": [user("a"), {"role": "assistant", "tool_calls": [call]}]}
        (document,) = write(read_row(row, "chat"), STYLE, tokenizer)
        assert document.segments[-1].text == f"[get_weather {right}]<|endoftext|>"


def test_keys_that_are_passed_over_are_named(tokenizers, load):
    messages = [user("a") | {"name": "Ann"}, answer("b")]
    conversation = read_row({"messages": messages}, "chat")
    assert unwritten(conversation, STYLE, tokenizers["qwen2"]) == ("messages[].name",)
    assert unwritten(conversation, Style("chatml"), tokenizers["qwen2"]) == ("messages[].name",)
    tokenizer = load(QWEN2.replace("m.role + '\n'", "m.role + (m.name or '') + '\n'"))
    assert unwritten(conversation, STYLE, tokenizer) == ()
    (document,) = write(conversation, STYLE, tokenizer)
    assert plain_text(document.segments) + "\n" == rendered(tokenizer, messages)
