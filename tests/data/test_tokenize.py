"""Tokens and target masks of documents, with a tiny byte-level tokenizer."""

from collections import Counter

import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from drlora_jax.data.segments import GUARD, BadRow, Segment, Written, guard
from drlora_jax.data.tokenize import (
    CUT_STARTS,
    check_row_tokens,
    check_vocabulary,
    encode_document,
    encode_documents,
    encode_prompt,
    load_tokenizer,
    pad_token,
)
from drlora_jax.errors import UserError
from tests.support.byte_tokenizer import BOS, EOS, TOKENIZER, make_tokenizer

TEXT = st.text(alphabet="the answ\n.é€4:", max_size=12)
SEGMENTS = st.lists(st.builds(Segment, TEXT, st.booleans()), max_size=5)


def _owners(segments) -> list[bool]:
    """For every byte of the text, whether it belongs to a response."""
    return [s.is_response for s in segments for _ in s.text.encode()]


@settings(max_examples=150, deadline=None)
@given(segments=SEGMENTS)
def test_responses_byte_by_byte(segments):
    document = encode_document(segments, TOKENIZER, "response")
    text = "".join(segment.text for segment in segments)
    ids = TOKENIZER(text, add_special_tokens=False).input_ids
    whole = encode_document(segments, TOKENIZER, "all")
    assert whole.tokens.tolist() == [*ids, EOS]
    assert document.tokens.dtype == np.int32 and document.is_target.dtype == bool
    words = TOKENIZER.convert_ids_to_tokens(document.tokens[:-1])
    assert "".join(words) == "".join(TOKENIZER.convert_ids_to_tokens(ids))
    # A byte-level token has one letter for each of its bytes.
    owners, start = _owners(segments), 0
    for i, token in enumerate(words):
        own = owners[start : start + len(token)]
        start += len(token)
        if all(own) and not _is_cut(segments, start - len(token), start):
            assert document.is_target[i] == (i > 0)
        if not any(own):
            assert not document.is_target[i]
        if len(set(own)) == 2:
            assert not document.is_target[i]
    assert start == len(owners)
    # The end is learned where an answer ends, not behind a turn that is not.
    answered = not segments or segments[-1].is_response
    assert document.is_target[-1] == (len(document.tokens) > 1 and answered)


def _is_cut(segments, start: int, end: int) -> bool:
    """Whether the bytes start..end lie in two segments: two responses meet, either is right."""
    borders = np.cumsum([len(segment.text.encode()) for segment in segments])
    return bool(((borders > start) & (borders < end)).any())


def test_no_token_lies_across_the_border():
    """Alone, the prompt ends in a blank; as one text, the blank is part of the next token."""
    segments = [Segment("Answer: ", False), Segment("the end", True)]
    assert "Ġthe" in TOKENIZER.convert_ids_to_tokens(TOKENIZER("Answer: the end").input_ids)
    document = encode_document(segments, TOKENIZER, "response")
    prompt = encode_prompt("Answer: ", TOKENIZER)
    assert document.tokens[: len(prompt)].tolist() == prompt
    assert TOKENIZER.decode(document.tokens[:-1]) == "Answer: the end"
    assert not document.is_target[: len(prompt)].any() and document.is_target[len(prompt) :].all()
    # Behind the token that was across, ids are those of the whole text.
    whole = TOKENIZER("Answer: the end").input_ids
    size = len(TOKENIZER(" end").input_ids)
    assert document.tokens[-1 - size : -1].tolist() == whole[-size:]


def test_loss_on_all():
    document = encode_document([Segment("the answer", False)], TOKENIZER, "all")
    assert not document.is_target[0] and document.is_target[1:].all()


@pytest.mark.parametrize("text", ["the answer", "<s>the answer"])
def test_bos_is_there_exactly_if_the_tokenizer_adds_it(text):
    def bos_count(tokenizer) -> int:
        tokens = encode_document([Segment(text, True)], tokenizer, "response").tokens.tolist()
        assert tokens[:-1] == encode_prompt(text, tokenizer)
        return tokens.count(BOS)

    assert bos_count(make_tokenizer(adds_bos=True)) == 1
    assert bos_count(make_tokenizer(adds_bos=True, adds_eos=True)) == 1
    assert bos_count(make_tokenizer()) == text.count("<s>")
    assert bos_count(make_tokenizer(adds_eos=True)) == text.count("<s>")


def test_end_that_is_also_bos_is_not_put_in_front():
    tokenizer = make_tokenizer(adds_eos=True)
    tokenizer.bos_token = "</s>"
    assert EOS not in encode_prompt("the answer", tokenizer)


def test_end_is_there_once_and_learned():
    for text in ("the", "the</s>"):
        document = encode_document(
            [Segment("a", False), Segment(text, True)], TOKENIZER, "response"
        )
        assert document.tokens.tolist().count(EOS) == 1
        assert document.tokens[-1] == EOS and document.is_target[-1]


def test_tokenizer_without_end_is_refused():
    with pytest.raises(UserError, match="no eos token"):
        encode_document([Segment("a", True)], make_tokenizer(eos_token=None), "response")


def test_without_offsets_segments_are_tokenised_apart(monkeypatch):
    tokenizer = make_tokenizer()
    segments = [Segment("the answer", False), Segment(" is", True)]
    whole = encode_document(segments, tokenizer, "response")
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    apart = encode_document(segments, tokenizer, "response")
    np.testing.assert_array_equal(apart.tokens, whole.tokens)
    np.testing.assert_array_equal(apart.is_target, whole.is_target)


def test_what_a_template_has_ended_gets_no_second_end():
    segments = [Segment("the", False), Segment(" answer</s>", True), Segment("\n", False)]
    ended = encode_document(Written(segments, True), TOKENIZER, "response")
    assert ended.tokens.tolist() == TOKENIZER("the answer</s>\n").input_ids
    assert ended.is_target.tolist()[-2:] == [True, False]
    open_one = encode_document(Written(segments, False), TOKENIZER, "response")
    assert open_one.tokens.tolist() == [*ended.tokens, EOS] and not open_one.is_target[-1]


def test_a_users_end_of_text_is_neither_the_end_nor_a_start():
    for text in ("With </s>", "<s></s>"):
        segments = [Segment(guard(text, TOKENIZER), True)]
        ids = encode_document(segments, TOKENIZER, "response").tokens.tolist()
        assert ids.count(EOS) == 1 and ids[-1] == EOS and BOS not in ids
        assert TOKENIZER.decode(ids[:-1]) == text
    with_bos = make_tokenizer(adds_bos=True)
    assert encode_prompt([Segment(guard("<s>a", with_bos), False)], with_bos).count(BOS) == 1


def test_an_end_that_its_file_does_not_mark_special_is_split_too(tmp_path):
    core = make_tokenizer().backend_tokenizer
    core.add_tokens([tokenizers.AddedToken("<end>", special=False, normalized=False)])
    core.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    tokenizer = load_tokenizer(tmp_path)
    end = tokenizer.eos_token_id
    assert not tokenizer.added_tokens_decoder[end].special
    segments = [Segment("a", False), Segment(guard("With <end>", tokenizer) + "<end>", True)]
    ids = encode_document(Written(segments, True), tokenizer, "response").tokens.tolist()
    assert ids.count(end) == 1 and ids[-1] == end
    assert tokenizer.decode(ids[:-1]) == "aWith <end>"


def test_spans_are_not_trimmed():
    """A byte-level post-processor takes the blank off a token's span; the token holds it."""
    trimming = make_tokenizer()
    trimming.backend_tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    segments = [Segment("Answer: ", False), Segment("the number is four.", True)]
    for loss_on in ("response", "all"):
        trimmed = encode_document(segments, trimming, loss_on)
        plain = encode_document(segments, TOKENIZER, loss_on)
        np.testing.assert_array_equal(trimmed.tokens, plain.tokens)
        np.testing.assert_array_equal(trimmed.is_target, plain.is_target)


@settings(max_examples=100, deadline=None)
@given(documents=st.lists(SEGMENTS, max_size=4))
def test_prompts_have_the_ids_that_they_have_alone(documents):
    """In front of every first answer; and nothing of the text is lost."""
    counts = Counter()
    found = encode_documents(documents, TOKENIZER, "response", counts)
    assert counts[CUT_STARTS] == 0
    for segments, document in zip(documents, found, strict=True):
        text = "".join(segment.text for segment in segments)
        words = TOKENIZER.convert_ids_to_tokens(document.tokens)
        expected = TOKENIZER.convert_ids_to_tokens(TOKENIZER(text).input_ids)
        assert "".join(words).removesuffix("</s>") == "".join(expected).removesuffix("</s>")
        answers = [n for n, segment in enumerate(segments) if segment.is_response and segment.text]
        first = answers[0] if answers else 0
        prompt = "".join(segment.text for segment in segments[:first])
        if prompt:
            ids = TOKENIZER(prompt).input_ids
            assert document.tokens[: len(ids)].tolist() == ids


def test_a_border_that_cannot_be_cut_is_counted():
    """A WordPiece token in the middle of a word has another spelling than at its start."""
    words = {"[UNK]": 0, "</s>": 1, "in": 2, "side": 3, "##side": 4, "inside": 5}
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab=words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    pieces = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", unk_token="[UNK]"
    )
    counts = Counter()
    segments = [Segment("in", False), Segment("side in", True)]
    [document] = encode_documents([segments], pieces, "response", counts)
    assert counts[CUT_STARTS] == 1
    assert document.tokens.tolist() == [5, 2, 1] and document.is_target.tolist() == [0, 1, 1]


def test_many_documents_are_in_order(monkeypatch):
    monkeypatch.setattr("drlora_jax.data.tokenize._AT_ONCE", 3)
    texts = [f"the number {i}" for i in range(10)]
    written = [Written([Segment(text, True)], False) for text in texts]
    written[4] = Written([Segment(f"the num{GUARD}ber 4", True)], False)
    found = encode_documents(written, TOKENIZER, "all")
    for document, text in zip(found, texts, strict=True):
        assert document.tokens.tolist() == [*TOKENIZER(text).input_ids, EOS]
    assert encode_documents([], TOKENIZER, "all") == []


def test_without_spans_guarded_tokens_are_split_too(monkeypatch):
    tokenizer = make_tokenizer()
    segments = [Segment("<s>the", False), Segment(guard(" is </s> four", tokenizer), True)]
    whole = encode_document([*segments, Segment("</s>", True)], tokenizer, "response")
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    apart = encode_document([*segments, Segment("</s>", True)], tokenizer, "response")
    assert whole.tokens.tolist().count(EOS) == apart.tokens.tolist().count(EOS) == 1
    assert tokenizer.decode(apart.tokens) == tokenizer.decode(whole.tokens)


def test_tokens_added_after_the_first_text_count():
    tokenizer = make_tokenizer()
    before = encode_prompt("the<new>", tokenizer)
    tokenizer.add_tokens(["<new>"])
    after = encode_prompt("the<new>", tokenizer)
    assert after == tokenizer("the<new>").input_ids != before


def test_a_word_without_an_embedding_is_refused():
    tokenizer = make_tokenizer()
    size = len(tokenizer)
    assert check_vocabulary(tokenizer, size) is None
    tokenizer.add_tokens(["<extra>"])
    with pytest.raises(
        UserError, match=rf"{size} embedding rows, but none for the token <extra> \({size}"
    ):
        check_vocabulary(tokenizer, size)


def test_control_tokens_without_an_embedding():
    """Padding that no row holds is no reason to stop; a row that holds one is."""
    tokenizer = make_tokenizer()
    size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens(["<a>"], special_tokens=True)
    said = check_vocabulary(tokenizer, size)
    assert said == (
        f"no embedding row for the tokens [PAD] ({size}), <a> ({size + 1}) of the tokenizer; "
        "rows are padded with </s>"
    )
    assert pad_token(tokenizer) == size and pad_token(tokenizer, size) == EOS
    assert pad_token(tokenizer, size + 1) == size
    good = encode_document([Segment("the answer", True)], tokenizer, "all")
    check_row_tokens(good.tokens, tokenizer, size)
    bad = encode_document([Segment("the <a> answer", True)], tokenizer, "all")
    with pytest.raises(BadRow, match=rf"the text has the token <a> \({size + 1}\)") as caught:
        check_row_tokens(bad.tokens, tokenizer, size)
    assert caught.value.reason == "token without an embedding"


def test_an_end_without_an_embedding_is_refused():
    tokenizer = make_tokenizer()
    size = len(tokenizer)
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    with pytest.raises(UserError, match=rf"none for the token <\|end\|> \({size}\)"):
        check_vocabulary(tokenizer, size)
