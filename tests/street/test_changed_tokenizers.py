"""Tokenizers that changed since the training: refused, or said and done without."""

import json
import shutil

import pytest

from drlora_jax.config import TrainConfig
from drlora_jax.data.tokenize import load_tokenizer
from drlora_jax.errors import UserError
from drlora_jax.evaluation import jobs
from drlora_jax.evaluation.records import Settings
from drlora_jax.evaluation.tasks import TASKS, Work
from tests.street.asking import Run, asked, chat_row
from tests.street.chat_templates import KINDS


def edited(base, tmp_path, name, change):
    folder = shutil.copytree(base, tmp_path / "edited", dirs_exist_ok=True)
    values = json.loads((folder / name).read_text())
    change(values)
    (folder / name).write_text(json.dumps(values))
    return folder


def test_changed_ids_are_refused(tmp_path):
    run = Run(tmp_path, "gpt_neox", KINDS["qwen2"].template, [chat_row()])

    def swap(values):
        vocabulary = values["model"]["vocab"]
        a, b = list(vocabulary)[300:302]
        vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]

    with pytest.raises(UserError, match="its vocabulary has changed"):
        run.words(edited(run.base, tmp_path, "tokenizer.json", swap))
    shutil.rmtree(tmp_path / "edited")
    lower = {"type": "Lowercase"}
    change = edited(run.base, tmp_path, "tokenizer.json", lambda v: v.update(normalizer=lower))
    with pytest.raises(UserError, match="way to split texts has changed"):
        run.words(change)


def test_control_tokens_that_came_later_are_said_and_not_used(tmp_path):
    """As where someone adds a token for padding: all ids of the training are as they were."""
    run = Run(tmp_path, "gpt_neox", KINDS["qwen2"].template, [chat_row()])
    pad = load_tokenizer(run.base).pad_token
    change = edited(
        run.base, tmp_path, "tokenizer_config.json", lambda v: v.update(pad_token="[P]")
    )
    words = run.words(change)
    [note] = words.notes
    assert "the token [P] (" in note
    assert note.endswith("added since the training of runs/it, which does not use it")
    assert words.tokenizer.pad_token == pad
    [prompt] = asked(words, [chat_row()], tmp_path)
    assert prompt.ids == run.prefix()


def test_a_changed_template_is_said_and_the_stored_one_used(tmp_path):
    run = Run(tmp_path, "gpt_neox", KINDS["qwen2"].template, [chat_row()])
    other = edited(
        run.base,
        tmp_path,
        "tokenizer_config.json",
        lambda values: values.update(chat_template=KINDS["zephyr"].template),
    )
    words = run.words(other)
    assert any("chat template" in note and "own is used" in note for note in words.notes)
    [prompt] = asked(words, [chat_row()], tmp_path)
    assert prompt.ids == run.prefix()


def test_a_chat_template_that_came_later_is_not_used(tmp_path):
    """`auto` took tulu, as there was none; held-out rows and a resume are written so, too."""
    run = Run(tmp_path, "gpt_neox", None, [chat_row()])
    template = KINDS["qwen2"].template
    other = edited(
        run.base, tmp_path, "tokenizer_config.json", lambda v: v.update(chat_template=template)
    )
    words = run.words(other)
    assert any("has a chat template now, but had none" in note for note in words.notes)
    [prompt] = asked(words, [chat_row()], tmp_path)
    assert prompt.ids == run.prefix()
    file = tmp_path / "heldout.jsonl"
    file.write_text(json.dumps(chat_row()) + "\n")
    texts = jobs.make_texts(Settings(), TrainConfig(), words)
    [item] = TASKS["loss"].items(Work(str(file), [], [], Settings(), texts))
    assert item.document.tokens.tolist() == run.documents[0].tokens.tolist()


def test_changed_ends_are_said_and_the_stored_ones_used(tmp_path):
    run = Run(tmp_path, "gpt_neox", KINDS["qwen2"].template, [chat_row()])
    other = edited(
        run.base,
        tmp_path,
        "tokenizer_config.json",
        lambda values: values.update(eos_token="<|im_end|>"),
    )
    words = run.words(other)
    assert any("end tokens" in note for note in words.notes)
    assert words.end_token_ids == run.words().end_token_ids
    assert words.tokenizer.eos_token_id == run.words().tokenizer.eos_token_id


def test_files_that_are_laid_out_otherwise_are_the_same_tokenizer(tmp_path):
    run = Run(tmp_path, "gpt_neox", KINDS["qwen2"].template, [chat_row()])
    other = edited(
        run.base,
        tmp_path,
        "tokenizer.json",
        lambda values: values.update(dict(reversed(list(values.items())))),
    )
    assert run.words(other).notes == ()
