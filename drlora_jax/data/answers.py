"""Finds the text to learn in renderings of a chat template: each answer up to its end.

The text before an answer is always the template's own generation prompt, so that training and
generation agree to the character. If one rendering of the whole conversation has every such prompt
as a prefix, it is one document; if the template rewrites earlier turns, each learned answer is its
own document.
"""

import json
import re
from typing import NamedTuple

from drlora_jax.data.chat_template import (
    SENTINEL,
    Chat,
    check_chance,
    opening,
    render_chat,
    turn_end,
)
from drlora_jax.data.segments import BadRow, Segment, Written, control_pattern, unguard

_FEW = 4  # up to this many answers are each rendered on their own, without a search
_TELLING = 12  # characters: shorter texts may be found in a rendering by chance
_REASONING = ("reasoning_content", "thinking")
_THOUGHTS = re.compile(r"\s*[<\[](?P<name>[\w:|-]+)[>\]]\n?(?P<rest>.*)", re.S)


class _Answer(NamedTuple):
    prompt: str
    text: str
    is_ended: bool


class _Span(NamedTuple):
    """Where an answer is in a rendering."""

    start: int
    stop: int
    is_ended: bool


def write_chat(chat: Chat, is_learned: tuple[bool, ...]) -> list[Written]:
    """Writes a conversation with the tokenizer's chat template."""
    check_chance(chat)
    learned = [place for place, is_one in enumerate(is_learned) if is_one]
    whole = render_chat(chat, chat.messages[: learned[-1] + 1], answering=False)
    writer = _Writer(chat, learned, whole)
    spans = writer.spans()
    check_context(chat, learned, writer.answer(learned[-1]).prompt)
    if spans is None:
        answers = map(writer.answer, learned)
        return [
            Written([Segment(each.prompt, False), Segment(each.text, True)], each.is_ended)
            for each in answers
        ]
    segments, done = [], 0
    for span in spans:
        segments.append(Segment(whole[done : span.start], False))
        segments.append(Segment(whole[span.start : span.stop], True))
        done = span.stop
    return [Written(segments, spans[-1].is_ended)]


# ----------------------------------------------------------------------------- all in one rendering


class _Writer:
    """Finds the answers of a conversation in one rendering of all of it.

    A few answers are rendered on their own for comparison: the first, second, third, fifth, ninth,
    ..., the last, and those that differ in kind. So the cost is linear in turns.
    """

    def __init__(self, chat: Chat, learned: list[int], whole: str):
        self.chat, self.learned, self.whole = chat, learned, whole
        self._exact: dict[int, _Answer] = {}

    def answer(self, place: int) -> _Answer:
        """Returns the answer at a place, rendered on its own."""
        if place not in self._exact:
            full = self.whole if place == self.learned[-1] else None
            self._exact[place] = _answer(self.chat, place, full)
        return self._exact[place]

    def spans(self) -> list[_Span] | None:
        """Returns the spans of the answers; None if the template writes them differently when they
        are last.
        """
        found = {} if len(self.learned) <= _FEW else self._search()
        sure = set(_samples(self.chat.messages, self.learned)) | (set(self.learned) - set(found))
        for place in sorted(sure):
            span = self._exact_span(place)
            if span is None:
                return None
            if place in found and found[place] != span:  # the search was misled
                exact = [self._exact_span(each) for each in self.learned]
                return None if None in exact else exact
            found[place] = span
        return [found[place] for place in self.learned]

    def _exact_span(self, place: int) -> _Span | None:
        answer = self.answer(place)
        start = len(answer.prompt)
        if self.whole.startswith(answer.prompt) and self.whole.startswith(answer.text, start):
            return _Span(start, start + len(answer.text), answer.is_ended)
        return None

    def _search(self) -> dict[int, _Span]:
        """Finds answers by their generation prompts, if the rendering has as many as answers."""
        chat, last = self.chat, self.learned[-1]
        first = self.answer(self.learned[0]).prompt
        try:
            bare = render_chat(chat, chat.messages[: self.learned[0]], answering=False)
        except BadRow:
            return {}
        header = first[len(bare) :] if first.startswith(bare) else ""
        roles = (message["role"] for message in chat.messages[: last + 1])
        places = [place for place, role in enumerate(roles) if role == "assistant"]
        borders = [match.span() for match in re.finditer(re.escape(header), self.whole)]
        if not header or len(borders) != len(places):
            return {}
        limits = [start for start, _ in borders[1:]] + [len(self.whole)]
        ends = [
            _clear_end(chat, place, self.whole, start, limit)
            for place, (_, start), limit in zip(places, borders, limits, strict=True)
        ]
        of_place = {
            place: _Span(start, *end)
            for place, (_, start), end in zip(places, borders, ends, strict=True)
            if end
        }
        return {place: of_place[place] for place in self.learned if place in of_place}


def _samples(messages: list[dict], learned: list[int]) -> list[int]:
    """Returns the places of the answers to compare: by doubling, and the first and last of each
    kind.
    """
    if len(learned) <= _FEW:
        return learned
    chosen, step = {learned[0], learned[-1]}, 1
    while step < len(learned):
        chosen.add(learned[step])
        step *= 2
    first, last = {}, {}
    for place in learned:
        message = messages[place]
        behind = [each["role"] for each in messages[place + 1 : place + 2]]
        kind = (
            messages[place - 1]["role"],
            *behind,
            "</" in message.get("content", ""),
            *sorted(message),
        )
        first.setdefault(kind, place)
        last[kind] = place
    return sorted(chosen | set(first.values()) | set(last.values()))


def _clear_end(chat: Chat, place: int, whole: str, start: int, limit: int):
    """Returns where an answer ends if all its parts are found there, else None."""
    message = chat.messages[place]
    content = message.get("content", "").strip()
    at = whole.find(content, start, limit)
    parts = [message.get("reasoning_content", "").strip(), *_names(message)]
    if at < 0 or any(whole.find(part, start, limit) < 0 for part in parts):
        return None
    end = turn_end(chat)
    behind = at + len(content)
    if end.token:
        stop = _token_end(chat, whole, end.token, behind, limit)
        return None if stop is None else (stop, True)
    closing = end.text.strip()
    pattern = re.compile(r"\s*" + re.escape(closing) if closing else "")
    shown = pattern.match(whole, behind, limit)
    return (shown.end(), False) if shown and content else None


def _token_end(chat: Chat, text: str, token: str, start: int, limit: int) -> int | None:
    found = control_pattern(chat.tokenizer).finditer(text, start, limit)
    return next((match.end() for match in found if match[0] == token), None)


def _names(message: dict) -> list[str]:
    return [call.get("function", call)["name"] for call in message.get("tool_calls", ())]


# ------------------------------------------------------------------------------------ one by itself


def _answer(chat: Chat, place: int, full: str | None) -> _Answer:
    """Renders one answer on its own: its generation prompt, and what is learned behind it."""
    before, message = chat.messages[:place], chat.messages[place]
    prompt = render_chat(chat, before, answering=True)
    if full is None:
        full = render_chat(chat, [*before, message], answering=False)
    if full.startswith(prompt):
        body, own = full[len(prompt) :], message.get("content", "")
    else:
        body, own = _behind_prompt(chat, place, prompt, full)
    stop, is_ended = _end(chat, body, own.strip())
    if not body[:stop].strip():
        raise _unwritten("answer", place)
    _check_answer(chat, place, body[:stop])
    return _Answer(prompt, body[:stop], is_ended)


def _behind_prompt(chat: Chat, place: int, prompt: str, full: str) -> tuple[str, str]:
    """Returns the answer behind a generation prompt that is no prefix of its rendering.

    Either the template writes the turns before it differently once they are answered, or its
    prompt opens a reasoning block: rows with reasoning continue it, others close it. Returns the
    text behind the prompt and the content in it.
    """
    before, message = chat.messages[:place], chat.messages[place]
    answer = {"role": "assistant", "content": SENTINEL}
    shown = render_chat(chat, [*before, answer], answering=False)
    if SENTINEL not in shown:
        raise _unwritten("answer", place)
    head = shown.rpartition(SENTINEL)[0]
    content = message.get("content", "")
    mark, words = opening(chat)
    if not words.strip() or not mark or not prompt.endswith(mark):
        head = head.removesuffix(words) if not mark else head
        return _behind(full, head, prompt, place), content
    bare = {key: held for key, held in message.items() if key not in _REASONING}
    has_block = words.strip() in content and len(bare) == len(message)
    if has_block:  # templates may drop or rewrite it: it is kept unchanged
        bare["content"] = SENTINEL
    text = _behind(render_chat(chat, [*before, bare], answering=False), head, prompt, place)
    if has_block:
        content = _without_opening(content, words.strip())
        return text.replace(SENTINEL, content, 1), content
    return message.get("reasoning_content", "").strip("\n") + words + text, content


def _behind(text: str, head: str, prompt: str, place: int) -> str:
    """Returns what a rendering has behind the head that it shares with other answers."""
    if not text.startswith(head):
        raise BadRow(
            "not behind the generation prompt",
            f"the tokenizer's chat template does not write message {place + 1} after its own "
            f"generation prompt, which ends in {unguard(prompt)[-24:]!r}; remove the message's "
            "reasoning, or set data.template=chatml or tulu",
        )
    return text[len(head) :]


def _without_opening(content: str, closing: str) -> str:
    """Returns content without the opening of its reasoning block, which the prompt already has."""
    opened = _THOUGHTS.match(content)
    name = closing.strip("<>[]/")
    return opened["rest"] if opened and opened["name"] == name else content


def _end(chat: Chat, body: str, content: str) -> tuple[int, bool]:
    """Returns where an answer ends, and whether a control token ends it: blanks behind it are not
    learned.
    """
    at = body.find(content)
    token = turn_end(chat).token
    if token and at >= 0:
        stop = _token_end(chat, body, token, at + len(content), len(body))
        if stop is not None:
            return stop, True
    controls = list(control_pattern(chat.tokenizer).finditer(body))
    if controls and not body[controls[-1].end() :].strip():
        return controls[-1].end(), True
    return len(body.rstrip()), False


# ------------------------------------------------------------------------------- nothing is dropped


def _check_answer(chat: Chat, place: int, text: str) -> None:
    """Refuses a row if the template drops a part of a learned answer."""
    message = chat.messages[place]
    reasoning = message.get("reasoning_content", "").strip()
    if reasoning not in text and not _is_written(chat, place, *_REASONING):
        raise _unwritten("reasoning_content", place)
    names = _names(message)
    if not all(name in text for name in names) and not _is_written(chat, place, "tool_calls"):
        raise _unwritten("tool_calls", place)
    content = message.get("content", "")
    if content.strip() not in text and not _is_written(chat, place, "content"):
        raise _unwritten("content beside tool_calls" if names else "content", place)
    block = re.match(r"\s*<(\w*think\w*)>(.*?)</\1>", content, re.S)
    if block and block[2].strip() not in text:
        raise _unwritten(f"<{block[1]}> block of the content", place)


def check_context(chat: Chat, learned: list[int], text: str) -> None:
    """Refuses a row if the template drops turns or tools.

    Args:
      learned: places of the answers to be learned; empty for a prompt.
      text: the last answer's generation prompt.
    """
    _check_tools(chat, learned)
    seen, cursor, answers = set(), 0, set(learned)
    for place, message in enumerate(chat.messages[: learned[-1] if learned else None]):
        role, content = message["role"], message.get("content", "").strip()
        if role == "assistant":
            if place not in answers:
                _check_history(chat, place, seen)
            continue
        at = text.find(content, cursor)
        at = text.find(content) if at < 0 else at
        cursor = max(at, cursor)
        is_telling = role == "user" or role in seen or len(content) >= _TELLING
        seen.add(role)
        if is_telling and (at >= 0 or _escaped(content) in text):
            continue
        following = [each for each in learned if each > place] or [len(chat.messages)]
        if not _is_asked(chat, place, following[0]):
            raise _unwritten(f"{role} message", place)


def _is_asked(chat: Chat, place: int, count: int) -> bool:
    """Returns whether the prompt built from the first messages depends on the content of the one at
    `place`.
    """
    messages = chat.messages[:count]
    text = render_chat(chat, messages, answering=True)
    messages[place] = messages[place] | {"content": SENTINEL}
    try:
        return text != render_chat(chat, messages, answering=True)
    except BadRow:
        return True


def _escaped(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _check_history(chat: Chat, place: int, seen: set) -> None:
    """Checks the first tool calls and the first reasoning of answers that are not learned."""
    message = chat.messages[place]
    for part in ("tool_calls", "reasoning_content"):
        if part not in message or part in seen:
            continue
        seen.add(part)
        is_thought = part == "reasoning_content"
        # Earlier reasoning is left out on purpose if the prompt opens the next one.
        if is_thought and opening(chat).words.strip():
            continue
        if not _is_written(chat, place, *(_REASONING if is_thought else (part,))):
            raise _unwritten(part, place)


def _check_tools(chat: Chat, learned: list[int]) -> None:
    if not chat.tools:
        return
    messages = chat.messages[: learned[0]] if learned else chat.messages
    text = render_chat(chat, messages, answering=True)
    try:
        bare = render_chat(chat._replace(tools=None), messages, answering=True)
    except BadRow:
        return
    names = [tool.get("function", tool).get("name") or "" for tool in chat.tools]
    if text == bare or not all(text.count(name) > bare.count(name) for name in names if name):
        raise _unwritten("tools")


def _is_written(chat: Chat, place: int, *keys: str) -> bool:
    """Returns whether a rendering up to a turn depends on some of the turn's keys."""
    before, message = chat.messages[:place], chat.messages[place]
    spoken = SENTINEL if "content" in keys else ""
    bare = {"content": spoken} | {key: held for key, held in message.items() if key not in keys}
    answering = message["role"] != "assistant"
    text = render_chat(chat, [*before, message], answering=answering)
    try:
        return text != render_chat(chat, [*before, bare], answering=answering)
    except BadRow:  # it reads the key, since it fails without it
        return True


def _unwritten(what: str, place: int | None = None) -> BadRow:
    where = "" if place is None else f" (message {place + 1})"
    is_text = what.endswith((" message", "content", "answer"))
    advice = "set data.template=chatml or tulu"
    if not is_text or what == "reasoning_content":
        advice = "remove it from the row, or use a chat template that writes it"
    return BadRow(
        f"{what} not in the template",
        f"the tokenizer's chat template writes no {what}{where}; {advice}",
    )


def writes_key(chat: Chat, key: str) -> bool:
    """Returns whether the template writes this key of the first turn that has it."""
    place = next(n for n, message in enumerate(chat.messages) if key in message)
    return _is_written(chat, place, key)
