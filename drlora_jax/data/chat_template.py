"""Renders conversations with a tokenizer's own chat template, as transformers does.

Unlike plain `apply_chat_template`, control tokens in the user's text are guarded, the clock is
fixed, and any exception of the template makes the row a bad row.
"""

import copy
import datetime
import functools
import itertools
import json
import re
import weakref
from typing import NamedTuple

from drlora_jax.data.messages import parsed
from drlora_jax.data.segments import GUARD, BadRow, control_pattern, guard
from drlora_jax.errors import UserError
from drlora_jax.system.imports import load_package

SENTINEL = "7Qz4answer4zQ7"  # stands for an answer where the template is probed
_PROBES = (
    [{"role": "user", "content": "a"}],
    [{"role": "system", "content": "b"}, {"role": "user", "content": "a"}],
)
_DIRECTIVE = re.compile(r"%[-_^#0]?[A-Za-z%]")  # of strftime
_NO_TOKEN = re.compile(r"'(\w+_token)' is undefined")  # Jinja's message
_CLOCK = re.compile(r"\bstrftime_now\b")
_REASONING_MARK = re.compile(r"[<\[]/?[\w:|-]*(?:think|thought|reason)[\w:|-]*[>\]]", re.I)
_OPENING_MARK = re.compile(r"\s*(?:<([\w:|-]+)>|\[([\w:|-]+)\])\s*")


class Chat(NamedTuple):
    """A conversation that is ready for rendering."""

    tokenizer: object
    messages: list[dict]
    tools: list[dict] | None
    template: str  # its text, with a fixed clock
    is_guarded: bool


class TurnEnd(NamedTuple):
    """The text that a template puts behind an answer."""

    token: str | None  # the first control token
    text: str


class Opening(NamedTuple):
    """Where the generation prompt and an answer meet."""

    mark: str  # opened by the prompt, and no plain answer begins with it, such as <think>
    words: str  # the start of an answer without reasoning, such as the end of that block


def open_chat(conversation, tokenizer, *, special_tokens: str, date: str | None) -> Chat:
    """Prepares a conversation: guards the user's text, and stores reasoning under every name that
    templates read.
    """
    is_guarded = special_tokens == "split"
    template = _template(tokenizer, conversation.tools, date)
    marks = _reasoning_marks(tokenizer, template) if is_guarded else ()
    messages = []
    for message in conversation.messages:
        if is_guarded:
            kept = marks if message["role"] == "assistant" else ()
            message = _guarded(message, tokenizer) | _guarded_content(message, tokenizer, kept)
        if "reasoning_content" in message:  # gpt-oss reads it as `thinking`
            message = message | {"thinking": message["reasoning_content"]}
        messages.append(message)
    tools = list(conversation.tools) if conversation.tools else None
    if is_guarded:
        tools = _guarded(tools, tokenizer)
    return Chat(tokenizer, messages, tools, template, is_guarded)


def _guarded(value, tokenizer):
    if isinstance(value, str):
        return guard(value, tokenizer)
    if isinstance(value, dict):
        return {_guarded(k, tokenizer): _guarded(v, tokenizer) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_guarded(each, tokenizer) for each in value]
    return value


def _guarded_content(message: dict, tokenizer, marks: tuple[str, ...]) -> dict:
    """Returns an answer's guarded content; reasoning marks that the template itself writes stay
    readable.
    """
    if not marks or "content" not in message:
        return {}
    pieces = re.split(f"({'|'.join(map(re.escape, marks))})", message["content"])
    kept = (piece if piece in marks else guard(piece, tokenizer) for piece in pieces)
    return {"content": "".join(kept)}


def template_texts(tokenizer) -> list[str]:
    """Returns the chat templates; there are several where they have names."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):
        return list(template.values())
    return [template] if template else []


def check_texts(tokenizer) -> None:
    """Refuses a chat template that is not text."""
    for template in template_texts(tokenizer):
        if not isinstance(template, str):
            raise UserError(
                "chat_template of tokenizer_config.json must be a string, or a list of objects "
                f"with name and template, got {type(template).__name__}; correct it, or set "
                "data.template=chatml or tulu."
            )


def reads_clock(tokenizer) -> bool:
    """Returns whether the rendering depends on the date."""
    return any(map(_CLOCK.search, template_texts(tokenizer)))


def check_chance(chat: Chat) -> None:
    """Refuses a template that picks words at random: later prompts could not match those of
    training.
    """
    if _uses_chance(chat.template):
        raise UserError(
            "the tokenizer's chat template writes different text each time it is used (the Jinja "
            "filter random), so the prompts of training and generation would differ; remove the "
            "filter from the template, or set data.template=chatml or tulu."
        )


@functools.cache
def _uses_chance(template: str) -> bool:
    if "random" not in template:  # true of nearly all
        return False
    jinja2 = load_package("jinja2", "The tokenizer's chat template")
    try:  # lexed, so that neither text nor comments count
        tokens = [each[1:] for each in jinja2.Environment().lex(template)]
    except jinja2.TemplateSyntaxError:
        return False  # rendering reports it
    tokens = [each for each in tokens if each[0] != "whitespace"]
    return (("operator", "|"), ("name", "random")) in itertools.pairwise(tokens)


# ------------------------------------------------------------------------------------------- render


def render_chat(chat: Chat, messages: list[dict], *, answering: bool) -> str:
    """Renders messages of a chat; with `answering`, the generation prompt follows them.

    Arguments of tool calls are passed as objects, as transformers requires, or as JSON text if the
    template concatenates them; a call without content gets an empty one if the template needs it.
    """
    objects = [_with_arguments(message, as_text=False) for message in messages]
    arguments = [found for message in objects for found in _arguments_of(message)]
    if not arguments:
        return _apply(chat, objects, answering)
    texts = [_with_arguments(message, as_text=True) for message in messages]
    ways = [objects, texts, *([{"content": ""} | m for m in way] for way in (objects, texts))]
    refusal = None
    for way in ways:
        try:
            text = _apply(chat, way, answering)
        except BadRow as error:
            # With content given, the reason cannot be that content is missing.
            refusal = error if way is ways[2] else refusal or error
            continue
        # Text with Python's repr of an object shows that the template concatenates arguments.
        if way is texts or not any(each and str(each) in text for each in arguments):
            return text
    raise refusal or BadRow("tool call", "the chat template writes no JSON for tool calls")


def _arguments_of(message: dict) -> list:
    calls = message.get("tool_calls", ())
    return [call.get("function", call)["arguments"] for call in calls]


def _with_arguments(message: dict, *, as_text: bool) -> dict:
    """Returns a message with tool-call arguments as objects, or as JSON text for templates that
    concatenate them.
    """
    if "tool_calls" not in message:
        return message
    message = copy.deepcopy(message)
    for call in message["tool_calls"]:
        function = call.get("function", call)
        held = function["arguments"]
        if as_text and not isinstance(held, str):
            function["arguments"] = json.dumps(held, ensure_ascii=False)
        elif not as_text:
            function["arguments"] = parsed(held) or {}
    return message


def _apply(chat: Chat, messages: list[dict], answering: bool) -> str:
    jinja2 = load_package("jinja2", "The tokenizer's chat template")
    try:
        text = chat.tokenizer.apply_chat_template(
            messages,
            tools=chat.tools,
            tokenize=False,
            add_generation_prompt=answering,
            chat_template=chat.template,
        )
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"the tokenizer's chat template is not valid Jinja: {error} (line {error.lineno}); fix "
            "it, or set data.template=chatml or tulu."
        ) from error
    except Exception as error:  # a template is a program in a sandbox: it may raise anything
        kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
        needed = _NO_TOKEN.search(str(error))
        what, way = f"refuses the messages: {kind}{error}", "fix them"
        if needed:
            what = f"needs {needed[1]}, which the tokenizer does not have"
            way = f"set {needed[1]} in tokenizer_config.json"
        raise BadRow(
            "refused by the chat template",
            f"the tokenizer's chat template {what}; {way}, or {_other_template(chat, messages)}",
        ) from error
    # `tojson(ensure_ascii=true)` writes the guard as an escape.
    return text.replace(json.dumps(GUARD)[1:-1], GUARD) if chat.is_guarded else text


def _other_template(chat: Chat, messages: list[dict]) -> str:
    """Returns advice on what else writes such a row: the bundled templates write no tools and no
    reasoning.
    """
    keys = {key for message in messages for key in message}
    if chat.tools or keys & {"tool_calls", "reasoning_content"}:
        return "use a chat template that writes them"
    return "set data.template=chatml or tulu"


def _template(tokenizer, tools, date: str | None) -> str:
    """Returns the text of the template that transformers would choose, with the clock set to the
    date.
    """
    named = tokenizer.chat_template
    if isinstance(named, dict) and "default" not in named and not (tools and "tool_use" in named):
        raise UserError(
            f"the tokenizer has the chat templates {', '.join(named)}, but none named default; "
            "rename one to default, or set data.template=chatml or tulu."
        )
    template = tokenizer.get_chat_template(None, list(tools) if tools else None)
    if date is None or not _CLOCK.search(template):
        return template
    # Not passed as an argument of the rendering: transformers converts function arguments to text.
    return _fixed_clock(date, tuple(sorted(set(_DIRECTIVE.findall(template))))) + template


@functools.cache
def _fixed_clock(date: str, directives: tuple[str, ...]) -> str:
    """Returns a Jinja macro that replaces transformers' strftime_now by midnight of a date."""
    day = datetime.datetime.combine(datetime.date.fromisoformat(date), datetime.time())
    values = {"%%": "\ufdd1"} | {each: day.strftime(each) for each in directives if each != "%%"}
    values["\ufdd1"] = "%"
    replaced = "".join(f" | replace({json.dumps(a)}, {json.dumps(b)})" for a, b in values.items())
    # `trim_blocks` removes this line break behind the block.
    return f"{{% macro strftime_now(format) %}}{{{{ format{replaced} }}}}{{% endmacro %}}\n"


# ------------------------------------------------------------------------------------------- probes

_found: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _once(function):
    """Caches what was found out about a tokenizer's template."""

    @functools.wraps(function)
    def remembered(chat: Chat):
        known = _found.setdefault(chat.tokenizer, {})
        key = (function.__name__, chat.template)
        if key not in known:
            known[key] = function(chat)
        return known[key]

    return remembered


def _reasoning_marks(tokenizer, text: str) -> tuple[str, ...]:
    """Returns control tokens such as <think> and </think>, if the template's text has one of the
    two.
    """
    tokens = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return tuple(
        token
        for token in filter(_REASONING_MARK.fullmatch, tokens)
        if any(each in text for each in (token, token.replace("/", ""), f"{token[0]}/{token[1:]}"))
    )


class _Probe(NamedTuple):
    """A small conversation as the template writes it, with and without the answer SENTINEL."""

    chat: Chat
    prompt: str
    answered: str


def _probe(chat: Chat) -> _Probe | None:
    """Returns the first probe that the template accepts; None if it refuses all."""
    for messages in _PROBES:
        chat = chat._replace(messages=messages, tools=None)
        answer = {"role": "assistant", "content": SENTINEL}
        try:
            prompt = render_chat(chat, messages, answering=True)
            answered = render_chat(chat, [*messages, answer], answering=False)
        except BadRow:
            continue
        if SENTINEL in answered:
            return _Probe(chat, prompt, answered)
    return None


@_once
def turn_end(chat: Chat) -> TurnEnd:
    """Returns the text that the template puts behind an answer, found with a small conversation."""
    probe = _probe(chat)
    behind = probe.answered.rpartition(SENTINEL)[2] if probe else ""
    token = control_pattern(chat.tokenizer).search(behind)
    return TurnEnd(token[0] if token else None, behind)


@_once
def opening(chat: Chat) -> Opening:
    """Returns where the template's generation prompt ends and its answers begin."""
    probe = _probe(chat)
    if probe is None:
        return Opening("", "")
    prompt, answered = probe.prompt, probe.answered
    if answered.startswith(prompt):
        return Opening("", answered[len(prompt) : answered.index(SENTINEL)])
    same = next(n for n, (a, b) in enumerate(zip(prompt, answered, strict=False)) if a != b)
    return Opening(prompt[same:], _closing(probe, prompt[same:]))


def _closing(probe: _Probe, opened: str) -> str:
    """Returns the text that closes the reasoning block opened by a generation prompt; "" if none
    was opened.
    """
    mark = _OPENING_MARK.fullmatch(opened)
    reasoning = SENTINEL[::-1]
    answers = [{"content": SENTINEL, "reasoning_content": reasoning, "thinking": reasoning}]
    closing = ""
    if mark:
        closed = f"</{mark[1]}>" if mark[1] else f"[/{mark[2]}]"
        closing = f"\n{closed}\n\n"
        answers.append({"content": f"{mark[0].strip()}\n{reasoning}{closing}{SENTINEL}"})
    for answer in answers:  # the template's own way, if it has one
        messages = [*probe.chat.messages, {"role": "assistant"} | answer]
        try:
            text = render_chat(probe.chat, messages, answering=False)
        except BadRow:
            continue
        if text.startswith(probe.prompt + reasoning) and SENTINEL in text:
            return text[len(probe.prompt) + len(reasoning) : text.index(SENTINEL)]
    return closing
