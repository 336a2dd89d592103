"""Whole data sets: their documents, what is reported of them, and what is refused."""

import json

import numpy as np
import pytest

from drlora_jax.config import DataSection
from drlora_jax.data.documents import load_documents
from drlora_jax.errors import UserError
from tests.support.byte_tokenizer import EOS, TOKENIZER, make_tokenizer


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
        message = f"the text has {token}remove it, or set data.special_tokens=split"
    with pytest.raises(UserError, match=message):
        load_documents(config, tokenizer, 64, vocab_size=size)


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
    assert (
        report.lines()[1] == "format prompt_response (detected from the first row), template plain"
    )
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
    said = " (the tokenizer has its own chat template: data.template=tokenizer)"
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
        ({"data": [GOOD]}, {}, "'data' is a list of rows: write one of its objects per line"),
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
    with pytest.raises(UserError, match="jsonl:1: data.format=auto cannot detect"):
        _load(tmp_path, [{"a": "b"}])
