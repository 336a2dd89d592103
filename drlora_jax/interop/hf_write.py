"""Writes base weights as a Hugging Face directory, in the hub's layout (one tensor an expert)."""

import json
import pathlib

import jax
import numpy as np
from safetensors.numpy import save_file

from drlora_jax.errors import UserError
from drlora_jax.interop.hf_read import disk_view, leaf_at
from drlora_jax.models.architecture import ModelConfig
from drlora_jax.models.families import key_table

WEIGHTS = "model.safetensors"


def write_model(
    directory: pathlib.Path, config: ModelConfig, params: dict, config_json: dict, dtype
) -> None:
    """Writes `config.json` and `model.safetensors` with every tensor cast to `dtype`."""
    directory.mkdir(parents=True, exist_ok=True)
    others = sorted({file.name for file in directory.glob("*.safetensors*")} - {WEIGHTS})
    if others:
        raise UserError(f"{directory} has weights of another model ({others[0]}); give a new one.")
    host = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), params)
    tensors = {
        key: np.ascontiguousarray(disk_view(leaf_at(host, slot.path), slot))
        for key, slot in key_table(config, "experts").items()
    }
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    values = {key: value for key, value in config_json.items() if key != "torch_dtype"}
    values |= {"dtype": np.dtype(dtype).name, "tie_word_embeddings": config.tie_embeddings}
    (directory / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
