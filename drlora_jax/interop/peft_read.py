"""Reads an adapter as peft documents its files, to verify what was written.

Nothing here knows how the adapter was built: names and shapes in the files determine what is added
to which tensor of the base model. With alpha and r of the config,

    a module        W [D_out, D_in] += alpha / r * B A,            A [r, D_in], B [D_out, r]
    fused experts   W_e [D_out, D_in] += alpha / r * B[:, :, e] A[e]
                    with A [E * r, D_in] as [E, r, D_in] and B [D_out, r * E] as [D_out, r, E]
    a saved module  W is replaced

With a magnitude vector m [D_out] beside a module's pair (use_dora) the rows of the sum are then
rescaled to these lengths: W <- m W / ||W||, with the norm per row.
"""

import pathlib
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from drlora_jax.errors import RunError
from drlora_jax.interop.hf_read import disk_view, leaf_at
from drlora_jax.models.architecture import Layer, ModelConfig
from drlora_jax.models.families import key_table
from drlora_jax.system.paths import read_json

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
SUFFIXES = (".lora_A.weight", ".lora_B.weight")
MAGNITUDE = ".lora_magnitude_vector"
WRAPPER = ".base_layer"


class Update(NamedTuple):
    """The update of one tensor of the base model."""

    name: str
    a: np.ndarray | None  # as in the file; None: `b` replaces the tensor
    b: np.ndarray
    magnitude: np.ndarray | None = None


class PeftFiles:
    """An adapter directory, opened."""

    def __init__(self, config: ModelConfig, directory: pathlib.Path):
        values = read_json(directory / CONFIG)
        self._scale = values["lora_alpha"] / values["r"]
        self._parameters = values.get("target_parameters") or []
        self._table = key_table(config, "experts") | key_table(config, "fused")
        self._updates: dict[tuple, list[Update]] = {}
        for update in self._read(directory / WEIGHTS):
            slot = self._table.get(update.name)
            if slot is None or not slot.index:
                raise RunError(f"{directory}: the base model has no tensor {update.name}.")
            self._updates.setdefault((*slot.path[:2], slot.index[0]), []).append(update)

    def apply(self, params: dict, layer: Layer) -> dict:
        """Returns a copy of one layer's f32 parameters with the adapter of the files added."""
        updates = self._updates.get((layer.segment, layer.unit, layer.repeat), [])
        changed = {self._table[update.name].path[2:] for update in updates}
        params = _copy(params, changed)
        for update in updates:
            slot = self._table[update.name]
            view = disk_view(leaf_at(params, slot.path[2:]), slot, skip=1)
            if update.a is None:
                view[...] = update.b
            else:
                view += self._delta(update, view)
            if update.magnitude is not None:
                norms = np.linalg.norm(view.astype(np.float64), axis=1)
                view *= (update.magnitude / np.maximum(norms, np.finfo(np.float32).tiny))[:, None]
        return params

    def _delta(self, update: Update, like: np.ndarray) -> np.ndarray:
        a, b = update.a.astype(np.float32), update.b.astype(np.float32)
        if like.ndim == 2:
            return self._scale * (b @ a)
        experts = like.shape[0]
        a = a.reshape(experts, -1, a.shape[-1])
        b = b.reshape(b.shape[0], -1, experts)
        return self._scale * np.stack([b[:, :, e] @ a[e] for e in range(experts)])

    def _read(self, file: pathlib.Path) -> list[Update]:
        try:
            with safe_open(file, framework="numpy") as handle:
                tensors = {key: handle.get_tensor(key) for key in handle.keys()}
        except (SafetensorError, OSError) as error:
            raise RunError(f"{file} cannot be read back: {error}") from error
        updates = []
        for key, value in tensors.items():
            name = key.removeprefix(PREFIX)
            if name.endswith(SUFFIXES[0]):
                module = name.removesuffix(SUFFIXES[0])
                pair = key.removesuffix(SUFFIXES[0])
                b, magnitude = tensors[pair + SUFFIXES[1]], tensors.get(pair + MAGNITUDE)
                updates.append(Update(self._target(module), value, b, magnitude))
            elif not name.endswith((SUFFIXES[1], MAGNITUDE)):
                updates.append(Update(name, None, value))
        return updates

    def _target(self, module: str) -> str:
        """Returns the tensor of the base model that a pair with this name is added to."""
        inner = module.removesuffix(WRAPPER)
        names = {f"{inner}.{leaf}" for leaf in ("gate_up_proj", "down_proj")} & self._table.keys()
        targeted = [name for name in names if name.endswith(tuple(self._parameters))]
        if not self._parameters or not targeted:
            return f"{module}.weight"
        if len(targeted) == 1:
            return targeted[0]
        return f"{inner}.gate_up_proj" if module.endswith(WRAPPER) else f"{inner}.down_proj"


def _copy(tree: dict, changed: set[tuple[str, ...]], path: tuple[str, ...] = ()) -> dict:
    """Returns the tree with own copies of the changed leaves; the others are shared."""
    copied = {}
    for name, node in tree.items():
        here = (*path, name)
        if isinstance(node, dict):
            copied[name] = _copy(node, changed, here)
        else:
            copied[name] = node.copy() if here in changed else node
    return copied
