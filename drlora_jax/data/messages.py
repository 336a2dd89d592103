"""Converts a turn of a conversation from the layouts of rows to the one of chat templates.

Turns have role and content, or ShareGPT's from and value; they may have text parts, tool calls
(also as JSON text), reasoning under several names, and marks whether a turn is to be learned.
"""

import json
from typing import NamedTuple

from drlora_jax.data.segments import BadRow

_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "chatgpt": "assistant",
    "system": "system",
}
# For from/value only: as roles, these words belong to the chat template.
_SHAREGPT_SPEAKERS = _SPEAKERS | {
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "function_call": "call",
    "tool_call": "call",
}
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")  # transformers' order
_LEARN_KEYS = ("weight", "loss_weight", "train", "training", "trainable", "loss")
_TEXT_PARTS = ("text", "input_text", "output_text")


class Turn(NamedTuple):
    message: dict  # as apply_chat_template takes it
    is_learned: bool
    unread: tuple[str, ...]  # non-empty keys that nothing reads


def read_turn(value, number: int) -> Turn:
    """Reads message `number` of a row; raises BadRow."""
    where = f"message {number}"
    if not isinstance(value, dict):
        raise BadRow("wrong type", f"{where} must be an object, got {type(value).__name__}")
    role_key = _key_of(value, ("role", "from"), where)
    speaker = checked_text(value[role_key], f"the {role_key} of {where}")
    known = _SHAREGPT_SPEAKERS if role_key == "from" else _SPEAKERS
    role = known.get(speaker.strip().lower(), speaker)
    read = {role_key}
    if role == "call":
        content_key = _key_of(value, ("value", "content"), where)
        read.add(content_key)
        message = {"role": "assistant", "tool_calls": _spoken_calls(value[content_key], where)}
    else:
        message = {"role": role} | _body(value, role, where, read)
    is_learned = _is_learned(value, message["role"], where, read)
    if is_learned and not (message.get("content", "").strip() or "tool_calls" in message):
        raise BadRow("empty response", f"{where} (assistant) is empty; fill it in")
    unread = (key for key, held in value.items() if key not in read and not is_empty(held))
    return Turn(message, is_learned, tuple(map(str, unread)))


def _key_of(value: dict, keys: tuple[str, ...], where: str) -> str:
    """Returns the key that holds the role or the content; one of them must not be null."""
    for key in keys:
        if value.get(key) is not None:
            return key
    wanted = "value" if "value" in keys and "role" not in value and "from" in value else ""
    wanted = wanted or next(key for key in keys if key in ("role", "content"))
    got = ", ".join(map(str, value)) or "none"
    reason = "null" if any(key in value for key in keys) else "missing field"
    raise BadRow(
        reason,
        f"{where} needs a {wanted!r}, got the fields {got}; a message has role and content, or "
        "from and value",
    )


def _body(value: dict, role: str, where: str, read: set[str]) -> dict:
    """Reads content, reasoning, tool calls and names of a turn; notes the keys that it has read."""
    body = {}
    calls = _tool_calls(value, where, read) if role == "assistant" else None
    if not calls or any(value.get(key) is not None for key in ("content", "value")):
        key = _key_of(value, ("content", "value"), where)
        read.add(key)
        body["content"] = _content(value[key], f"the content of {where}")
    if role == "assistant":
        reasoning = _reasoning(value, where, read)
        body |= {"reasoning_content": reasoning} if reasoning else {}
        body |= {"tool_calls": calls} if calls else {}
    for key in ("name", "tool_call_id"):
        if not is_empty(value.get(key)):
            read.add(key)
            body[key] = checked_text(value[key], f"the {key} of {where}")
    return body


def _content(value, what: str) -> str:
    """Returns a string, or a list of text parts joined."""
    if not isinstance(value, list) or not value:
        return checked_text(value, what, "a string or a list of text parts")
    texts = []
    for part in value:
        if not isinstance(part, dict):
            got = f"a list of {type(part).__name__}"
            raise BadRow(
                "wrong type", f"{what} must be a string or a list of text parts, got {got}"
            )
        kind = part.get("type") or "text"
        if kind not in _TEXT_PARTS:
            raise BadRow(
                "not text",
                f"{what} has a part of type {kind!r}; only text is read: remove the part",
            )
        texts.append(checked_text(part.get("text"), f"a text part in {what}"))
    return "".join(texts)


def _reasoning(value: dict, where: str, read: set[str]) -> str:
    for key in _REASONING_KEYS:
        if not is_empty(value.get(key)):
            text = checked_text(value[key], f"the {key} of {where}")
            # Copies under transformers' other names are the same text.
            read.update(other for other in _REASONING_KEYS if value.get(other) == text)
            return text
    return ""


def _is_learned(value: dict, role: str, where: str, read: set[str]) -> bool:
    """Reads the marks of a turn; a mark that asks to learn a turn other than an answer stays
    unread.
    """
    is_learned = role == "assistant"
    for key in _LEARN_KEYS:
        mark = value.get(key)
        if mark is None:
            continue
        if not isinstance(mark, bool | int | float) or mark not in (0, 1):
            raise BadRow(
                "weight of a turn",
                f"the {key} of {where} must be 1 (learned) or 0 (not learned), got {mark!r}",
            )
        if role == "assistant" or not mark:
            read.add(key)
        is_learned = is_learned and bool(mark)
    return is_learned


# -------------------------------------------------------------------------------------------- tools


def _tool_calls(value: dict, where: str, read: set[str]) -> list[dict]:
    calls = []
    for key in ("tool_calls", "function_call"):  # the second is OpenAI's older form
        held = parsed(value.get(key))
        read.add(key)
        if is_empty(held):
            continue
        held = [held] if isinstance(held, dict) else held
        if not isinstance(held, list):
            got = type(held).__name__
            raise BadRow("wrong type", f"the {key} of {where} must be a list, got {got}")
        for number, call in enumerate(held, start=1):
            call = {"type": "function", "function": call} if key == "function_call" else call
            calls.append(_tool_call(call, f"tool call {number} of {where}"))
    return calls


def _spoken_calls(value, where: str) -> list[dict]:
    """Reads ShareGPT's function_call turn: a call, or a list of calls, as JSON."""
    held = parsed(value)
    held = held if isinstance(held, list) else [held]
    return [
        _tool_call({"type": "function", "function": call}, f"tool call {number} of {where}")
        for number, call in enumerate(held, start=1)
    ]


def _tool_call(call, what: str) -> dict:
    """Checks a call; arguments stay as they are, an object or JSON text of one."""
    call = parsed(call)
    is_nested = isinstance(call, dict) and call.get("function") is not None
    function = parsed(call["function"]) if is_nested else call
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow("tool call", f"{what} must be an object with name and arguments")
    given = function.get("arguments")
    if not isinstance(parsed(given) or {}, dict):
        raise BadRow("tool call", f"the arguments of {what} must be a JSON object, got {given!r}")
    function = _without_nulls(function) | {"arguments": given or {}}
    call = _without_nulls(call) | {"function": function} if is_nested else function
    checked_tree(call, what)
    return call


def read_tools(value, name: str = "tools") -> tuple[dict, ...] | None:
    """Returns the tools that a row offers: a list of objects, or JSON text of one."""
    if is_empty(value):
        return None
    tools = parsed(value)
    tools = [tools] if isinstance(tools, dict) else tools
    tools = list(map(parsed, tools)) if isinstance(tools, list) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow("tools", f"field {name!r} must be a list of tools, objects with their schema")
    checked_tree(tools, f"field {name!r}")
    return tuple(map(_without_nulls, tools)) or None


def _without_nulls(value: dict) -> dict:
    return {key: held for key, held in value.items() if held is not None}


# ------------------------------------------------------------------------------------------- checks


def checked_text(value, what: str, wanted: str = "a string") -> str:
    if not isinstance(value, str):
        raise BadRow("wrong type", f"{what} must be {wanted}, got {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # "\ud800" is valid JSON, but no tokenizer takes it
        message = f"{what} has half of a surrogate pair at character {error.start}; remove it"
        raise BadRow("invalid text", message) from error
    return value


def checked_tree(value, what: str) -> None:
    """Checks every string in nested lists and objects, keys included."""
    if isinstance(value, str):
        checked_text(value, what)
    elif isinstance(value, dict):
        for key, held in value.items():
            checked_tree(key, what)
            checked_tree(held, what)
    elif isinstance(value, list | tuple):
        for held in value:
            checked_tree(held, what)


def parsed(value):
    """Parses JSON text of a list or an object; returns everything else unchanged."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def is_empty(value) -> bool:
    """Returns whether a value is null, "", [], {} or an object of such values, as Parquet stores
    absent keys.
    """
    if isinstance(value, dict):
        return all(map(is_empty, value.values()))
    return value is None or (isinstance(value, str | list | tuple) and not value)
