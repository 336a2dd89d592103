"""From a row to text: formats say what the fields mean, templates say how they are written.

A rendering is a list of segments, each marked as response or not; the document's text is their
concatenation. A response begins with the space before its first word ("Answer:" + " 42"): byte-pair
tokenizers join the two, and a token that starts before the border does not count as response. The
end-of-text token is appended by `encode_document`.
"""

import difflib
from typing import NamedTuple

from drlora_jax.data.packages import load_package
from drlora_jax.errors import UserError

PROMPT_TEMPLATES = ("plain", "question_answer", "alpaca")
CHAT_TEMPLATES = ("chatml", "tulu", "tokenizer")
AS_IS = "as is"  # what the formats `text` and `choice` resolve to

_ALPACA = "Below is an instruction that describes a task"
_ALPACA_INPUT = ", paired with an input that provides further context"
_ALPACA_END = ". Write a response that appropriately completes the request.\n\n"


class Segment(NamedTuple):
    text: str
    is_response: bool


class FieldNames(NamedTuple):
    """Which fields of a row to read; the names of the format `alpaca` are fixed."""

    prompt: str = "prompt"
    response: str = "response"
    messages: str = "messages"
    text: str = "text"


DEFAULT_NAMES = FieldNames()


class BadRow(ValueError):
    """A row that cannot be used: a short reason to count by, and a message to act on."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def detect_format(fields: dict, names: FieldNames) -> str:
    """Names the format of a row by the fields it has."""
    if names.messages in fields:
        return "chat"
    if names.prompt in fields and names.response in fields:
        return "prompt_response"
    if "instruction" in fields and "output" in fields:
        return "alpaca"
    if names.text in fields:
        return "text"
    raise UserError(
        f"data.format=auto cannot tell the format of a row with the fields {', '.join(fields)}; "
        f"it looks for {names.messages}, or {names.prompt} and {names.response}, or instruction "
        f"and output, or {names.text}. Set data.prompt_field and data.response_field to your names."
    )


def choose_template(template: str, row_format: str, tokenizer) -> str:
    """Resolves `auto` for a row format, and refuses names and pairs that do not exist."""
    known = (*PROMPT_TEMPLATES, *CHAT_TEMPLATES, "auto")
    if template not in known:
        near = difflib.get_close_matches(template, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}."
        raise UserError(f"data.template={template!r} does not exist; {hint}")
    has_own = bool(getattr(tokenizer, "chat_template", None))
    if template == "tokenizer" and not has_own:
        raise UserError(
            "data.template=tokenizer, but the tokenizer has no chat template; use chatml or tulu."
        )
    if template == "auto":
        chat = "tokenizer" if has_own else "tulu"
        automatic = {"alpaca": "alpaca", "chat": chat, "prompt_response": "plain"}
        return automatic.get(row_format, AS_IS)
    if row_format in ("text", "choice"):
        why = "is taken as it is" if row_format == "text" else "has the prompts of its tasks"
        raise UserError(
            f"data.template={template} does not apply to data.format={row_format}, which {why}; "
            "use data.template=auto."
        )
    if row_format == "chat" and template in PROMPT_TEMPLATES:
        raise UserError(
            f"data.template={template} writes one prompt and one response, data.format=chat has "
            f"messages; use {', '.join(CHAT_TEMPLATES)} or auto."
        )
    return template


def render(
    fields: dict, *, row_format: str, template: str, tokenizer, names: FieldNames = DEFAULT_NAMES
) -> list[Segment]:
    """Writes a row out by a resolved template; raises BadRow if the row lacks what it needs."""
    if row_format == "text":
        return [Segment(_filled(fields, names.text, "empty text"), True)]
    if row_format == "chat":
        return _render_chat(_messages(fields, names.messages), template, tokenizer)
    if row_format == "alpaca":
        instruction, extra = _string(fields, "instruction"), _optional(fields, "input")
        response = _filled(fields, "output", "empty response")
    else:
        instruction, extra = _string(fields, names.prompt), ""
        response = _filled(fields, names.response, "empty response")
    return _render_pair(instruction, extra, response, template, tokenizer)


def render_prompt(prompt: str, *, template: str, tokenizer, extra: str = "") -> str:
    """What stands before the response, for generation: the same text as in training."""
    segments = _render_pair(prompt, extra, "response", template, tokenizer)
    return segments[0].text


def _render_pair(
    instruction: str, extra: str, response: str, template: str, tokenizer
) -> list[Segment]:
    prompt = f"{instruction}\n{extra}" if extra else instruction
    if template == "plain":
        return [Segment(f"{prompt}\n", False), Segment(response, True)]
    if template == "question_answer":
        return [Segment(f"Question: {prompt}\nAnswer:", False), Segment(f" {response}", True)]
    if template == "alpaca":
        return [Segment(_alpaca_prompt(instruction, extra), False), Segment(response, True)]
    messages = [
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": response},
    ]
    return _render_chat(messages, template, tokenizer)


def _alpaca_prompt(instruction: str, extra: str) -> str:
    if extra:
        opening = _ALPACA + _ALPACA_INPUT + _ALPACA_END
        middle = f"### Input:\n{extra}\n\n"
    else:
        opening, middle = _ALPACA + _ALPACA_END, ""
    return f"{opening}### Instruction:\n{instruction}\n\n{middle}### Response:\n"


def _render_chat(messages: list[dict], template: str, tokenizer) -> list[Segment]:
    if template == "tokenizer":
        return _render_own(messages, tokenizer)
    write = _write_chatml if template == "chatml" else _write_tulu
    segments, before = [], ""
    for message in messages:
        opening, closing = write(message["role"], tokenizer)
        content = message["content"]
        if message["role"] != "assistant":
            before += opening + content + closing + "\n"
            continue
        segments += [Segment(before + opening, False), Segment(content + closing, True)]
        before = "\n"  # after the end of an answer: the next turn's, not to be learned
    return segments


def _write_chatml(role: str, tokenizer) -> tuple[str, str]:
    return f"<|im_start|>{role}\n", "<|im_end|>"


def _write_tulu(role: str, tokenizer) -> tuple[str, str]:
    # Every answer ends with the end-of-text token, or the model would not learn to stop early.
    return f"<|{role}|>\n", (tokenizer.eos_token or "") if role == "assistant" else ""


def _render_own(messages: list[dict], tokenizer) -> list[Segment]:
    """The tokenizer's chat template; answers are what each assistant turn adds to the rendering."""
    segments, done = [], ""
    for count, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = _apply(tokenizer, messages[:count], add_generation_prompt=True)
        full = _apply(tokenizer, messages[: count + 1], add_generation_prompt=False)
        if not (prompt.startswith(done) and full.startswith(prompt)):
            raise UserError(
                f"the tokenizer's chat template rewrites earlier turns (message {count + 1}), so "
                "the answers cannot be found in its text; set data.template=chatml or tulu."
            )
        segments.append(Segment(prompt[len(done) :], False))
        answer, rest = _cut_after_end(full[len(prompt) :], tokenizer)
        segments.append(Segment(answer, True))
        if rest and count + 1 < len(messages):
            segments.append(Segment(rest, False))
        done = full
    return segments


def _cut_after_end(answer: str, tokenizer) -> tuple[str, str]:
    """Splits behind the end-of-text token: the newline that templates put there is no answer."""
    end = tokenizer.eos_token
    if not end or end not in answer:
        return answer, ""
    cut = answer.rindex(end) + len(end)
    return answer[:cut], answer[cut:]


def _apply(tokenizer, messages: list[dict], *, add_generation_prompt: bool) -> str:
    jinja2 = load_package("jinja2", "The tokenizer's chat template")
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # a template is a program in a sandbox: it may raise anything
        kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
        raise BadRow(
            "refused by the chat template",
            f"the tokenizer's chat template refuses the messages: {kind}{error}; mend them, or set "
            "data.template=chatml or tulu",
        ) from error


def _value(fields: dict, name: str):
    if name not in fields:
        got = ", ".join(map(str, fields)) or "none"
        raise BadRow("missing field", f"field {name!r} is missing, got the fields {got}; add it")
    if fields[name] is None:
        raise BadRow("null", f"field {name!r} is null; fill it in")
    return fields[name]


def _string(fields: dict, name: str) -> str:
    return _checked_text(_value(fields, name), f"field {name!r}")


def _checked_text(value, what: str) -> str:
    if not isinstance(value, str):
        raise BadRow("wrong type", f"{what} must be a string, got {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # "\ud800" is valid JSON, but no tokenizer takes it
        message = f"{what} has half of a surrogate pair at character {error.start}; remove it"
        raise BadRow("invalid text", message) from error
    return value


def _optional(fields: dict, name: str) -> str:
    return _string(fields, name) if fields.get(name) is not None else ""


def _filled(fields: dict, name: str, reason: str) -> str:
    value = _string(fields, name)
    if not value.strip():
        raise BadRow(reason, f"field {name!r} is empty, got {value!r}; fill it in")
    return value


def _messages(fields: dict, name: str) -> list[dict]:
    value = _value(fields, name)
    if not isinstance(value, list):
        got = type(value).__name__
        raise BadRow("wrong type", f"field {name!r} must be a list of messages, got {got}")
    if not value:
        raise BadRow("empty messages", f"field {name!r} is an empty list; fill it in")
    messages = [_message(message, number) for number, message in enumerate(value, start=1)]
    _check_roles([message["role"] for message in messages])
    return messages


def _message(message, number: int) -> dict:
    """Checks one message and keeps its role and content only."""
    if not isinstance(message, dict):
        got = type(message).__name__
        raise BadRow("wrong type", f"message {number} must be an object, got {got}")
    for key in ("role", "content"):
        if message.get(key) is None:
            got = ", ".join(map(str, message)) or "none"
            reason = "null" if key in message else "missing field"
            raise BadRow(reason, f"message {number} needs a {key!r}, got the fields {got}")
    role = _checked_text(message["role"], f"the role of message {number}")
    content = _checked_text(message["content"], f"the content of message {number}")
    if role == "assistant" and not content.strip():
        raise BadRow("empty response", f"message {number} (assistant) is empty; fill it in")
    return {"role": role, "content": content}


def _check_roles(roles: list[str]) -> None:
    turns = roles[1:] if roles[0] == "system" else roles
    wanted = ["user", "assistant"] * (len(turns) // 2)
    if not turns or turns != wanted:
        raise BadRow(
            "role order",
            "roles must be an optional system, then user and assistant in turn, ending with "
            f"assistant, got {', '.join(roles[:8])}",
        )
