"""The stored tokenizers are small and keep their pipelines, and the tool that shortens does so."""

import base64
import json
import pathlib
import sys

import pytest
from tokenizers import Tokenizer

from tests.street.made import STORED

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(ROOT / "tools"))
    import trim_tokenizer

    yield trim_tokenizer
    sys.path.remove(str(ROOT / "tools"))


def _stored(kind: str) -> dict:
    return json.loads((HERE / "tokenizers" / kind / "tokenizer.json").read_text())


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "qwen3", "smollm2"])
def test_stored_tokenizers_are_small_and_whole(tool, kind):
    assert kind in STORED
    folder = HERE / "tokenizers" / kind
    assert (folder / "tokenizer.json").stat().st_size <= 30_000
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    assert settings == tool.SETTINGS[kind]
    values = _stored(kind)
    if kind in tool.RANKED:
        published = tool.RANKED[kind]
        assert {part: values[part] for part in PARTS} == {part: published[part] for part in PARTS}
        contents = [[t["content"] for t in each["added_tokens"]] for each in (values, published)]
        assert contents[0] == contents[1]
    own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "Tom's 3 café  日本\n\tdef f(x):"
    assert own.decode(own.encode(text).ids) == text
    assert own.token_to_id(settings["eos_token"]) is not None


def test_shortening_keeps_everything_but_later_merges(tool):
    whole = json.loads((ROOT / "drlora_jax/bundled/tiny_moe/tokenizer.json").read_text())
    text, merges = tool.shorten(whole)
    short = json.loads(text)
    assert len(text.encode()) <= 30_000 and merges <= 1500
    assert {part: short[part] for part in PARTS} == {part: whole[part] for part in PARTS}
    pairs = [m.split(" ") if isinstance(m, str) else m for m in whole["model"]["merges"]]
    assert [m.split(" ") for m in short["model"]["merges"]] == pairs[:merges]
    assert sorted(short["model"]["vocab"].values()) == list(range(len(short["model"]["vocab"])))
    own = Tokenizer.from_str(text)
    assert own.decode(own.encode("Tom<|user|>é 3").ids, skip_special_tokens=False) == (
        "Tom<|user|>é 3"
    )


def test_merges_of_ranked_tokens(tool):
    model = _stored("gpt2")["model"]
    letters = {letter: byte for byte, letter in tool.byte_letters().items()}
    lines = [
        base64.b64encode(bytes(letters[each] for each in token)) + b" %d" % rank
        for token, rank in model["vocab"].items()
    ]
    found = tool.from_ranks(b"\n".join(lines))
    assert found["vocab"] == model["vocab"]
    assert [" ".join(merge) for merge in found["merges"]] == model["merges"]
