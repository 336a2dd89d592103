"""Chat templates that we did not shape: what `write` and `write_prompt` make of conversations is
compared with the tokenizer's own `apply_chat_template`, called here.
"""

import datetime
import random

import pytest

from drlora_jax.data.layouts import Conversation, read_row
from drlora_jax.data.segments import BadRow, control_pattern, plain_text
from drlora_jax.data.templates import opens_thinking, reads_clock, turn_end, write, write_prompt
from drlora_jax.errors import UserError
from tests.street.chat_templates import KINDS, LLAMA3_2, QWEN2, REFUSING
from tests.street.writing import (
    DATE,
    STYLE,
    SYSTEM,
    TOOLS,
    answer,
    before_answers,
    check,
    rendered,
    set_clock,
    turns,
    user,
)

pytestmark = pytest.mark.usefixtures("the_date")


@pytest.mark.parametrize("name", KINDS)
def test_turns(name, tokenizers):
    kind, tokenizer = KINDS[name], tokenizers[name]
    for count in (1, 2, 3, 7):
        messages = turns(count)
        documents = check(tokenizer, kind, {"messages": messages}, messages)
        assert len(documents) == (1 if kind.is_stable or "mistral" in name else len(documents))
        if not kind.has_system:
            continue
        messages = [SYSTEM, *messages]
        documents = check(tokenizer, kind, {"messages": messages}, messages)
        assert len(documents) == (1 if kind.is_stable else count)


@pytest.mark.parametrize("name", KINDS)
def test_turn_end(name, tokenizers):
    assert turn_end(STYLE, tokenizers[name]) == KINDS[name].end


@pytest.mark.parametrize("name", KINDS)
def test_layouts(name, tokenizers):
    """The same conversation in every layout gives what transformers makes of its messages."""
    kind, tokenizer = KINDS[name], tokenizers[name]
    messages = turns(2)
    speakers = {"user": "human", "assistant": "gpt"}
    share = [{"from": speakers[m["role"]], "value": m["content"]} for m in messages]
    parts = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in messages]
    columns = {key: [m[key] for m in messages] for key in ("role", "content")}
    weights = [m | {"weight": None, "name": None} for m in messages]
    for row in ({"conversations": share}, {"messages": parts}, {"messages": columns},
                {"conversations": messages}, {"messages": weights}):  # fmt: skip
        check(tokenizer, kind, row, messages)
    check(tokenizer, kind, {"prompt": messages[:3], "completion": messages[3:]}, messages,
          learned=[3])  # fmt: skip
    masked = [m | {"weight": 0} if n == 1 else m for n, m in enumerate(messages)]
    check(tokenizer, kind, {"messages": masked}, messages, learned=[3])
    check(tokenizer, kind, {"messages": [*messages, user("And?")]}, messages)


@pytest.mark.parametrize("name", KINDS)
def test_ids(name, tokenizers):
    """The text of a document is tokenised as the template's own rendering."""
    tokenizer, messages = tokenizers[name], turns(3)
    document = write(read_row({"messages": messages}, "chat"), STYLE, tokenizer)[-1]
    prompt = "".join(segment.text for segment in document.segments[:-1])
    ids = tokenizer(prompt, add_special_tokens=False).input_ids
    whole = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True)
    assert ids == whole["input_ids"]


@pytest.mark.parametrize("name", KINDS)
def test_random_conversations(name, tokenizers):
    kind, tokenizer = KINDS[name], tokenizers[name]
    draw = random.Random(f"seed {name}")
    texts = [
        "a",
        " b\n",
        "Answer",
        "user",
        "assistant",
        "end",
        "1 + 1 = 2",
        "é ü",
        "<b>x</b>",
        "  ",
    ]
    texts += [kind.end or "[end]", "<|user|>", "<|endoftext|>", "\n### assistant:\n", "text " * 9]
    for _ in range(25):
        messages = []
        for _ in range(draw.choice((1, 2, 3, 6, 9))):
            content = "".join(draw.choices(texts, k=2)) + draw.choice(("x", "y "))
            messages += [user("".join(draw.choices(texts, k=3)) + "?"), answer(content)]
        if kind.has_system and draw.random() < 0.5:
            messages = [SYSTEM, *messages]
        learned = [n for n, m in enumerate(messages) if m["role"] == "assistant"]
        conversation = read_row({"messages": messages}, "chat")
        documents = write(conversation, STYLE, tokenizer)
        kept = write(conversation, STYLE._replace(special_tokens="keep"), tokenizer)
        found = before_answers(documents)
        assert before_answers(kept) == found
        prompts = [rendered(tokenizer, messages[:n], answering=True) for n in learned]
        assert list(found) == prompts
        for place, prompt in zip(learned, prompts, strict=True):
            assert messages[place]["content"].strip() in found[prompt]
            full = rendered(tokenizer, messages[: place + 1])
            if full.startswith(prompt):
                assert full.startswith(prompt + found[prompt])
                assert not full[len(prompt + found[prompt]) :].strip()


# ------------------------------------------------------------------------- clock, guards, refusals


def test_the_clock_stands_still(tokenizers, monkeypatch):
    tokenizer, row = tokenizers["llama3.2"], {"messages": turns(2)}
    assert reads_clock(tokenizer) and not reads_clock(tokenizers["llama3"])
    texts = set()
    for moment in (datetime.datetime(2026, 1, 2), datetime.datetime(2031, 11, 12)):
        set_clock(monkeypatch, moment)
        (document,) = write(read_row(row, "chat"), STYLE, tokenizer)
        texts.add(plain_text(document.segments))
    set_clock(monkeypatch, datetime.datetime.fromisoformat(DATE))
    assert texts == {rendered(tokenizer, row["messages"])} and "04 Mar 2025" in texts.pop()


def test_every_way_to_write_a_date(load):
    """Also in named templates, in macros, and where the template begins with blanks."""
    directives = ("%Y-%m-%d", "%A %B %-d", "%% %y%%d %H:%M:%S", "%j %U %p", "%d %b %Y", "100%%")
    written = "|".join(f"{{{{ strftime_now('{each}') }}}}" for each in directives)
    written = f"\n  {{% macro day() %}}{written}{{% endmacro %}} {{{{ day() }}}}\n{LLAMA3_2}"
    for template in (written, {"default": "x", "tool_use": written}, {"default": written}):
        tokenizer = load(template)
        tools = TOOLS if isinstance(template, dict) and "tool_use" in template else None
        conversation = Conversation((user("a"),), (False,), tuple(tools) if tools else None)
        expected = rendered(tokenizer, [user("a")], answering=True, tools=tools)
        try:
            assert plain_text(write_prompt(conversation, STYLE, tokenizer)) == expected
        except BadRow as error:  # this template writes no tools; its date is looked at below
            assert tools and "writes no tools" in str(error)


@pytest.mark.parametrize("name", KINDS)
def test_control_tokens_in_the_text_of_users(name, tokenizers):
    """After rendering, every control token that is not guarded is the template's."""
    kind, tokenizer = KINDS[name], tokenizers[name]
    evil = f"x{kind.end or '<|endoftext|>'}y<|user|>z<|padding|>"
    for count in (1, 6):
        messages = [user(f"{evil} 1"), answer(f"{evil} 2.")] * count
        good = [user("u"), answer("a")] * count
        for row in (messages, [SYSTEM | {"content": evil}, *messages]):
            if row[0] is not messages[0] and not kind.has_system:
                continue
            benign = [{"role": "system", "content": "s"}, *good] if len(row) % 2 else good
            documents = write(read_row({"messages": row}, "chat"), STYLE, tokenizer)
            plain = write(read_row({"messages": benign}, "chat"), STYLE, tokenizer)
            assert _controls(documents, tokenizer) == _controls(plain, tokenizer)
            last = plain_text(documents[-1].segments)
            assert rendered(tokenizer, row[:-1], answering=True) in last
            kept = write(read_row({"messages": row}, "chat"), STYLE._replace(special_tokens="keep"),
                         tokenizer)  # fmt: skip
            assert plain_text(kept[-1].segments) == last
            assert _controls(kept, tokenizer) != _controls(documents, tokenizer)


def _controls(documents, tokenizer) -> list[list[str]]:
    pattern = control_pattern(tokenizer)
    return [pattern.findall("".join(s.text for s in each.segments)) for each in documents]


def test_control_tokens_in_tools(tokenizers):
    tokenizer = tokenizers["qwen3"]
    evil = "<|im_end|>"
    tools = [{"function": {"name": f"f{evil}", "description": evil, "parameters": {evil: [evil]}}}]
    call = {"function": {"name": f"f{evil}", "arguments": {evil: evil}}}
    text_call = {"function": {"name": f"f{evil}", "arguments": f'{{"{evil}": "{evil}"}}'}}
    for each in (call, text_call):
        messages = [user("a"), answer("b", tool_calls=[each], reasoning_content=evil)]
        row = {"messages": messages, "tools": tools}
        (document,) = write(read_row(row, "chat"), STYLE, tokenizer)
        ends = "".join(segment.text for segment in document.segments).count(evil)
        assert ends == 3 and document.is_ended  # of the three turns
        messages = [messages[0], messages[1] | {"tool_calls": [call]}]
        expected = rendered(tokenizer, messages, tools=tools).rstrip("\n")
        assert plain_text(document.segments) == expected


def test_refusals_are_bad_rows(load, tokenizers):
    """So that data.bad_rows=skip passes them over; what no row can change is a UserError."""
    conversation = read_row({"messages": turns(1)}, "chat")
    asked = conversation._replace(messages=conversation.messages[:1])
    for template, why in ((REFUSING, "no chat with this model"), ("{{ 1 / 0 }}", "ZeroDivision"),
                          ("{{ 'a' + 1 }}", "TypeError")):  # fmt: skip
        tokenizer = load(template)
        for attempt in (lambda: write(conversation, STYLE, tokenizer),  # noqa: B023
                        lambda: write_prompt(asked, STYLE, tokenizer)):  # noqa: B023  # fmt: skip
            with pytest.raises(BadRow, match=f"refuses the messages: {why}"):
                attempt()
        assert turn_end(STYLE, tokenizer) is None and opens_thinking(STYLE, tokenizer) == ""
    for name, messages in (("gemma", [SYSTEM, *turns(1)]), ("mistral", [user("a"), *turns(1)])):
        with pytest.raises(BadRow, match="refuses the messages"):
            write(read_row({"messages": messages}, "chat"), STYLE, tokenizers[name])
    with pytest.raises(UserError, match="chat template is not valid Jinja"):
        write(conversation, STYLE, load("{% if %}"))
    with pytest.raises(UserError, match="none named default"):
        write(conversation, STYLE, load({"tool_use": QWEN2}))


def test_a_template_that_refuses_to_end_with_an_answer_still_writes_prompts(load):
    refusing = "{% if messages[-1].role == 'assistant' %}{{ raise_exception('no') }}{% endif %}"
    tokenizer = load(refusing + QWEN2)
    conversation = Conversation((SYSTEM, user("a")), (False, False))
    expected = rendered(tokenizer, [SYSTEM, user("a")], answering=True)
    assert plain_text(write_prompt(conversation, STYLE, tokenizer)) == expected


# ------------------------------------------------------------------------------------------- cost


@pytest.mark.parametrize("name", ["qwen2", "llama3", "plain text"])
def test_cost_is_linear_in_turns(name, tokenizers, monkeypatch):
    """Counted in messages that are rendered."""
    tokenizer, rendered_messages = tokenizers[name], []
    apply = tokenizer.apply_chat_template

    def counting(messages, **options):
        rendered_messages.append(len(messages))
        return apply(messages, **options)

    monkeypatch.setattr(tokenizer, "apply_chat_template", counting)
    costs = []
    for count in (100, 200, 400):
        rendered_messages.clear()
        row = {"messages": turns(count)}
        (document,) = write(read_row(row, "chat"), STYLE, tokenizer)
        assert plain_text(document.segments) == apply(row["messages"], tokenize=False).rstrip()
        assert sum(segment.is_response for segment in document.segments) == count
        costs.append(sum(rendered_messages) / (2 * count))
    assert max(costs) < 12


def test_a_text_that_looks_like_a_generation_prompt_is_not_taken_for_one(tokenizers):
    """In templates of ordinary text nothing guards it."""
    messages = turns(6)
    messages[4] = user("### assistant:\nNo answer\n[end]\n\n### assistant:\n")
    check(tokenizers["plain text"], KINDS["plain text"], {"messages": messages}, messages)


def test_a_turn_that_is_written_otherwise_in_the_middle_is_found(load):
    """One of many answers is rewritten later: its text is still the one of a last answer."""
    shown = "(m.content if loop.last else m.content.split('#')[-1])"
    template = QWEN2.replace("m.content", shown)
    tokenizer, kind = load(template, KINDS["qwen2"].tokens), KINDS["qwen2"]
    messages = turns(9)
    messages[13] = answer("a note # the answer")
    documents = check(tokenizer, kind, {"messages": messages}, messages)
    assert len(documents) == 9
    assert documents[6].segments[-1].text == "a note # the answer<|im_end|>"
