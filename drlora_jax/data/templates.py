"""Writes conversations as text, by template.

A document is a list of segments, each marked as response or not; its text is their concatenation. A
response begins with the space before its first word ("Answer:" + " 42"): byte-pair tokenizers join
the two, and a token that starts before the border does not count as response. `write` and
`write_prompt` put the same text before an answer, to the character.

`plain`, `question_answer` and `alpaca` write one prompt and its response, after the system text and
an empty line if there is one. `chatml`, `tulu` and the tokenizer's own chat template write any
number of turns.
"""

from typing import NamedTuple

from drlora_jax.data import answers, chat_template
from drlora_jax.data.chat_template import reads_clock as reads_clock  # for our callers
from drlora_jax.data.layouts import Conversation
from drlora_jax.data.segments import BadRow, Segment, Written, control_pattern, guard
from drlora_jax.errors import UserError
from drlora_jax.system.text import did_you_mean

PROMPT_TEMPLATES = ("plain", "question_answer", "alpaca")
CHAT_TEMPLATES = ("chatml", "tulu", "tokenizer")
AS_IS = "as is"  # the template of the formats `text` and `choice`

_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_NOTHING = Conversation((), ())
_ALPACA = "Below is an instruction that describes a task"
_ALPACA_INPUT = ", paired with an input that provides further context"
_ALPACA_END = ". Write a response that appropriately completes the request.\n\n"


class Style(NamedTuple):
    """How a run writes its rows."""

    template: str  # resolved, see `choose_template`
    special_tokens: str = "split"  # control tokens in the user's text: split into text, or keep
    date: str | None = None  # YYYY-MM-DD, for chat templates that read the clock


def choose_template(template: str, row_format: str, tokenizer) -> str:
    """Resolves `auto` for a row format; refuses unknown names and pairs that do not fit."""
    known = (*PROMPT_TEMPLATES, *CHAT_TEMPLATES, "auto")
    if template not in known:
        hint = did_you_mean(template, known) or f"known: {', '.join(known)}."
        raise UserError(f"data.template={template!r} does not exist; {hint}")
    has_own = bool(getattr(tokenizer, "chat_template", None))
    if template == "tokenizer" and not has_own:
        raise UserError(
            "data.template=tokenizer needs a chat template, but the tokenizer has none; use chatml "
            "or tulu."
        )
    uses_own = template == "tokenizer" or (template == "auto" and row_format == "chat")
    if uses_own:
        chat_template.check_texts(tokenizer)
    if template == "auto":
        chat = "tokenizer" if has_own else "tulu"
        automatic = {"alpaca": "alpaca", "chat": chat, "prompt_response": "plain"}
        return automatic.get(row_format, AS_IS)
    if row_format in ("text", "choice"):
        why = "is used unchanged" if row_format == "text" else "has the prompts of its tasks"
        raise UserError(
            f"data.template={template} does not apply to data.format={row_format}, which {why}; "
            "use data.template=auto."
        )
    if row_format == "chat" and template in PROMPT_TEMPLATES:
        raise UserError(
            f"data.template={template} writes one prompt and one response, but data.format=chat "
            f"has messages; use {', '.join(CHAT_TEMPLATES)} or auto."
        )
    return template


def write(conversation: Conversation, style: Style, tokenizer) -> list[Written]:
    """Writes a conversation as documents: one, or one for each learned answer where a chat template
    writes earlier turns differently from last ones.

    Raises:
      BadRow: if the template cannot write it, or would drop a part of it.
    """
    if style.template == "tokenizer":
        chat = _open_chat(_merged(conversation), style, tokenizer)
        return answers.write_chat(chat, conversation.is_learned)
    segments = _write_ours(conversation, style, tokenizer)
    return [Written(segments, turn_end(style, tokenizer) is not None)]


def write_prompt(conversation: Conversation, style: Style, tokenizer) -> list[Segment]:
    """Writes the text before the next answer, the same text that `write` puts there."""
    if not conversation.messages:
        raise BadRow("empty messages", "the conversation has no messages; give a prompt")
    if style.template == "tokenizer":
        chat = _open_chat(_merged(conversation), style, tokenizer)
        text = chat_template.render_chat(chat, chat.messages, answering=True)
        answers.check_context(chat, [], text)
        return [Segment(text, False)]
    next_answer = {"role": "assistant", "content": ""}
    asked = conversation._replace(
        messages=(*conversation.messages, next_answer),
        is_learned=(*(False for _ in conversation.messages), True),
    )
    return _write_ours(asked, style, tokenizer)[:-1]


def unwritten(conversation: Conversation, style: Style, tokenizer) -> tuple[str, ...]:
    """Returns the keys of turns that the template ignores: `name` and `tool_call_id`.

    More important parts are never ignored: `write` refuses such rows.
    """
    keys = ("name", "tool_call_id")
    there = [key for key in keys if any(key in message for message in conversation.messages)]
    if there and style.template == "tokenizer":
        chat = _open_chat(_merged(conversation), style, tokenizer)
        there = [key for key in there if not answers.writes_key(chat, key)]
    return tuple(f"messages[].{key}" for key in there)


def turn_end(style: Style, tokenizer) -> str | None:
    """Returns the control token that a template puts behind an answer; None if there is none."""
    if style.template == "tokenizer":
        return chat_template.turn_end(_open_chat(_NOTHING, style, tokenizer)).token
    if style.template not in CHAT_TEMPLATES:
        return None
    end = _turn(style.template, "assistant", tokenizer)[1]
    return end if end and control_pattern(tokenizer).fullmatch(end) else None


def opens_thinking(style: Style, tokenizer) -> str:
    """Returns the text that answers without reasoning learn to begin with, such as the end of a
    block that the generation prompt has opened; "" for most templates.
    """
    if style.template != "tokenizer":
        return ""
    words = chat_template.opening(_open_chat(_NOTHING, style, tokenizer)).words
    return words if words.strip() else ""


def _open_chat(conversation: Conversation, style: Style, tokenizer) -> chat_template.Chat:
    return chat_template.open_chat(
        conversation, tokenizer, special_tokens=style.special_tokens, date=style.date
    )


def _merged(conversation: Conversation) -> Conversation:
    """Puts Alpaca's input on the line below the instruction, the last user turn."""
    if not conversation.extra:
        return conversation
    messages = list(conversation.messages)
    place = max(n for n, message in enumerate(messages) if message["role"] == "user")
    text = f"{messages[place]['content']}\n{conversation.extra}"
    messages[place] = messages[place] | {"content": text}
    return conversation._replace(messages=tuple(messages), extra="")


# -------------------------------------------------------------------------------- our own templates


def _write_ours(conversation: Conversation, style: Style, tokenizer) -> list[Segment]:
    """Writes segments with a bundled template; the last segment is the last answer."""
    if style.template not in (*PROMPT_TEMPLATES, *CHAT_TEMPLATES):
        raise ValueError(f"{style.template!r} is no template for conversations")
    _check_ours(conversation, style.template)
    if style.special_tokens == "split":
        messages = tuple(
            message | {"content": guard(message["content"], tokenizer)}
            for message in conversation.messages
        )
        extra = guard(conversation.extra, tokenizer)
        conversation = conversation._replace(messages=messages, extra=extra)
    if style.template in PROMPT_TEMPLATES:
        return _write_pair(conversation, style.template)
    return _write_turns(_merged(conversation), style.template, tokenizer)


def _check_ours(conversation: Conversation, template: str) -> None:
    keys = {key for message in conversation.messages for key in message}
    extras = [name for name in ("tool_calls", "reasoning_content") if name in keys]
    extras = (["tools"] if conversation.tools else []) + extras
    if extras:
        raise BadRow(
            f"{extras[0]} not in the template",
            f"data.template={template} writes no {' and no '.join(extras)}; set "
            "data.template=tokenizer for a chat template that does, or remove them from the row",
        )
    for number, message in enumerate(conversation.messages, start=1):
        if message["role"] not in _ROLES:
            raise BadRow(
                "unknown role",
                f"message {number} has the role {message['role']!r}; data.template={template} "
                f"writes {', '.join(_ROLES)}: rename it, or set data.template=tokenizer",
            )


def _write_pair(conversation: Conversation, template: str) -> list[Segment]:
    roles = [message["role"] for message in conversation.messages]
    texts = [message["content"] for message in conversation.messages]
    system = f"{texts.pop(0)}\n\n" if roles[:1] == ["system"] else ""
    if roles[-2:] != ["user", "assistant"] or len(texts) != 2:
        raise BadRow(
            "several turns",
            f"data.template={template} writes one prompt and one response, got the turns "
            f"{', '.join(roles[:8])}; set data.template to chatml, tulu or tokenizer",
        )
    (instruction, response), extra = texts, conversation.extra
    prompt = f"{instruction}\n{extra}" if extra else instruction
    if template == "plain":
        return [Segment(f"{system}{prompt}\n", False), Segment(response, True)]
    if template == "question_answer":
        prompt = f"{system}Question: {prompt}\nAnswer:"
        return [Segment(prompt, False), Segment(f" {response}", True)]
    return [Segment(system + _alpaca_prompt(instruction, extra), False), Segment(response, True)]


def _alpaca_prompt(instruction: str, extra: str) -> str:
    if extra:
        opening = _ALPACA + _ALPACA_INPUT + _ALPACA_END
        middle = f"### Input:\n{extra}\n\n"
    else:
        opening, middle = _ALPACA + _ALPACA_END, ""
    return f"{opening}### Instruction:\n{instruction}\n\n{middle}### Response:\n"


def _write_turns(conversation: Conversation, template: str, tokenizer) -> list[Segment]:
    segments, before = [], ""
    for message, is_learned in zip(conversation.messages, conversation.is_learned, strict=True):
        opening, closing = _turn(template, message["role"], tokenizer)
        content = message["content"]
        if is_learned:
            segments += [Segment(before + opening, False), Segment(content + closing, True)]
            before = "\n"  # it belongs to the next turn, so that it is not learned
        else:
            before += opening + content + closing + "\n"
    return segments


def _turn(template: str, role: str, tokenizer) -> tuple[str, str]:
    """Returns the texts before and behind the content of a turn."""
    if template == "chatml":
        return f"<|im_start|>{role}\n", "<|im_end|>"
    # Every answer ends with the end-of-text token: otherwise early answers would not learn to stop.
    return f"<|{role}|>\n", (tokenizer.eos_token or "") if role == "assistant" else ""
