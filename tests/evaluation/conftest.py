"""A tiny model that sees 96 tokens, for tests of lm-evaluation-harness."""

import pytest

from drlora_jax.config import MeshSection
from drlora_jax.inference.model import load_base
from tests.support.tiny import OLMOE, write_tiny_model


@pytest.fixture(scope="module")
def lm_eval():
    return pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return write_tiny_model(folder, OLMOE | {"max_position_embeddings": 96})


@pytest.fixture(scope="module")
def loaded(directory):
    return load_base(str(directory), mesh=MeshSection(data=1))
