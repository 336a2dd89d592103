"""The stored oracles: tiny models, token rows, and what other libraries computed with them.

Read without torch. `make_oracles.py` writes everything under `data/`:

    data/{family}/        a Hugging Face directory, one tensor an expert (as on the hub)
    data/{family}_fused/  the same weights of a MoE, one 3-D tensor a layer
    data/{variant}.npz    logits of a variant of a family at some positions of every row, computed
                          in float64, and the KL at every valid position of the model in bfloat16
                          from itself in f32
    data/{family}_lora.npz  LoRA factors, loss and gradients, computed in float64

No size of these models equals another one (but for OLMoE, whose q and o are square by definition),
so a transposed or exchanged matrix shows.
"""

import json
import pathlib
import shutil
from typing import NamedTuple

import numpy as np

DATA = pathlib.Path(__file__).parent / "data"
LAYOUTS = ("experts", "fused")
VOCABULARY, LENGTH = 97, 520
VALID, SECOND_DOCUMENT = 437, 301  # tokens of the padded row; where the packed row's second starts


class Variant(NamedTuple):
    family: str
    changes: dict  # to config.json


VARIANTS = {
    "mixtral": Variant("mixtral", {}),
    "mixtral_window": Variant("mixtral", {"sliding_window": 48}),
    "olmoe": Variant("olmoe", {}),
    "olmoe_normalized": Variant("olmoe", {"norm_topk_prob": True}),
    "llama": Variant("llama", {}),
    "llama3": Variant(
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 2e4,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 256,
            }
        },
    ),
}
FAMILIES = tuple(dict.fromkeys(variant.family for variant in VARIANTS.values()))
DENSE_FAMILIES = ("llama",)
MOE_FAMILIES = tuple(family for family in FAMILIES if family not in DENSE_FAMILIES)

RANK, SCALE = 4, 2.0
MOE_CASES = {"up_down": ("up", "down"), "gate_up_down": ("gate_up", "down")}  # roles of experts
DENSE_CASES = {"ffn": ("gate", "up", "down")}


def lora_cases(family: str) -> dict[str, tuple[str, ...]]:
    """Adapted FFN roles by case; q and v are adapted in every case."""
    return DENSE_CASES if family in DENSE_FAMILIES else MOE_CASES


class Rows(NamedTuple):
    """Three rows: one document, one document and right padding, two documents."""

    tokens: np.ndarray  # i32 [3, T]
    segments: np.ndarray  # i32, 1.. a document, 0 padding
    positions: np.ndarray  # i32, from 0 in every document

    @property
    def targets(self) -> np.ndarray:
        return np.roll(self.tokens, -1, axis=1)

    @property
    def target_mask(self) -> np.ndarray:
        """1 where the next token belongs to the same document."""
        following = np.roll(self.segments, -1, axis=1)
        following[:, -1] = 0
        return ((self.segments == following) & (self.segments > 0)).astype(np.float32)


def make_rows() -> Rows:
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (3, LENGTH), dtype=np.int32)
    segments = np.ones_like(tokens)
    positions = np.tile(np.arange(LENGTH, dtype=np.int32), (3, 1))
    segments[1, VALID:] = 0
    tokens[1, VALID:] = 0
    segments[2, SECOND_DOCUMENT:] = 2
    positions[2, SECOND_DOCUMENT:] -= SECOND_DOCUMENT
    return Rows(tokens, segments, positions)


def stored_positions() -> np.ndarray:
    """bool [3, T]: every 16th position, and all beside a place where something begins or ends."""
    chosen = np.zeros((3, LENGTH), bool)
    chosen[:, ::16] = True
    for edge in (0, 48, SECOND_DOCUMENT, SECOND_DOCUMENT + 48, VALID, LENGTH):
        chosen[:, max(0, edge - 2) : edge + 2] = True
    return chosen & (make_rows().segments > 0)


def copy_model(variant: str, layout: str, into: pathlib.Path) -> pathlib.Path:
    """A directory with the weights in a layout and the variant's config.json."""
    family, changes = VARIANTS[variant]
    is_fused = layout == "fused" and family in MOE_FAMILIES
    source = DATA / (f"{family}_fused" if is_fused else family)
    into.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "model.safetensors", into)
    values = json.loads((source / "config.json").read_text(encoding="utf-8")) | changes
    (into / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return into


def load_arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{name}.npz") as file:
        return dict(file)
