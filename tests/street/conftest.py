"""Tokenizers with chat templates that we did not shape."""

import copy
import datetime

import pytest
import transformers

from tests.street.chat_templates import KINDS
from tests.street.writing import DATE, set_clock

MODEL = "drlora_jax/bundled/tiny_moe"


@pytest.fixture(scope="module")
def load(request):
    """A tokenizer with the control tokens that a chat template is made for."""
    bundled = transformers.AutoTokenizer.from_pretrained(request.config.rootpath / MODEL)

    def make(template, tokens=()):
        tokenizer = copy.deepcopy(bundled)
        tokenizer.chat_template = template
        tokenizer.bos_token = "<|padding|>"
        if tokens:
            tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
        return tokenizer

    return make


@pytest.fixture(scope="module")
def tokenizers(load):
    return {name: load(kind.template, kind.tokens) for name, kind in KINDS.items()}


@pytest.fixture
def the_date(monkeypatch):
    """What transformers itself renders has the style's date, too."""
    set_clock(monkeypatch, datetime.datetime.fromisoformat(DATE))
