"""Our templates, and the choice of one: exact texts, borders of responses, and what is refused."""

import random

import jinja2
import pytest
import tokenizers
import transformers

from drlora_jax.data.layouts import Conversation, read_row
from drlora_jax.data.segments import GUARD, BadRow, plain_text
from drlora_jax.data.templates import (
    CHAT_TEMPLATES,
    PROMPT_TEMPLATES,
    Style,
    choose_template,
    opens_thinking,
    turn_end,
    unwritten,
    write,
    write_prompt,
)
from drlora_jax.errors import UserError

OWN = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
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
    (document,) = write(read_row(fields, row_format), Style(template), tokenizer)
    return _marked(document.segments)


@pytest.mark.parametrize("use", ["['a', 'b'] | random", "(range(9)|list)|\n random()"])
def test_a_chat_template_that_draws_its_words_is_refused(use):
    conversation = read_row({"messages": CHAT}, "chat")
    tokenizer = make_tokenizer(chat_template=f"{{{{ {use} }}}}" + OWN)
    with pytest.raises(
        UserError, match="writes different text each time .*the Jinja filter random"
    ):
        write(conversation, Style("tokenizer"), tokenizer)
    assert write_prompt(conversation._replace(messages=tuple(CHAT[:2])), Style("chatml"), tokenizer)
    harmless = f"{{# {use} #}}| random{{{{ 'a | random' }}}}"
    assert write(conversation, Style("tokenizer"), make_tokenizer(chat_template=harmless + OWN))


@pytest.mark.parametrize("use", ["{{ bos_token }}", "{{ bos_token ~ '' }}", "{{ bos_token + '' }}"])
def test_a_chat_template_with_a_token_that_is_not_there(use):
    """As transformers: nothing where it is written, and refused where it is computed with."""
    tokenizer = make_tokenizer(chat_template=use + OWN.removeprefix("{{ bos_token }}"))
    tokenizer.bos_token = None
    conversation = read_row({"messages": CHAT}, "chat")
    if "+" in use:
        with pytest.raises(jinja2.UndefinedError):
            tokenizer.apply_chat_template(CHAT, tokenize=False)
        way = "needs bos_token, which the tokenizer does not have; set bos_token in tokenizer_con"
        with pytest.raises(BadRow, match=way):
            write(conversation, Style("tokenizer"), tokenizer)
        return
    (document,) = write(conversation, Style("tokenizer"), tokenizer)
    expected = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert plain_text(document.segments) == expected.rstrip("\n")


@pytest.mark.parametrize("tools", [None, [{"name": "f"}]])
def test_refused_tools_name_the_reason_and_a_way_that_is_one(tools):
    """Not that a content is missing, and not our templates, which write no tools either."""
    own = "{% for m in messages %}{{ m.content + '\n' }}{% if m.role == 'tool' %}"
    own += "{{ raise_exception('no tools here') }}{% endif %}{% endfor %}"
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    result = {"role": "tool", "content": "4"}
    turns = [*CHAT[:2], call, result, CHAT[-1]] if tools is None else [*CHAT[:2], result, CHAT[-1]]
    conversation = read_row({"messages": turns, "tools": tools}, "chat")
    way = "refuses the messages: no tools here; fix them, or use a chat template that writes them"
    with pytest.raises(BadRow, match=way):
        write(conversation, Style("tokenizer"), make_tokenizer(chat_template=own))


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


def test_system_texts_of_pairs():
    """Before the whole prompt, with an empty line between; a turn of its own in chat templates."""
    row = PAIR | {"system": "S"}
    assert _render(row, "prompt_response", "plain") == "S\n\nP\n{R}"
    qa = "S\n\nQuestion: P\nAnswer:{ R}"
    assert _render(row, "prompt_response", "question_answer") == qa
    alpaca = {"instruction": "I", "output": "R", "system": "S"}
    assert _render(alpaca, "alpaca", "alpaca").startswith(f"S\n\n{ALPACA_PREAMBLE}")
    tulu = "<|system|>\nS\n<|user|>\nI\n<|assistant|>\n{R</s>}"
    assert _render(alpaca, "alpaca", "tulu") == tulu


def test_earlier_turns_of_alpaca_rows():
    row = {"instruction": "I", "input": "X", "output": "R", "history": [["a", "b"]]}
    tulu = "<|user|>\na\n<|assistant|>\n{b</s>}\n<|user|>\nI\nX\n<|assistant|>\n{R</s>}"
    assert _render(row, "alpaca", "tulu") == tulu
    for template in PROMPT_TEMPLATES:
        with pytest.raises(BadRow, match="one prompt and one response, got the turns user, assist"):
            _render(row, "alpaca", template)


def test_turns_in_any_order():
    turns = ["developer", "user", "user", "assistant", "tool", "assistant", "system", "assistant"]
    messages = [{"role": role, "content": f"{n}"} for n, role in enumerate(turns)]
    messages[5]["weight"] = 0
    text = "<|im_start|>developer\n0<|im_end|>\n<|im_start|>user\n1<|im_end|>\n"
    text += "<|im_start|>user\n2<|im_end|>\n<|im_start|>assistant\n{3<|im_end|>}\n"
    text += "<|im_start|>tool\n4<|im_end|>\n<|im_start|>assistant\n5<|im_end|>\n"
    text += "<|im_start|>system\n6<|im_end|>\n<|im_start|>assistant\n{7<|im_end|>}"
    assert _render({"messages": messages}, "chat", "chatml") == text


@pytest.mark.parametrize("template", [*PROMPT_TEMPLATES, *CHAT_TEMPLATES])
@pytest.mark.parametrize("special_tokens", ["split", "keep"])
def test_prompt_is_what_stands_before_each_answer(template, special_tokens):
    tokenizer, style = make_tokenizer(chat_template=OWN), Style(template, special_tokens)
    draw = random.Random(template)
    texts = ["a", "é ", "\n", "</s>", "<|im_end|>", "Answer:", " x"]
    for _ in range(40):
        turns = 1 if template in PROMPT_TEMPLATES else draw.randint(1, 4)
        roles = ["system"] * draw.randint(0, 1) + ["user", "assistant"] * turns
        messages = tuple({"role": r, "content": "".join(draw.choices(texts, k=3))} for r in roles)
        is_learned = tuple(role == "assistant" for role in roles)
        extra = draw.choice(("", "input </s>")) if turns == 1 else ""
        (document,) = write(Conversation(messages, is_learned, None, extra), style, tokenizer)
        answers = [n for n, is_one in enumerate(is_learned) if is_one]
        borders = [n for n, segment in enumerate(document.segments) if segment.is_response]
        assert len(answers) == len(borders)
        for place, border in zip(answers, borders, strict=True):
            asked = Conversation(messages[:place], is_learned[:place], None, extra)
            prompt = write_prompt(asked, style, tokenizer)
            before = "".join(segment.text for segment in document.segments[:border])
            assert "".join(segment.text for segment in prompt) == before
            assert not any(segment.is_response for segment in prompt)


def test_control_tokens_in_the_text_of_users_are_guarded():
    row = {"prompt": "P</s>", "response": "R</s>", "system": "<s>S"}
    tokenizer, conversation = make_tokenizer(), read_row(row, "prompt_response")
    for template in (*PROMPT_TEMPLATES, "chatml", "tulu"):
        (split,) = write(conversation, Style(template, "split"), tokenizer)
        (keep,) = write(conversation, Style(template, "keep"), tokenizer)
        text = "".join(segment.text for segment in split.segments)
        assert text.count("</s>") == (template == "tulu") and text.count(GUARD) == 3
        assert plain_text(split.segments) == "".join(segment.text for segment in keep.segments)


def test_ends_of_turns():
    bare, im = make_tokenizer(), make_tokenizer(additional_special_tokens=["<|im_end|>"])
    conversation = read_row(PAIR, "prompt_response")
    for template, tokenizer, end in (
        ("plain", bare, None),
        ("alpaca", im, None),
        ("tulu", bare, "</s>"),
        ("chatml", bare, None),  # ordinary text there, so that the end of text follows
        ("chatml", im, "<|im_end|>"),
    ):
        assert turn_end(Style(template), tokenizer) == end
        assert opens_thinking(Style(template), tokenizer) == ""
        (document,) = write(conversation, Style(template), tokenizer)
        assert document.is_ended == (end is not None)
        assert document.segments[-1].text.endswith(end or "")


def test_keys_that_our_templates_pass_over_are_named():
    row = {"messages": [USER | {"name": "Ann"}, {"role": "assistant", "content": "b"}]}
    conversation = read_row(row, "chat")
    assert unwritten(conversation, Style("tulu"), make_tokenizer()) == ("messages[].name",)


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
        ("tokenizer", "chat", "the tokenizer has none; use chatml or tulu"),
        ("tulu", "text", "template=tulu does not apply to data.format=text"),
        ("plain", "chat", "template=plain writes one prompt .* data.format=chat has messages"),
    ],
)
def test_templates_refused(template, row_format, message):
    with pytest.raises(UserError, match=message):
        choose_template(template, row_format, make_tokenizer())


CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}
USER = {"role": "user", "content": "a"}


@pytest.mark.parametrize("template", ["chatml", "tulu", "plain", "alpaca"])
@pytest.mark.parametrize(
    ("more", "tools", "message"),
    [
        ({"tool_calls": [CALL]}, None, "writes no tool_calls; set data.template=tokenizer"),
        ({"thinking": "hm"}, None, "writes no reasoning_content; set"),
        ({}, [{"name": "f"}], "writes no tools; set"),
        ({"tool_calls": [CALL]}, [{"name": "f"}], "writes no tools and no tool_calls; set"),
    ],
)
def test_what_our_templates_do_not_write_is_refused(template, more, tools, message):
    answer = {"role": "assistant", "content": "b"} | more
    conversation = read_row({"messages": [USER, answer], "tools": tools}, "chat")
    with pytest.raises(BadRow, match=message):
        write(conversation, Style(template), make_tokenizer())


def test_unknown_roles_are_refused():
    messages = [{"role": "narrator", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(BadRow, match="message 1 has the role 'narrator'; data.template=tulu"):
        _render({"messages": messages}, "chat", "tulu")


def test_prompts_without_messages_are_refused():
    with pytest.raises(BadRow, match="no messages"):
        write_prompt(Conversation((), ()), Style("tulu"), make_tokenizer())
