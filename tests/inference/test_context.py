"""Texts longer than what a model was made for: how long that is, and who says so."""

import json

import numpy as np
import pytest

from drlora_jax.config import MeshSection
from drlora_jax.data.tokenize import Document
from drlora_jax.evaluation import loss
from drlora_jax.inference.context import warn_beyond
from drlora_jax.inference.model import load_base
from drlora_jax.inference.scoring import Scorer
from drlora_jax.interop.hf_files import longest_positions
from tests.support.tiny import OLMOE, write_tiny_model

ORIGINAL = "original_max_position_embeddings"


@pytest.mark.parametrize(
    ("values", "longest"),
    [
        ({}, None),
        ({"max_position_embeddings": None}, None),
        ({"max_position_embeddings": "many"}, None),
        ({"max_position_embeddings": True}, None),
        ({"max_position_embeddings": 0}, None),
        ({"max_position_embeddings": 10**400, "rope_scaling": {"rope_type": "yarn"}}, None),
        ({"max_position_embeddings": 1024, "rope_scaling": None}, 1024),
        ({"max_position_embeddings": 1024, "rope_parameters": {"rope_type": "default"}}, 1024),
        ({"max_position_embeddings": 1024, "rope_parameters": {"factor": 4}}, 1024),
        (
            {"max_position_embeddings": 1024, "rope_scaling": {"type": "linear", "factor": "x"}},
            1024,
        ),
        ({"text_config": {"max_position_embeddings": 512}}, 512),
        # As in vicuna-7b-v1.5-16k: what stands there is the length before scaling.
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4}}, 16384),
        (
            {
                "max_position_embeddings": 2048,
                "rope_scaling": {"rope_type": "dynamic", "factor": 2.5},
            },
            5120,
        ),
        # As in Qwen3 with yarn switched on, and in DeepSeek-V3, which counts it already.
        (
            {
                "max_position_embeddings": 40960,
                "rope_parameters": {"rope_type": "yarn", "factor": 4.0, ORIGINAL: 32768},
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 163840,
                "rope_scaling": {"type": "yarn", "factor": 40, ORIGINAL: 4096},
            },
            163840,
        ),
        # As in Llama 3.2: the factor is no longer that of the lengths.
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {"rope_type": "llama3", "factor": 32.0, ORIGINAL: 8192},
            },
            131072,
        ),
        # As in Phi-3: the original length beside the scaling.
        (
            {
                "max_position_embeddings": 131072,
                ORIGINAL: 4096,
                "rope_scaling": {"type": "longrope", "long_factor": [1.0]},
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 8192,
                ORIGINAL: 4096,
                "rope_scaling": {"type": "yarn", "factor": 4.0},
            },
            16384,
        ),
    ],
)
def test_longest_positions(values, longest, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | values))
    assert longest_positions(tmp_path) == longest


def test_the_line_has_both_numbers(tmp_path, capsys):
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "max_position_embeddings": 1024}'
    )
    assert not warn_beyond(tmp_path, 1024, "a row")
    assert capsys.readouterr().err == ""
    assert warn_beyond(tmp_path, 2048, "a row")
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: a row: 2,048 tokens, more than the model's 1,024 positions (")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert not warn_beyond(tmp_path, 10**9, "a row")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A model of 20 positions, 40 with its scaling."""
    changes = {"max_position_embeddings": 20}
    changes["rope_scaling"] = {"rope_type": "linear", "factor": 2.0}
    folder = write_tiny_model(tmp_path_factory.mktemp("model"), OLMOE | changes)
    return load_base(str(folder), mesh=MeshSection(data=1))


def warnings_of(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]


def test_the_loss_names_its_longest_document(loaded, capsys):
    def items(*lengths):
        for number, length in enumerate(lengths, 1):
            is_target = np.arange(length) > 0
            yield loss.Item(str(number), Document(np.full(length, 7, np.int32), is_target))

    # Rows of 64 tokens, but no document of more than 40.
    loss.answer_items(loaded, list(items(40, 9)), length=64, batch_size=1)
    assert warnings_of(capsys) == []
    loss.answer_items(loaded, list(items(9, 41, 12)), length=64, batch_size=1)
    [line] = warnings_of(capsys)
    assert line.startswith("warning: document 2 of the loss: 41 tokens, more than the model's 40 ")


def test_a_scorer_says_it_once(loaded, capsys):
    score = Scorer(loaded, batch_size=1, max_length=64)
    score([([7] * 38, [8] * 3)])  # the last token is predicted, not read
    assert warnings_of(capsys) == []
    for _ in range(2):
        score([([7] * 39, [8] * 3), ([7], [8])])
    [line] = warnings_of(capsys)
    assert "41 tokens, more than the model's 40" in line
    # What is cut off does not count.
    Scorer(loaded, batch_size=1, max_length=40)([([7] * 90, [8])])
    assert warnings_of(capsys) == []
