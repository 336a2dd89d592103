"""Where an answer's text ends, what of it is told, and what its tokens add to the prompt's text."""

import pytest

from drlora_jax.data.decoding import prompt_tail
from drlora_jax.inference.answer_text import Answer, AnswerText, shown_tokens

SPECIAL = {0: "<end>", 1: "<user>", 2: "<sep>"}


class Letters:
    """A tokenizer of one byte a token, with three special tokens."""

    all_special_ids = tuple(SPECIAL)

    def decode(self, tokens, **_):
        return bytes(token for token in tokens if token > 2).decode("utf-8", errors="replace")

    def convert_ids_to_tokens(self, token):
        return SPECIAL.get(token) or chr(token)


def feed(tokens, stop=(), limit=1000, ends=(0,), prompt=b"a prompt: ", shown=None):
    told = []
    text = AnswerText(Letters(), list(prompt))
    shown = shown or {}
    answer = Answer(text, limit=limit, ends=ends, stop=stop, shown=shown, tell=told.append)
    for token in tokens if isinstance(tokens, list) else list(tokens.encode()):
        answer.take(token)
    return answer, told


def tokens_of(text: str) -> list[int]:
    for token, literal in SPECIAL.items():
        text = text.replace(literal, chr(token))
    return list(text.encode())


@pytest.mark.parametrize("prompt", [b"x", b"\xe2\x82", "\u20ac".encode()])
def test_streamed_pieces_are_the_text(prompt):
    for text, stop in [("a\u00e9\u20ac z", ()), ("one\n\ntwo", ("\n\n",)), ("aXbXY.", ("XY",))]:
        answer, told = feed(text + "\0", stop, prompt=prompt)
        assert "".join(told) == answer.text
        assert "\ufffd" not in answer.text
        assert answer.text == (text.split(stop[0])[0] if stop else text)
        assert answer.finish == ("stop" if stop else "eos")


def test_a_character_that_begins_in_the_prompt_is_the_answers():
    answer, told = feed([0xAC, *b" z", 0], prompt=b"costs \xe2\x82")
    assert answer.text == "\u20ac z" == "".join(told)


def test_half_a_character_is_told_only_at_the_end():
    answer, told = feed([*b"ab", 0xE2, 0x82], limit=4)
    assert (answer.text, answer.finish) == ("ab\ufffd", "length")
    assert told == ["a", "b", "\ufffd"]
    assert feed([*b"ab", 0xE2, 0x82])[1] == ["a", "b"]


def test_the_earliest_stop_string_cuts_and_is_never_shown():
    answer, told = feed("answer 7\nQuestion: again", ("Question:", "\n"))
    assert answer.text == "answer 7" == "".join(told)
    assert len(answer.tokens) == len("answer 7\n")
    assert feed("abc", limit=2)[0].finish == "length"


def test_an_answer_may_end_at_once():
    for ends, tokens in (((0, 66), [66]), ((0, 66), [0]), ((), [66])):
        answer, told = feed(tokens, ends=ends, limit=1)
        assert answer.finish == ("eos" if ends else "length")
        assert answer.tokens == tokens
        assert answer.text == ("" if ends else "B") == "".join(told)
    assert feed("x", stop=("x",))[0].text == ""


def test_no_end_token_no_end():
    answer, _ = feed([*b"ab", 0, *b"c"], ends=())
    assert answer.finish is None and answer.text == "abc"


@pytest.mark.parametrize(
    ("written", "stop", "text"),
    [
        ("one<user>two", ("<user>",), "one"),
        ("<user>two", ("<user>",), ""),
        ("one<sep>two<user>three", ("<user>",), "onetwo"),
        ("one\n<user>two", ("\n<user>",), "one"),
        ("one\nx<user>two", ("\n<user>", "zz"), None),
        ("one<user>bob<sep>two", ("<user>bob<sep>",), "one"),
        ("one<user>bo<sep>two", ("<user>bob<sep>",), None),
        ("one<sep>t<user>wo", ("<user>wo", "<sep>x"), "onet"),
        ("a<user>b<user>cd", ("cd", "<user><sep>"), "ab"),
        ("one<user>two", ("user",), None),  # no letters of a special token: nobody sees them
    ],
)
def test_stop_strings_may_hold_special_tokens(written, stop, text):
    shown = {token: each for token, each in SPECIAL.items() if any(each in part for part in stop)}
    answer, told = feed([*tokens_of(written), 0], stop, shown=shown)
    assert answer.finish == ("eos" if text is None else "stop")
    whole = written.replace("<user>", "").replace("<sep>", "")
    assert answer.text == (whole if text is None else text) == "".join(told)


class Stripping(Letters):
    """Drops the first blank of a text, as decoders over "▁" do, and counts what it decodes."""

    decoded = 0

    def decode(self, tokens, **_):
        type(self).decoded += len(tokens)
        return super().decode(tokens).removeprefix(" ")


def test_a_first_blank_is_kept_and_a_token_costs_the_same_however_long_the_answer_is():
    text = AnswerText(Stripping(), list(b"def f(x):\n"))
    costs = []
    written = b"    return x  + 1\n" * 60
    for token in written:
        before = Stripping.decoded
        text.add(token)
        costs.append(Stripping.decoded - before)
    assert text.text == written.decode() and text.certain == len(written)
    assert max(costs[800:]) <= max(costs[:200])


def test_the_tail_of_a_prompt_has_text_and_begins_with_a_character():
    letters = Letters()
    long = list(b"abcdefghijklmnop")
    assert prompt_tail(letters, long) == long[-8:]
    tail = prompt_tail(letters, long + [1] * 20)
    assert tail == (long + [1] * 20)[-len(tail) :] and tail[0] not in SPECIAL
    assert prompt_tail(letters, [1, 2]) == [1, 2]
    split = [*b"x", *"\u20ac".encode(), *b"abcdefg"]  # eight tokens back: its last byte
    tail = prompt_tail(letters, split)
    assert tail == split[-len(tail) :] and letters.decode(tail) == "\u20acabcdefg"


def test_only_special_tokens_of_stop_strings_are_shown():
    class Tokenizer:
        added_tokens_decoder = {
            number: type("Added", (), {"content": text, "special": text != "<tool>"})
            for number, text in enumerate(["<end>", "<user>", "<tool>"])
        }

    assert shown_tokens((), Tokenizer()) == {}
    assert shown_tokens(("\n<user>", "<tool>", "user"), Tokenizer()) == {1: "<user>"}
