"""Reads a row's fields as a conversation, in any of the supported layouts.

Formats: `chat` (a list of turns, or a prompt and a completion of turns), `prompt_response`,
`alpaca` and `text`. `Conversation.unread` names the fields that nothing reads.
"""

from collections.abc import Sequence
from typing import NamedTuple

from drlora_jax.data.file_readers import lists_of_rows, one_list, several_lists
from drlora_jax.data.messages import (
    Turn,
    checked_text,
    is_empty,
    parsed,
    read_tools,
    read_turn,
)
from drlora_jax.data.segments import BadRow
from drlora_jax.errors import UserError

_SYSTEM_FIELDS = ("system", "system_prompt")
# Pairs of fields that often hold a prompt and its response: suggested in messages, never assumed.
_USUAL_PAIRS = (
    ("question", "answer"),
    ("question", "response"),
    ("instruction", "response"),
    ("instruction", "completion"),
    ("instruction", "answer"),
    ("problem", "solution"),
    ("query", "response"),
    ("query", "answer"),
    ("inputs", "targets"),
    ("input", "output"),
    ("input", "target"),
    ("source", "target"),
    ("prompt", "answer"),
    ("prompt", "solution"),
    ("prompt", "output"),
    ("prompt", "chosen"),
)


class Conversation(NamedTuple):
    """A row as turns."""

    messages: tuple[dict, ...]  # as apply_chat_template takes them
    is_learned: tuple[bool, ...]  # per message; only answers are ever learned
    tools: tuple[dict, ...] | None = None  # as apply_chat_template takes them
    extra: str = ""  # Alpaca's `input`, to the last user turn
    # Row fields ("source") and keys of turns ("messages[].id") that nothing reads, if not empty.
    unread: tuple[str, ...] = ()


class Text(NamedTuple):
    """A row that is used unchanged."""

    text: str
    unread: tuple[str, ...]


class FieldNames(NamedTuple):
    """Which fields of a row to read; the names of the format `alpaca` are fixed."""

    prompt: str = "prompt"
    response: str = "response"
    messages: str = "messages"
    text: str = "text"


DEFAULT_NAMES = FieldNames()
_OTHER_NAMES = {"messages": ("conversations", "conversation"), "response": ("completion",)}


def detect_format(fields: dict, names: FieldNames = DEFAULT_NAMES) -> tuple[str, FieldNames]:
    """Returns a row's format, and the names of the fields it has; raises UserError."""
    found = _resolved(fields, names)
    if isinstance(fields.get(found.messages), list | dict | str):
        return "chat", found
    if found.prompt in fields and found.response in fields:
        has_turns = any(_turns(fields[name]) for name in (found.prompt, found.response))
        return ("chat" if has_turns else "prompt_response"), found
    if "instruction" in fields and "output" in fields:
        return "alpaca", found
    if found.text in fields:
        return "text", found
    if found.messages in fields:
        return "chat", found
    got = ", ".join(map(str, fields)) or "none"
    raise UserError(
        f"data.format=auto cannot detect the format of a row with the fields {got}; it needs "
        f"{names.messages}, or {names.prompt} and {names.response}, or instruction and output, or "
        f"{names.text}. {_sentence(_way_out(fields))}"
    )


def other_settings(fields: dict, names: FieldNames, row_format: str) -> str:
    """Returns which settings would read rows like this one, which lacks a field that the settings
    name; the text continues a sentence.
    """
    try:
        found_format, found = detect_format(fields)
    except UserError:
        return _way_out(fields)
    given, wanted = names._asdict(), found._asdict()
    settings = [] if found_format == row_format else ["data.format=auto"]
    settings += [
        f"data.{kind}_field={name}"
        for kind, name in wanted.items()
        if name in fields and name != given[kind]
    ]
    return f"set {' '.join(settings)} for rows like this one" if settings else ""


def _is_pair(prompt, response) -> bool:
    """Returns whether the values are two texts, or turns and an answer to them."""
    if _turns(prompt):
        return isinstance(response, str) or bool(_turns(response))
    return isinstance(prompt, str) and isinstance(response, str)


def _sentence(clause: str) -> str:
    return f"{clause[:1].upper()}{clause[1:]}."


def _resolved(fields: dict, names: FieldNames) -> FieldNames:
    """Replaces default names that the row lacks by other usual names that it has."""
    for kind, others in _OTHER_NAMES.items():
        name = getattr(names, kind)
        if name == getattr(DEFAULT_NAMES, kind) and fields.get(name) is None:
            there = [other for other in others if fields.get(other) is not None]
            there += [other for other in others if other in fields and name not in fields]
            names = names._replace(**{kind: there[0]}) if there else names
    return names


def _way_out(fields: dict) -> str:
    """Returns the settings that would read such a row, or says what the file is instead."""
    pairs = [pair for pair in _USUAL_PAIRS if _is_pair(*map(fields.get, pair))]
    with_turns = [pair for pair in pairs if _turns(fields[pair[0]])]
    for name, value in fields.items():
        if _turns(parsed(value)) and not with_turns:
            return f"set data.messages_field={name} to read its turns"
    for prompt, response in with_turns or pairs:
        return f"set data.prompt_field={prompt} data.response_field={response} to read these"
    lists = lists_of_rows(fields)
    if lists and sum(isinstance(value, str) for value in fields.values()) < 2:
        return several_lists(lists) if len(lists) > 1 else one_list(lists[0])
    return (
        "set data.prompt_field and data.response_field to the names of two text fields, or "
        "data.messages_field to the name of a list of turns"
    )


def read_row(
    fields: dict, row_format: str, names: FieldNames = DEFAULT_NAMES, *, needs_answer: bool = True
) -> Conversation:
    """Reads a row of the formats chat, prompt_response and alpaca.

    Args:
      fields: the row.
      row_format: from `detect_format` or the config.
      names: the names of its fields.
      needs_answer: False for a prompt, which needs no answer; one at its end is dropped.

    Raises:
      BadRow: if something is missing from the row or cannot be read.
    """
    reader = _Reader(fields, _resolved(fields, names), needs_answer)
    try:
        return reader.read(row_format)
    except RecursionError:
        raise BadRow("nested too deeply", "the row is nested too deeply; flatten it") from None


def read_text(fields: dict, names: FieldNames = DEFAULT_NAMES) -> Text:
    """Reads a row of the format text; raises BadRow."""
    text = _filled(fields, names.text, "empty text")
    rest = (name for name in fields if name != names.text and not is_empty(fields[name]))
    return Text(text, tuple(map(str, rest)))


class _Reader:
    """Reads one row and notes which of its fields it has read."""

    def __init__(self, fields: dict, names: FieldNames, needs_answer: bool):
        self.fields, self.names, self.needs_answer = fields, names, needs_answer
        self.read_fields: set[str] = set()
        self.unread: list[str] = []

    def read(self, row_format: str) -> Conversation:
        turns, extra = {"chat": self._chat, "alpaca": self._alpaca}.get(row_format, self._pair)()
        turns = self._system(turns) + turns
        self.read_fields.add("tools")
        tools = read_tools(self.fields.get("tools"))
        turns = self._learnable(turns) if self.needs_answer else _without_answer(turns)
        for name, value in self.fields.items():
            if name not in self.read_fields and not is_empty(value):
                self.unread.append(str(name))
        return Conversation(
            tuple(turn.message for turn in turns),
            tuple(turn.is_learned for turn in turns),
            tools,
            extra,
            tuple(dict.fromkeys(self.unread)),
        )

    def _chat(self) -> tuple[list[Turn], str]:
        names = self.names
        has_pair = names.prompt in self.fields and (
            names.response in self.fields or not self.needs_answer
        )
        if self.fields.get(names.messages) is None and has_pair:
            return self._pair()
        return self._turns_of(names.messages), ""

    def _pair(self) -> tuple[list[Turn], str]:
        """Reads prompt and response, each a text or a list of turns; prompts are not learned."""
        prompt, response = self.names.prompt, self.names.response
        if _turns(self.fields.get(prompt)):
            turns = [turn._replace(is_learned=False) for turn in self._turns_of(prompt)]
        else:
            turns = [_plain("user", self._text(prompt))]
        self.read_fields.add(response)
        if not self.needs_answer:
            return turns, ""
        if _turns(self.fields.get(response)):
            return turns + self._turns_of(response), ""
        return [*turns, _plain("assistant", self._filled(response))], ""

    def _alpaca(self) -> tuple[list[Turn], str]:
        turns = self._history()
        turns.append(_plain("user", self._text("instruction")))
        extra = self._text("input") if self.fields.get("input") is not None else ""
        self.read_fields.update(("input", "output"))
        if self.needs_answer:
            turns.append(_plain("assistant", self._filled("output")))
        return turns, extra

    def _history(self) -> list[Turn]:
        """Returns earlier turns, [[user, assistant], ...]; their answers are learned like those of
        a chat.
        """
        self.read_fields.add("history")
        value = parsed(self.fields.get("history"))
        if is_empty(value):
            return []
        pairs = value if isinstance(value, list) else [None]
        turns = []
        for number, pair in enumerate(pairs, start=1):
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise BadRow("wrong type", "field 'history' must be a list of [user, assistant]")
            user, answer = (checked_text(text, f"pair {number} of 'history'") for text in pair)
            turns.append(_plain("user", user))
            turns.append(_plain("assistant", answer)._replace(is_learned=bool(answer.strip())))
        return turns

    def _system(self, turns: list[Turn]) -> list[Turn]:
        """Returns the system message that a field of its own holds, unless the turns begin with
        one.
        """
        for name in _SYSTEM_FIELDS:
            if is_empty(self.fields.get(name)) or name in self.read_fields:
                continue
            text = self._text(name)
            own = [turn.message["content"] for turn in turns if turn.message["role"] == "system"]
            if not own:
                return [_plain("system", text)]
            if text not in own:
                self.unread.append(name)
        return []

    def _turns_of(self, name: str) -> list[Turn]:
        self.read_fields.add(name)
        value = _value(self.fields, name)
        values = parsed(value)
        values = _turns(values) or values
        if not isinstance(values, list):
            got = type(value).__name__
            raise BadRow("wrong type", f"field {name!r} must be a list of messages, got {got}")
        if not values:
            raise BadRow("empty messages", f"field {name!r} is an empty list; fill it in")
        turns = [read_turn(message, number) for number, message in enumerate(values, start=1)]
        self.unread += [f"{name}[].{key}" for turn in turns for key in turn.unread]
        return turns

    def _learnable(self, turns: list[Turn]) -> list[Turn]:
        """Returns the turns up to the last one that is learned."""
        learned = [place for place, turn in enumerate(turns) if turn.is_learned]
        if not learned:
            roles = ", ".join(turn.message["role"] for turn in turns[:8])
            raise BadRow(
                "no answer to learn",
                f"no assistant turn would be learned, got the roles {roles}; add an answer",
            )
        if learned[0] == 0:
            raise BadRow(
                "role order",
                "message 1 is an answer without a turn before it; put a user or system turn before "
                'it, or give it "weight": 0',
            )
        if learned[-1] + 1 < len(turns):
            name = next((n for n in (self.names.messages,) if n in self.read_fields), "turns")
            self.unread.append(f"{name}[] after the last learned answer")
        return turns[: learned[-1] + 1]

    def _text(self, name: str) -> str:
        self.read_fields.add(name)
        return checked_text(_value(self.fields, name), f"field {name!r}")

    def _filled(self, name: str) -> str:
        self.read_fields.add(name)
        return _filled(self.fields, name, "empty response")


def _without_answer(turns: list[Turn]) -> list[Turn]:
    kept = turns[:-1] if turns and turns[-1].message["role"] == "assistant" else turns
    if not kept:
        raise BadRow("empty messages", "there is no turn before the answer; add a prompt")
    return kept


def _plain(role: str, content: str) -> Turn:
    return Turn({"role": role, "content": content}, role == "assistant", ())


def _turns(value) -> list[dict] | None:
    """Returns the turns in a field: a list of objects, or an object of lists; None for anything
    else.

    JSON text does not count: a response to be learned may well be JSON.
    """
    if isinstance(value, dict) and _is_turn(value):
        columns = [held for held in value.values() if held is not None]
        lengths = {len(held) if isinstance(held, Sequence) else -1 for held in columns}
        if len(lengths) != 1 or any(isinstance(held, str) for held in columns):
            return None
        value = [
            {key: held[place] for key, held in value.items() if held is not None}
            for place in range(lengths.pop())
        ]
    if isinstance(value, list) and value and all(map(_is_turn, value)):
        return value
    return None


def _is_turn(value) -> bool:
    return isinstance(value, dict) and ("role" in value or "from" in value)


def _value(fields: dict, name: str):
    if name not in fields:
        got = ", ".join(map(str, fields)) or "none"
        raise BadRow("missing field", f"field {name!r} is missing, got the fields {got}; add it")
    if fields[name] is None:
        raise BadRow("null", f"field {name!r} is null; fill it in")
    return fields[name]


def _filled(fields: dict, name: str, reason: str) -> str:
    value = checked_text(_value(fields, name), f"field {name!r}")
    if not value.strip():
        raise BadRow(reason, f"field {name!r} is empty, got {value!r}; fill it in")
    return value
