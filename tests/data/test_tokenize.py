"""Tokens and target masks of documents, and whole data sets, with a tiny byte-level tokenizer."""

import json
from collections import Counter

import numpy as np
import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from drlora_jax.config import DataSection
from drlora_jax.data.documents import load_documents
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

CORPUS = ["the answer is 42.", "Question: how many? Answer: the number is four.", "a b  c\n\nd é"]
BOS, EOS = 0, 1


def make_tokenizer(*, adds_bos=False, adds_eos=False, chat_template=None, eos_token="</s>"):
    """Byte-level BPE with merges across spaces, as the tokenizers of most models have."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS * 3, trainer)
    if adds_bos or adds_eos:
        single = "<s> " * adds_bos + "$A" + " </s>" * adds_eos
        core.post_processor = tokenizers.processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token=eos_token, chat_template=chat_template
    )


TOKENIZER = make_tokenizer()
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
        UserError, match=rf"{size} embedding rows, none for the token <extra> \({size}"
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


@pytest.mark.parametrize("special", ["auto", "keep"])
def test_a_template_that_writes_a_token_without_an_embedding(tmp_path, special):
    """No setting of the row's own text helps there."""
    tokenizer = make_tokenizer()
    size = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "the", "response": "answer"}\n')
    config = DataSection(path=(str(path),), template="chatml", special_tokens=special)
    token = rf"the token <\|im_end\|> \({size}\), but the model has {size} embedding rows; "
    message = f"data.template=chatml writes {token}use .* or another data.template"
    if special == "keep":  # then the text may have it, too
        message = f"the text has {token}take it out, or set data.special_tokens=split"
    with pytest.raises(UserError, match=message):
        load_documents(config, tokenizer, 64, vocab_size=size)


def test_an_end_without_an_embedding_is_refused():
    tokenizer = make_tokenizer()
    size = len(tokenizer)
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    with pytest.raises(UserError, match=rf"none for the token <\|end\|> \({size}\)"):
        check_vocabulary(tokenizer, size)


def _load(tmp_path, rows, *, length=32, evaluation=False, **options):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataSection(**({"path": (str(path),), "eval_path": (str(path),)} | options))
    return load_documents(config, TOKENIZER, length, evaluation=evaluation)


GOOD = {"prompt": "how many?", "response": "four"}
LONG = {"prompt": "a", "response": "x y z " * 20}


def test_data_set_and_its_report(tmp_path):
    documents, report = _load(tmp_path, [GOOD, GOOD | {"response": "42."}])
    text = "how many?\nfour"
    assert documents[0].tokens.tolist() == [*TOKENIZER(text).input_ids, EOS]
    assert (report.rows_read, report.rows_kept, report.documents) == (2, 2, 2)
    assert report.tokens == sum(len(each.tokens) for each in documents)
    assert report.target_tokens == sum(each.is_target.sum() for each in documents)
    assert report.lines()[1] == "format prompt_response (found from the first row), template plain"
    assert not any("warning" in line or "skipped" in line for line in report.lines())


@pytest.mark.parametrize("template", ["plain", "tulu", "tokenizer"])
@pytest.mark.parametrize("special_tokens", ["split", "keep"])
def test_rows_with_control_tokens_are_counted(tmp_path, monkeypatch, special_tokens, template):
    """In the texts of the row; those that the template writes are meant."""
    chat = (
        "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant:{% endif %}"
    )
    monkeypatch.setattr(TOKENIZER, "chat_template", chat)
    rows = [GOOD, GOOD | {"prompt": "a</s>b"}, GOOD | {"response": "<s>"}, GOOD | {"id": "</s>"}]
    options = {"special_tokens": special_tokens, "template": template}
    _, report = _load(tmp_path, rows, **options)
    assert report.guarded == 2
    assert any(line.startswith("2 rows have control tokens") for line in report.lines())


@pytest.mark.parametrize("end", ["", "</s>"])
def test_answers_that_the_template_does_not_end(tmp_path, monkeypatch, end):
    chat = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "{% if m.role == 'assistant' %}END{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    ).replace("END", end)
    monkeypatch.setattr(TOKENIZER, "chat_template", chat)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "four"}]
    for count in (1, 2):
        rows = [{"messages": turns * count}] * 2
        _, report = _load(tmp_path, rows, template="tokenizer", length=100)
        found = [line for line in report.lines() if "several answers" in line]
        assert len(found) == (count == 2 and not end)
        assert not found or found[0].startswith("2 rows with several answers: the template ends")


TURN = "{% for m in messages %}{{ m.role + ':' + m.content + '</s>' }}{% endfor %}"
ASKING = "{% if add_generation_prompt %}assistant:THE_OPENING{% endif %}"


@pytest.mark.parametrize(
    ("template", "opening"),
    [
        (TURN + ASKING.replace("THE_OPENING", ""), None),
        (TURN, "assistant:"),
        (TURN + ASKING.replace("THE_OPENING", "<think>\n"), "\n</think>\n\n"),
    ],
    ids=["complete", "no generation prompt", "opens thinking"],
)
def test_words_that_answers_learn_to_begin_with_are_said(tmp_path, template, opening):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "response": "four"}))
    config = DataSection(path=(str(tmp_path / "rows.jsonl"),), template="tokenizer")
    tokenizer = make_tokenizer(chat_template=template)
    [document], report = load_documents(config, tokenizer, 64)
    assert tokenizer.decode(document.tokens[document.is_target]) == f"{opening or ''}four</s>"
    said = [line for line in report.lines() if "learn to begin" in line]
    assert [repr(opening) in line for line in said] == [True] * (opening is not None)


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("writes", ["", "{{ bos_token }}"])
def test_a_first_token_that_the_chat_template_does_not_write_is_said(tmp_path, adds_bos, writes):
    """transformers' own ids say whether there is one."""
    tokenizer = make_tokenizer(adds_bos=adds_bos, chat_template=writes + TURN)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "response": "four"}))
    config = DataSection(path=(str(tmp_path / "rows.jsonl"),), template="tokenizer")
    [document], report = load_documents(config, tokenizer, 64)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "four"}]
    theirs = tokenizer.apply_chat_template(turns, return_dict=False)
    is_said = any(line.startswith("documents begin with <s>") for line in report.lines())
    assert is_said == (document.tokens.tolist() != theirs) == (adds_bos and not writes)


@pytest.mark.parametrize("template", ["tulu", "chatml", "auto", "tokenizer", "plain"])
@pytest.mark.parametrize("has_own", [True, False])
def test_a_chat_template_that_is_passed_over_is_said(tmp_path, template, has_own):
    if template == "tokenizer" and not has_own:
        return
    own = "{% for m in messages %}{{ m.content }}{% endfor %}" if has_own else None
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + "\n")
    config = DataSection(path=(str(path),), template=template, format="prompt_response")
    report = load_documents(config, make_tokenizer(chat_template=own), 64).report
    said = " (the tokenizer has a chat template of its own: data.template=tokenizer)"
    is_said = has_own and template in ("tulu", "chatml")
    assert report.lines()[1].endswith(said) == is_said
    if is_said:
        assert report.lines()[1] == f"format prompt_response, template {template}{said}"


def test_own_field_names(tmp_path):
    options = {"prompt_field": "question", "response_field": "answer"}
    documents, report = _load(tmp_path, [{"question": "a", "answer": "b"}], **options)
    [wording] = report.wordings.values()
    assert len(documents) == 1 and wording.format == "prompt_response"


def test_bad_rows(tmp_path):
    rows = [GOOD, {"prompt": "a"}, GOOD, GOOD | {"response": ""}, GOOD | {"response": 3}]
    with pytest.raises(
        UserError, match=r"rows.jsonl:2: field 'response' is missing, .*bad_rows=skip"
    ):
        _load(tmp_path, rows)
    documents, report = _load(tmp_path, rows, bad_rows="skip")
    assert len(documents) == report.rows_kept == 2
    assert report.skipped == {"missing field": 1, "empty response": 1, "wrong type": 1}
    lines = report.lines()
    assert lines[-1] == "warning: 3 of 5 rows (60.0 %) were skipped"
    assert any("missing field (first: " in line and "rows.jsonl:2: field" in line for line in lines)


def test_rows_of_two_formats_in_one_file(tmp_path):
    rows = [GOOD, {"messages": [{"role": "user", "content": "a"}]}, {"text": "b"}]
    with pytest.raises(
        UserError, match=r"jsonl:2: this row has the format chat, .* first row prompt_response; "
    ):
        _load(tmp_path, rows)
    _, report = _load(tmp_path, rows, bad_rows="skip")
    assert report.skipped == {"another format": 2}
    # A format that the config gives is not found from the first row.
    with pytest.raises(UserError, match="jsonl:2: field 'prompt' is missing"):
        _load(tmp_path, rows, format="prompt_response")


@pytest.mark.parametrize(
    ("row", "options", "way"),
    [
        (GOOD, {}, "set data.prompt_field=prompt for rows like this one"),
        ({"text": "a"}, {}, "set data.format=auto for rows like this one"),
        ({"question": "a", "answer": "b"}, {}, "set data.prompt_field=question data.response_f"),
        ({"data": [GOOD]}, {}, "'data' is a list of rows: write its objects one a line"),
        (GOOD, {"format": "text"}, "set data.format=auto data.prompt_field=prompt for rows"),
    ],
)
def test_settings_for_other_rows(tmp_path, row, options, way):
    """As when a config that was written for one data set is used with another."""
    options = {"format": "prompt_response", "prompt_field": "query"} | options
    with pytest.raises(UserError, match=f"jsonl:1: field .* is missing, .*; add it, or {way}"):
        _load(tmp_path, [row], **options)
    with pytest.raises(UserError, match=f"no row is left of 2: 2 missing field .*, or {way}"):
        _load(tmp_path, [row] * 2, bad_rows="skip", **options)


def test_nothing_left(tmp_path):
    with pytest.raises(UserError, match="no row is left of 2: 2 empty response"):
        _load(tmp_path, [GOOD | {"response": ""}] * 2, bad_rows="skip")


def test_too_long(tmp_path):
    documents, report = _load(tmp_path, [GOOD, LONG], too_long="truncate")
    assert [len(each.tokens) for each in documents][1] == 32
    assert report.truncated == 1 and EOS not in documents[1].tokens
    assert "truncated 1 row to train.sequence_length" in report.lines()
    documents, report = _load(tmp_path, [GOOD, LONG], too_long="skip")
    assert len(documents) == 1 and report.skipped == {"too long": 1}
    with pytest.raises(
        UserError, match=r"jsonl:2: \d+ tokens, but train.sequence_length is 32; rai"
    ):
        _load(tmp_path, [GOOD, LONG], too_long="stop")
    with pytest.raises(UserError, match="no target token left in the first 32 of"):
        _load(tmp_path, [{"prompt": LONG["response"], "response": "b"}])


@pytest.mark.parametrize("length", [2, 3, 8, 31])
def test_split_predicts_every_token_once(tmp_path, length):
    rows = [{"text": LONG["response"]}]
    (whole,), _ = _load(tmp_path, rows, length=1000, format="text")
    windows, report = _load(tmp_path, rows, length=length, format="text", too_long="split")
    assert report.split == report.rows_kept == 1 and report.documents == len(windows)
    assert max(len(each.tokens) for each in windows) == length
    targets = np.concatenate([each.tokens[each.is_target] for each in windows])
    np.testing.assert_array_equal(targets, whole.tokens[1:])


def test_limits_and_sets(tmp_path):
    rows = [GOOD, GOOD, {"prompt": "bad"}]
    assert len(_load(tmp_path, rows, max_rows=2).documents) == 2
    with pytest.raises(UserError, match="jsonl:3"):  # the limit is of the training set
        _load(tmp_path, rows, max_rows=2, evaluation=True)
    with pytest.raises(UserError, match="data.eval_path is empty"):
        _load(tmp_path, rows, eval_path=(), evaluation=True)
    with pytest.raises(UserError, match="data.path is empty"):
        _load(tmp_path, rows, path=())
    with pytest.raises(UserError, match="sequence_length must be at least 2, got 1"):
        _load(tmp_path, rows, length=1)


def test_format_not_found_names_the_row(tmp_path):
    with pytest.raises(UserError, match="jsonl:1: data.format=auto cannot tell"):
        _load(tmp_path, [{"a": "b"}])
