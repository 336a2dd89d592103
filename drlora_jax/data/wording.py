"""Writes rows as documents, and questions and turns as prompts.

A `Wording` is resolved when a run is created, and stored in its config.json; a `Writer` applies it.
Every prompt comes from here: training writes documents with it, and `generate`, `evaluate` and the
adapter of lm-evaluation-harness use `Writer.prompt`, which returns exactly the text that training
put before an answer.
"""

import dataclasses
import datetime
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from drlora_jax.config import DataSection
from drlora_jax.data.layouts import (
    Conversation,
    FieldNames,
    detect_format,
    read_row,
    read_text,
)
from drlora_jax.data.segments import (
    GUARD,
    BadRow,
    Segment,
    Written,
    control_pattern,
    guard,
    plain_text,
)
from drlora_jax.data.templates import (
    AS_IS,
    CHAT_TEMPLATES,
    PROMPT_TEMPLATES,
    Style,
    choose_template,
    reads_clock,
    unwritten,
    write,
    write_prompt,
)
from drlora_jax.data.tokenize import encode_prompt
from drlora_jax.errors import UserError
from drlora_jax.system.text import did_you_mean

TEXT, CHOICE = "text", "choice"  # formats whose texts no template changes


class Wording(NamedTuple):
    """The resolved settings for writing rows of one layout; nothing in it is `auto`."""

    format: str
    template: str
    fields: FieldNames = FieldNames()
    special_tokens: str = "keep"  # "split": control tokens come from the template only
    date: str | None = None  # YYYY-MM-DD, for a chat template that reads the clock

    @property
    def is_as_is(self) -> bool:
        return self.template == AS_IS

    def to_json(self) -> dict:
        return self._asdict() | {"fields": self.fields._asdict()}

    @classmethod
    def from_json(cls, values: dict) -> "Wording":
        """Inverts `to_json`; names that this version does not know are ignored."""
        known = {name: values[name] for name in cls._fields if name in values}
        fields = {n: v for n, v in values.get("fields", {}).items() if n in FieldNames._fields}
        return cls(**known | {"fields": FieldNames(**fields)})


class Prompt(NamedTuple):
    """The input for the next answer of a model."""

    text: str  # readable, without guards
    segments: list[Segment]  # the same text, with control tokens of the user's text guarded
    ids: list[int]
    unread: tuple[str, ...] = ()  # fields of a row that nothing has read


def field_names(section: DataSection) -> FieldNames:
    """Returns the field names that a config sets."""
    return FieldNames(
        section.prompt_field, section.response_field, section.messages_field, section.text_field
    )


def resolve_wording(
    fields: dict, section: DataSection, tokenizer, *, date: str | None = None
) -> Wording:
    """Returns the wording of rows like the one with these fields.

    Args:
      date: the date for a template that reads the clock; None: `data.date`, today for `auto`.

    Raises:
      UserError: if the format cannot be detected, or format and template do not fit together.
    """
    row_format, names = section.format, field_names(section)
    if row_format == "auto":
        row_format, names = detect_format(fields, names)
    template = choose_template(section.template, row_format, tokenizer)
    special = section.special_tokens
    if special == "auto":
        special = "keep" if row_format == TEXT else "split"
    return Wording(row_format, template, names, special, _date(section, template, tokenizer, date))


def named_wording(
    template: str, tokenizer, *, date: str | None = None, special_tokens: str = "split"
) -> Wording:
    """Returns the wording of single questions in a template that the user names; with `none` texts
    are used as they are.
    """
    if template in ("none", AS_IS):
        return Wording(TEXT, AS_IS)
    if template not in (*PROMPT_TEMPLATES, *CHAT_TEMPLATES):
        known = (*PROMPT_TEMPLATES, *CHAT_TEMPLATES, "none")
        near = did_you_mean(template, known)
        hint = f"{near[0].upper()}{near[1:]} " if near else ""
        raise UserError(
            f"--template {template}: no such template. {hint}Known: {', '.join(known)}."
        )
    row_format = "chat" if template in CHAT_TEMPLATES else "prompt_response"
    template = choose_template(template, row_format, tokenizer)
    date = _date(DataSection(), template, tokenizer, date)
    return Wording(row_format, template, special_tokens=special_tokens, date=date)


def _date(section: DataSection, template: str, tokenizer, date: str | None) -> str | None:
    if template != "tokenizer" or not reads_clock(tokenizer):
        return None
    if section.date != "auto":
        return section.date
    return date or datetime.date.today().isoformat()


class Writer:
    """Writes rows and questions in one wording."""

    def __init__(self, wording: Wording, tokenizer):
        self.wording, self.tokenizer = wording, tokenizer
        self.style = Style(wording.template, wording.special_tokens, wording.date)

    def documents(self, fields: dict) -> tuple[list[Written], Conversation]:
        """Writes a training row as documents, usually one; returns them and what was read of the
        row.

        Raises:
          BadRow: if something is missing from the row.
        """
        row_format, names = self.wording.format, self.wording.fields
        if row_format == TEXT:
            text, unread = read_text(fields, names)
            return [Written([self.as_is(text, True)], False)], Conversation((), (), unread=unread)
        conversation = read_row(fields, row_format, names)
        left = unwritten(conversation, self.style, self.tokenizer)
        conversation = conversation._replace(unread=(*conversation.unread, *left))
        return write(conversation, self.style, self.tokenizer), conversation

    def would_split(self, conversation: Conversation) -> bool:
        """Returns whether `special_tokens=split` would find control tokens in a conversation's own
        text.
        """
        pattern = control_pattern(self.tokenizer)
        if not any(map(pattern.search, _texts(conversation))):
            return False  # for nearly every row, without writing it again
        try:
            written = write(
                conversation, self.style._replace(special_tokens="split"), self.tokenizer
            )
        except BadRow:  # it holds the guard itself
            return True
        return any(GUARD in segment.text for each in written for segment in each.segments)

    def row_prompt(self, fields: dict, *, system: str | None = None) -> Prompt:
        """Returns the prompt of a row like those of training; an answer that the row has is left
        out.
        """
        row_format, names = self.wording.format, self.wording.fields
        if row_format == TEXT:
            text, unread = read_text(fields, names)
            conversation = _asked(text)._replace(unread=unread)
        else:
            conversation = read_row(fields, row_format, names, needs_answer=False)
            left = unwritten(conversation, self.style, self.tokenizer)
            conversation = conversation._replace(unread=(*conversation.unread, *left))
        prompt = self.prompt(_with_system(conversation, system))
        return prompt._replace(unread=conversation.unread)

    def question(
        self,
        text: str,
        *,
        extra: str = "",
        system: str | None = None,
        shots: Sequence[tuple[str, str]] = (),
    ) -> Prompt:
        """Returns the prompt of one question, after the answered `shots` if there are any.

        Args:
          extra: Alpaca's `input`.
          system: the text of a system message.
          shots: (question, answer): earlier turns of a chat, or blocks with an empty line between.
        """
        is_chat = self.wording.template in CHAT_TEMPLATES
        turns = [turn for shot in shots for turn in _turns(*shot)] if is_chat else []
        conversation = _asked(text, turns)._replace(extra=extra)
        prompt = self.prompt(_with_system(conversation, system))
        if is_chat or not shots:
            return prompt
        blocks = [segment for shot in shots for segment in [*self._pair(*shot), BLANK_LINE]]
        return self._made([*blocks, *prompt.segments])

    def turns(self, messages: Sequence[dict]) -> Prompt:
        """Returns the prompt of a conversation of roles and contents whose last turn is not
        answered yet.

        A template for single questions treats the turns before it as answered examples.
        """
        messages = list(messages)
        if self.wording.template in CHAT_TEMPLATES or len(messages) < 3:
            conversation = Conversation(tuple(messages), (False,) * len(messages))
            return self.prompt(conversation)
        system = messages.pop(0)["content"] if messages[0]["role"] == "system" else None
        asked, answers = messages[0::2], messages[1::2]
        shots = [(q["content"], a["content"]) for q, a in zip(asked, answers, strict=False)]
        return self.question(messages[-1]["content"], system=system, shots=shots)

    def prompt(self, conversation: Conversation) -> Prompt:
        """Returns the prompt for the next answer of a conversation: its text and its token ids.

        Raises:
          UserError: if the template cannot write the conversation.
        """
        if self.wording.is_as_is:
            return self._as_is(conversation)
        try:
            return self._made(write_prompt(conversation, self.style, self.tokenizer))
        except BadRow as error:
            # The config field data.template is the option --template of generate and evaluate.
            reason = str(error).replace("set data.template=", "give --template ")
            raise UserError(f"The prompt cannot be written: {reason}.") from error

    def as_is(self, text: str, is_response: bool = False) -> Segment:
        """Returns a text that no template writes; its control tokens are guarded if the wording
        says so.
        """
        if self.wording.special_tokens == "split":
            text = guard(text, self.tokenizer)
        return Segment(text, is_response)

    def _as_is(self, conversation: Conversation) -> Prompt:
        if len(conversation.messages) > 1 or conversation.extra:
            raise UserError(
                "Without a template a prompt cannot have a system message, earlier turns or an "
                "input; name a template (--template NAME)."
            )
        return self._made([self.as_is(conversation.messages[0]["content"])])

    def _pair(self, question: str, answer: str) -> list[Segment]:
        turns = tuple(_turns(question, answer))
        [document] = write(Conversation(turns, (False, True)), self.style, self.tokenizer)
        return document.segments

    def _made(self, segments: list[Segment]) -> Prompt:
        return Prompt(plain_text(segments), segments, encode_prompt(segments, self.tokenizer))


def _texts(value) -> Iterator[str]:
    """Yields all texts in nested tuples, lists and objects, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _texts(tuple(value.items()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)


BLANK_LINE = Segment("\n\n", False)  # between answered examples


def _turns(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _asked(text: str, before: Sequence[dict] = ()) -> Conversation:
    """Returns a conversation that ends with a question."""
    messages = (*before, {"role": "user", "content": text})
    return Conversation(messages, (False,) * len(messages))


def _with_system(conversation: Conversation, system: str | None) -> Conversation:
    if system is None:
        return conversation
    if any(message["role"] in ("system", "developer") for message in conversation.messages):
        raise UserError("--system: the conversation already has a system message; omit --system.")
    return conversation._replace(
        messages=({"role": "system", "content": system}, *conversation.messages),
        is_learned=(False, *conversation.is_learned),
    )


def with_date(section: DataSection, date: str | None) -> DataSection:
    """Returns the section with the date that a run has settled on."""
    is_open = date is not None and section.date == "auto"
    return dataclasses.replace(section, date=date) if is_open else section
