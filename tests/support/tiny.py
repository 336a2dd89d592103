"""A small random MoE with the bundled tokenizer, and runs on it: what several test files need."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np

from drlora_jax.config import (
    AdapterSection,
    AllocationSection,
    DataSection,
    MeshSection,
    ModelSection,
    RunSection,
    TrainConfig,
    TrainSection,
)
from drlora_jax.interop.hf_write import write_model
from drlora_jax.models.families import parse_config
from drlora_jax.models.options import DecoderOptions
from drlora_jax.models.transformer import Decoder, abstract_params

BUNDLED = pathlib.Path(__file__).parents[2] / "drlora_jax" / "bundled"
OLMOE = {
    "model_type": "olmoe",
    "vocab_size": 4096,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
MIXTRAL = OLMOE | {"model_type": "mixtral", "num_local_experts": 4}
TINY_LLAMA = OLMOE | {"model_type": "llama", "tie_word_embeddings": True, "num_hidden_layers": 3}


def random_params(config, seed=0):
    """Weights large enough that experts differ and routing is decided clearly."""
    shapes = abstract_params(Decoder(config, DecoderOptions()))
    draw = np.random.default_rng(seed)

    def leaf(path, value):
        is_norm = path[-1].key == "scale"
        sample = draw.normal(size=value.shape) * (0.2 if is_norm else value.shape[-2] ** -0.5)
        return jnp.asarray(sample + is_norm, jnp.float32)

    return jax.tree.map_with_path(leaf, shapes)


def write_tiny_model(directory: pathlib.Path, values=OLMOE) -> pathlib.Path:
    config = parse_config(values)
    write_model(directory, config, random_params(config), values, np.float32)
    for file in (BUNDLED / "tiny_moe").glob("tokenizer*"):
        shutil.copy(file, directory)
    return directory


def write_rows(file: pathlib.Path, count: int, seed=0) -> str:
    """Sums in words: short documents with something to learn."""
    draw = np.random.default_rng(seed)
    with file.open("w") as handle:
        for _ in range(count):
            a, b = draw.integers(0, 50, size=2)
            row = {"prompt": f"What is {a} plus {b}?", "response": f"It is {a + b}."}
            handle.write(json.dumps(row) + "\n")
    return str(file)


def tiny_config(tmp_path: pathlib.Path, name="run", **changes) -> TrainConfig:
    """Twelve steps over two growth events; `changes` are section=dict of fields."""
    model = tmp_path / "model"
    if not model.exists():
        write_tiny_model(model)
        write_rows(tmp_path / "train.jsonl", 60)
        write_rows(tmp_path / "heldout.jsonl", 12, seed=1)
    sections = {
        "run": dict(dir=str(tmp_path / name), log_every=1, checkpoint_every=5),
        "model": dict(path=str(model)),
        "data": dict(
            path=(str(tmp_path / "train.jsonl"),), eval_path=(str(tmp_path / "heldout.jsonl"),)
        ),
        "train": dict(
            steps=12,
            batch_size=8,
            sequence_length=64,
            learning_rate=1e-2,
            eval_every=6,
            warmup_ratio=0.25,
        ),
        "adapter": dict(targets=("up", "down", "q"), dropout=0.1, rank=3),
        "allocation": dict(r_init=1, r_target=2, r_max=4, interval=4, p_grow=0.5),
        "mesh": dict(data=1),
    }
    for section, fields in changes.items():
        sections[section] |= fields
    section, given = sections["allocation"], changes.get("allocation", {})
    kind = section.get("kind", "dr_lora")
    sections["allocation"] = {
        name: value
        for name, value in section.items()
        if name in given or AllocationSection.has(kind, name)
    }
    return TrainConfig(
        run=RunSection(**sections["run"]),
        model=ModelSection(**sections["model"]),
        data=DataSection(**sections["data"]),
        train=TrainSection(**sections["train"]),
        adapter=AdapterSection(**sections["adapter"]),
        allocation=AllocationSection(**sections["allocation"]),
        mesh=MeshSection(**sections["mesh"]),
    )
