"""Writes base weights as a Hugging Face directory, in the hub's layout (one tensor an expert)."""

import json
import pathlib

import jax
import numpy as np
from safetensors.numpy import save_file

from drlora_jax.interop.hf_read import leaf_at
from drlora_jax.models.architecture import ModelConfig
from drlora_jax.models.families import Slot, key_table


def write_model(
    directory: pathlib.Path, config: ModelConfig, params: dict, config_json: dict, dtype
) -> None:
    """Writes `config.json` and `model.safetensors` with every tensor cast to `dtype`."""
    directory.mkdir(parents=True, exist_ok=True)
    host = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype), params)
    tensors = {
        key: _take(leaf_at(host, slot.path), slot)
        for key, slot in key_table(config, "experts").items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    values = config_json | {"dtype": np.dtype(dtype).name}
    (directory / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _take(leaf: np.ndarray, slot: Slot) -> np.ndarray:
    value = leaf[slot.index]
    if slot.half is not None:
        width = value.shape[-1] // 2
        value = value[..., slot.half * width : (slot.half + 1) * width]
    return np.ascontiguousarray(np.swapaxes(value, -1, -2) if slot.transpose else value)
