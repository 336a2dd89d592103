"""From a conversation to text: templates say how it is written.

A document is a list of segments, each marked as response or not; its text is their concatenation. A
response begins with the space before its first word ("Answer:" + " 42"): byte-pair tokenizers join
the two, and a token that starts before the border does not count as response. `write` and
`write_prompt` put the same text before an answer, to the character.

`plain`, `question_answer` and `alpaca` write one prompt and its response; a system text stands
before them with an empty line between. `chatml`, `tulu` and the tokenizer's own chat template write
any number of turns.
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
AS_IS = "as is"  # what the formats `text` and `choice` resolve to

_ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_NOTHING = Conversation((), ())
_ALPACA = "Below is an instruction that describes a task"
_ALPACA_INPUT = ", paired with an input that provides further context"
_ALPACA_END = ". Write a response that appropriately completes the request.\n\n"


class Style(NamedTuple):
    """How a run writes its rows."""

    template: str  # resolved, see `choose_template`
    special_tokens: str = "split"  # control tokens in users' text: split into text, or keep
    date: str | None = None  # YYYY-MM-DD, for chat templates that read the clock


def choose_template(template: str, row_format: str, tokenizer) -> str:
    """Resolves `auto` for a row format, and refuses names and pairs that do not exist."""
    known = (*PROMPT_TEMPLATES, *CHAT_TEMPLATES, "auto")
    if template not in known:
        hint = did_you_mean(template, known) or f"known: {', '.join(known)}."
        raise UserError(f"data.template={template!r} does not exist; {hint}")
    has_own = bool(getattr(tokenizer, "chat_template", None))
    if template == "tokenizer" and not has_own:
        raise UserError(
            "data.template=tokenizer, but the tokenizer has no chat template; use chatml or tulu."
        )
    uses_own = template == "tokenizer" or (template == "auto" and row_format == "chat")
    if uses_own:
        chat_template.check_texts(tokenizer)
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


def write(conversation: Conversation, style: Style, tokenizer) -> list[Written]:
    """Writes a conversation as documents: one, or one for each learned answer where a chat template
    writes earlier turns otherwise than last ones.

    Raises:
      BadRow: the template cannot write it, or would leave a part of it out.
    """
    if style.template == "tokenizer":
        chat = _open_chat(_merged(conversation), style, tokenizer)
        return answers.write_chat(chat, conversation.is_learned)
    segments = _write_ours(conversation, style, tokenizer)
    return [Written(segments, turn_end(style, tokenizer) is not None)]


def write_prompt(conversation: Conversation, style: Style, tokenizer) -> list[Segment]:
    """Writes what stands before the next answer: the text that `write` puts there."""
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
    """Names of a turn's keys that the template passes over: the name and tool_call_id of a turn.

    What matters more is never passed over: `write` refuses such rows.
    """
    keys = ("name", "tool_call_id")
    there = [key for key in keys if any(key in message for message in conversation.messages)]
    if there and style.template == "tokenizer":
        chat = _open_chat(_merged(conversation), style, tokenizer)
        there = [key for key in there if not answers.writes_key(chat, key)]
    return tuple(f"messages[].{key}" for key in there)


def turn_end(style: Style, tokenizer) -> str | None:
    """The control token that a template puts behind an answer; None if it puts none there."""
    if style.template == "tokenizer":
        return chat_template.turn_end(_open_chat(_NOTHING, style, tokenizer)).token
    if style.template not in CHAT_TEMPLATES:
        return None
    end = _turn(style.template, "assistant", tokenizer)[1]
    return end if end and control_pattern(tokenizer).fullmatch(end) else None


def opens_thinking(style: Style, tokenizer) -> str:
    """What rows without reasoning learn in front of their answer, such as the end of a block that
    the generation prompt has opened; "" for most templates.
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
    """Alpaca's input on the line below the instruction, the last user turn."""
    if not conversation.extra:
        return conversation
    messages = list(conversation.messages)
    place = max(n for n, message in enumerate(messages) if message["role"] == "user")
    text = f"{messages[place]['content']}\n{conversation.extra}"
    messages[place] = messages[place] | {"content": text}
    return conversation._replace(messages=tuple(messages), extra="")


# ------------------------------------------------------------------------------- our own templates


def _write_ours(conversation: Conversation, style: Style, tokenizer) -> list[Segment]:
    """Segments of the templates that we bring; the last one is the last answer."""
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
            before = "\n"  # after the end of an answer: the next turn's, not to be learned
        else:
            before += opening + content + closing + "\n"
    return segments


def _turn(template: str, role: str, tokenizer) -> tuple[str, str]:
    """What stands before and behind the content of a turn."""
    if template == "chatml":
        return f"<|im_start|>{role}\n", "<|im_end|>"
    # Every answer ends with the end-of-text token, or the model would not learn to stop early.
    return f"<|{role}|>\n", (tokenizer.eos_token or "") if role == "assistant" else ""
