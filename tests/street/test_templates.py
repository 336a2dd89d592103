"""Chat templates that we did not shape: what `write` and `write_prompt` make of conversations is
compared with the tokenizer's own `apply_chat_template`, called here.
"""

import copy
import datetime
import json
import random

import pytest
import transformers
from transformers.utils import chat_template_utils

from drlora_jax.data.layouts import Conversation, read_row
from drlora_jax.data.segments import GUARD, BadRow, control_pattern, plain_text
from drlora_jax.data.templates import (
    Style,
    opens_thinking,
    reads_clock,
    turn_end,
    unwritten,
    write,
    write_prompt,
)
from drlora_jax.errors import UserError
from tests.street.chat_templates import (
    KINDS,
    LLAMA3_2,
    NAMED,
    PARTS_ONLY,
    QWEN2,
    QWEN3,
    QWEN3_THINKING,
    REFUSING,
)

MODEL = "drlora_jax/bundled/tiny_moe"
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


@pytest.fixture(scope="module")
def load(request):
    """A tokenizer with the control tokens that a chat template is made for."""
    bundled = transformers.AutoTokenizer.from_pretrained(request.config.rootpath / MODEL)

    def make(template, tokens=()):
        tokenizer = copy.deepcopy(bundled)
        tokenizer.chat_template = template
        tokenizer.bos_token = "<|padding|>"
        if tokens:
            tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
        return tokenizer

    return make


@pytest.fixture(scope="module")
def tokenizers(load):
    return {name: load(kind.template, kind.tokens) for name, kind in KINDS.items()}


@pytest.fixture(autouse=True)
def the_date(monkeypatch):
    """What transformers itself renders has the style's date, too."""
    set_clock(monkeypatch, datetime.datetime.fromisoformat(DATE))


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


# --------------------------------------------------------------------------------------- thinking

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
        with pytest.raises(BadRow, match="not write message 2 behind its own generation prompt"):
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


# ------------------------------------------------------------------------------------------ tools


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
    with pytest.raises(UserError, match="chat template is no valid Jinja"):
        write(conversation, STYLE, load("{% if %}"))
    with pytest.raises(UserError, match="none of them is named default"):
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
