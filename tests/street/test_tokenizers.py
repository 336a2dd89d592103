"""Tokenizers that we did not make: ids, texts and spans are those of their own tokenizer.json.

What is expected comes from `tokenizers.Tokenizer.from_file`. The matrix takes every kind with every
class and every edit, every class with every edit, and the model types in turn.
"""

import itertools
import json
import random

import numpy as np
import pytest
from tokenizers import Tokenizer

from drlora_jax.data.segments import GUARD, Segment, Written, guard
from drlora_jax.data.tokenize import (
    check_row_tokens,
    decode_after,
    encode_document,
    encode_documents,
    encode_prompt,
    load_tokenizer,
    prompt_tail,
)
from tests.street.made import CODE, CONTROLS, KINDS, directory

CLASSES = (
    "GPT2Tokenizer",
    "GPTNeoXTokenizer",
    "LlamaTokenizer",
    "PreTrainedTokenizerFast",
    "Qwen2Tokenizer",
    None,
)
MODEL_TYPES = ("olmoe", "llama", "mixtral")
WORDS = (
    "Tom",
    " has",
    "  ",
    "\n",
    "\n    ",
    " 31",
    "é",
    "日本",
    " ﬁ",
    ".",
    " don",
    "'t",
    "😀",
    CODE,
)
TEXTS = (
    "Tom has 3 apples and 1234 pears",
    "  two  blanks\n\n\tand CAPITALS",
    "<s>[INST] café ﬁne ｆｕｌｌ </s> x<|im_end|>\n<|im_start|> y",
    CODE,
    "日本語 😀 e\u0301",
)


def _in_front(values: dict, part: str, parts: str, first: dict) -> None:
    have = [values[part]] if values[part] else []
    values[part] = {"type": "Sequence", parts: [first, *have]}


def _normalized(kind: str):
    return lambda values: _in_front(values, "normalizer", "normalizers", {"type": kind})


def _split(first: dict):
    return lambda values: _in_front(values, "pre_tokenizer", "pretokenizers", first)


BLANKS = {"type": "Split", "pattern": {"String": " "}, "behavior": "Isolated", "invert": False}
EDITS = {
    "none": lambda values: None,
    "split digits": _split({"type": "Digits", "individual_digits": True}),
    "lower case": _normalized("Lowercase"),
    "NFKC": _normalized("NFKC"),
    "split at blanks": _split(BLANKS),
    "decoder": lambda values: values.update(decoder={"type": "Fuse"}),
}
MATRIX = [
    (kind, tokenizer_class, list(EDITS)[(i + j) % len(EDITS)], MODEL_TYPES[(i + 2 * j) % 3])
    for (i, kind), (j, tokenizer_class) in itertools.product(enumerate(KINDS), enumerate(CLASSES))
]


def _written(folder, kind, tokenizer_class, edit, model_type):
    folder = directory(folder, kind)
    file = folder / "tokenizer.json"
    values = json.loads(file.read_text())
    EDITS[edit](values)
    file.write_text(json.dumps(values))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("tokenizer_class")
    if tokenizer_class:
        settings["tokenizer_class"] = tokenizer_class
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder, settings


@pytest.mark.parametrize("kind, tokenizer_class, edit, model_type", MATRIX)
def test_ids_and_texts_are_the_files_own(tmp_path, kind, tokenizer_class, edit, model_type):
    folder, settings = _written(tmp_path, kind, tokenizer_class, edit, model_type)
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    loaded = load_tokenizer(folder)
    for text, special in itertools.product(TEXTS, (False, True)):
        wanted = own.encode(text, add_special_tokens=special).ids
        assert loaded(text, add_special_tokens=special).input_ids == wanted
        for skip in (False, True):
            shown = loaded.decode(wanted, skip_special_tokens=skip)
            assert shown == own.decode(wanted, skip_special_tokens=skip)
    assert loaded.eos_token == settings["eos_token"]
    assert loaded.eos_token_id == own.token_to_id(settings["eos_token"])
    assert loaded.model_max_length == settings["model_max_length"]


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def loaded(kind, tmp_path_factory):
    """(tokenizer, own) of one kind."""
    folder = directory(tmp_path_factory.mktemp("kinds"), kind)
    return load_tokenizer(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))


def _without_start(ids: list[int], tokenizer) -> list[int]:
    start = encode_prompt("", tokenizer)
    assert ids[: len(start)] == start
    return ids[len(start) :]


def _some_texts(count: int, words=WORDS, seed=0) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(words, k=draw.randint(1, 12))) for _ in range(count)]


def test_documents_at_once_are_those_one_by_one(loaded):
    tokenizer, own = loaded
    texts = _some_texts(30, (*WORDS, *CONTROLS))
    written = [Written([Segment(text, False), Segment(text, True)], False) for text in texts]
    written[3] = Written([Segment(guard(texts[3], tokenizer), True)], True)
    for each, one in zip(encode_documents(written, tokenizer, "response"), written, strict=True):
        alone = encode_document(one, tokenizer, "response")
        np.testing.assert_array_equal(each.tokens, alone.tokens)
        np.testing.assert_array_equal(each.is_target, alone.is_target)
    for text in texts:
        wanted = own.encode(text, add_special_tokens=False).ids
        # A text may begin with the control token that texts begin with.
        assert encode_prompt(text, tokenizer) in (wanted, encode_prompt("", tokenizer) + wanted)


def test_guards_change_nothing_but_guarded_tokens(loaded):
    """A guard in an ordinary word, so the copy with aliases is used: the template's control tokens
    become what the file makes of them, with the same splits around them.
    """
    tokenizer, own = loaded
    controls = [t.content for t in own.get_added_tokens_decoder().values() if t.special]
    for text in _some_texts(60, (*WORDS, *controls)):
        text = f"{text} Tom"
        guarded = f"{text[:-1]}{GUARD}m"
        wanted = own.encode(text, add_special_tokens=False).ids
        ids = encode_prompt([Segment(guarded, False)], tokenizer)
        assert ids in (wanted, encode_prompt("", tokenizer) + wanted)


def test_users_control_tokens_are_ordinary_text(loaded):
    tokenizer, own = loaded
    controls = {i: t.content for i, t in own.get_added_tokens_decoder().items() if t.special}
    unknown = tokenizer.unk_token_id  # may be one of them
    for text in controls.values():
        user = guard(f"The token {text} is {text}{text}, ends {text}", tokenizer)
        segments = [Segment(f"<|user|>{user}", False), Segment("<|assistant|>", False)]
        ids = encode_prompt([*segments, Segment(user, True)], tokenizer)
        ids = _without_start(ids, tokenizer)
        found = [controls[i] for i in ids if i in controls and i != unknown]
        assert found == ["<|user|>", "<|assistant|>"]
        document = encode_document([Segment(user, True)], tokenizer, "response")
        ids = _without_start(document.tokens.tolist(), tokenizer)
        assert ids.index(tokenizer.eos_token_id) == len(ids) - 1 and document.is_target[-1]


def test_users_control_tokens_as_tokenizers_splits_them(loaded, kind):
    """`encode_special_tokens` says the same, but Unigram takes control tokens for words there."""
    tokenizer, own = loaded
    own = Tokenizer.from_str(own.to_str())
    own.encode_special_tokens = True
    for text in CONTROLS if kind == "unigram" else (*CONTROLS, tokenizer.eos_token):
        user = f"The token {text} is {text}{text}"
        wanted = own.encode(user, add_special_tokens=False).ids
        ids = encode_prompt([Segment(guard(user, tokenizer), False)], tokenizer)
        assert _without_start(ids, tokenizer) == wanted


def test_text_behind_a_prompt(loaded):
    """Prompt and answer cut out of one text, an answer tokenised alone, and any ids at all."""
    tokenizer, own = loaded
    draw, longest = random.Random(1), 0
    for place, text in enumerate(_some_texts(150, (*WORDS, *CONTROLS))):
        ids = encode_prompt(text, tokenizer)
        cut = draw.randint(1, len(ids)) if place % 3 == 0 else len(ids)
        prompt, new = ids[:cut], ids[cut:]
        if place % 3 == 1:
            new = encode_prompt(_some_texts(1, seed=place)[0], tokenizer)
        if place % 3 == 2:
            new = draw.choices(range(own.get_vocab_size()), k=5)
        before, whole = own.decode(prompt), own.decode([*prompt, *new])
        got = decode_after(tokenizer, prompt, new)
        if not whole.startswith(before):  # a character begins in the prompt
            before = before.rstrip("\ufffd")
        if whole.startswith(before):
            assert before + got == whole
        assert decode_after(tokenizer, prompt_tail(tokenizer, prompt), new) == got
        longest = max(longest, len(prompt_tail(tokenizer, prompt)))
    assert longest < 40


def test_first_blanks_of_an_answer_are_kept(loaded):
    tokenizer, own = loaded
    ids = own.encode("def f(x):\n    return x + 1", add_special_tokens=False).ids
    answers = [decode_after(tokenizer, ids[:cut], ids[cut:]) for cut in range(1, len(ids))]
    for cut, answer in enumerate(answers, start=1):
        assert own.decode(ids[:cut]) + answer == own.decode(ids)
    assert any(a[0] == " " and a.lstrip(" ").startswith("return x") for a in answers)


def test_half_characters(loaded, kind):
    tokenizer, own = loaded
    prompt = encode_prompt("Tom is", tokenizer)
    ids = encode_prompt("Tom is 😀", tokenizer)
    assert ids[: len(prompt)] == prompt
    new = ids[len(prompt) :]
    shown = [decode_after(tokenizer, prompt, new[:end]) for end in range(len(new) + 1)]
    if kind in ("unigram", "wordpiece"):  # they do not know the character
        assert "�" not in "".join(shown)
        return
    assert len(new) > 1 and shown[0] == "" and shown[-1] == " 😀"
    assert {*"".join(shown[1:-1])} == {" ", "�"}


def test_rows_without_tokens_beyond_the_table(loaded):
    tokenizer, own = loaded
    check_row_tokens([], tokenizer, 1)
    check_row_tokens(np.arange(own.get_vocab_size()), tokenizer, own.get_vocab_size())
