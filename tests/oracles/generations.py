"""Greedy answers that transformers wrote for model directories that name end tokens in every way.

Read without torch. `make_generations.py` writes `data/generations.json`: the prompts' token ids,
and for every case the tokens behind each prompt. The model is the bundled one.
"""

import json
import pathlib
import shutil
from typing import NamedTuple

BUNDLED = pathlib.Path(__file__).parents[2] / "drlora_jax" / "bundled" / "tiny_moe"
STORED = pathlib.Path(__file__).parent / "data" / "generations.json"
NEW_TOKENS = 20
PROMPTS = (
    "Once upon a time",
    "Tom has 3 apples and",
    "What is 3 plus 4?\n",
    "One day, a dog",
    "The little girl was very",
)
END_OF_TEXT, LITTLE, SPACES, EXCITED = 0, 550, 1891, 1075  # ids of the bundled vocabulary
NO_ROW = 4096  # an id of no embedding row


class Case(NamedTuple):
    """`eos_token_id` of the two files (None: not there), and if the tokenizer names its own."""

    generation_config: int | list[int] | None = None
    config: int | list[int] | None = None
    has_eos: bool = False

    @property
    def ends(self) -> tuple[int, ...]:
        """What answers end at: all of them."""
        named = [END_OF_TEXT] if self.has_eos else []
        for given in (self.generation_config, self.config):
            named += given if isinstance(given, list) else [] if given is None else [given]
        return tuple(dict.fromkeys(token for token in named if token != NO_ROW))


CASES = {
    "generation_config_list": Case(generation_config=[LITTLE, SPACES]),
    "config_list": Case(config=[LITTLE, SPACES, NO_ROW]),
    "generation_config_number": Case(generation_config=LITTLE),
    "config_number": Case(config=LITTLE),
    "tokenizer": Case(has_eos=True),
    "everywhere": Case(generation_config=[LITTLE, EXCITED], config=SPACES, has_eos=True),
}


def write_case(folder: pathlib.Path, case: Case) -> pathlib.Path:
    """A model directory with the bundled weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").symlink_to(BUNDLED / "model.safetensors")
    shutil.copy(BUNDLED / "tokenizer.json", folder)
    for name, changes in (
        ("config.json", {"eos_token_id": case.config}),
        ("tokenizer_config.json", {} if case.has_eos else {"eos_token": None}),
    ):
        values = json.loads((BUNDLED / name).read_text(encoding="utf-8")) | changes
        values = {key: value for key, value in values.items() if value is not None}
        (folder / name).write_text(json.dumps(values), encoding="utf-8")
    if case.generation_config is not None:
        values = {"eos_token_id": case.generation_config, "pad_token_id": 1}
        (folder / "generation_config.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


def load() -> dict:
    return json.loads(STORED.read_text(encoding="utf-8"))
