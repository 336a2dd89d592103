"""Reads a model directory one layer at a time, so that a model of any size can be inspected on one
machine: the host holds a layer, not the stack.
"""

import contextlib
import pathlib

import jax.numpy as jnp
import numpy as np

from drlora_jax.interop.hf_files import open_weights, read_headers
from drlora_jax.interop.hf_read import disk_view, leaf_at, match_keys
from drlora_jax.models.architecture import Layer, ModelConfig
from drlora_jax.models.families import Slot
from drlora_jax.models.options import DecoderOptions
from drlora_jax.models.transformer import Decoder, abstract_params


class LayerReader:
    """Parameters of a directory as f32 NumPy arrays in our trees; names and shapes are checked."""

    def __init__(self, config: ModelConfig, directory: pathlib.Path):
        self._abstract = abstract_params(Decoder(config, DecoderOptions(dtype=jnp.float32)))
        self._tensors = read_headers(directory)
        self.table = match_keys(config, self._tensors, self._abstract)
        self._last: tuple[int, dict] | None = None

    def dtype(self, key: str) -> str:
        """Returns the dtype of a tensor on disk, as safetensors names it."""
        return self._tensors[key].dtype

    def layer(self, layer: Layer) -> dict:
        """Returns the parameters of one layer as its block reads them. The last layer stays in
        memory.
        """
        if self._last is None or self._last[0] != layer.number:
            self._last = None
            self._last = layer.number, self._read(self.keys(layer), skip=1)
        return self._last[1]

    def keys(self, layer: Layer) -> dict[str, Slot]:
        """Returns the tensors on disk of one layer; paths begin below the layer."""
        where = (layer.segment, layer.unit)
        return {
            key: slot._replace(path=slot.path[2:])
            for key, slot in self.table.items()
            if slot.path[:2] == where and slot.index[:1] == (layer.repeat,)
        }

    def ends(self) -> dict:
        """Returns the parameters outside the layers: embedding, final norm and head."""
        outside = {key: slot for key, slot in self.table.items() if not slot.index}
        return self._read(outside, skip=0)

    def _read(self, keys: dict[str, Slot], *, skip: int) -> dict:
        tree: dict = {}
        with contextlib.ExitStack() as stack:
            files = {self._tensors[key].file for key in keys}
            handles = {file: stack.enter_context(open_weights(file)) for file in files}
            for key, slot in keys.items():
                node = tree
                for name in slot.path[:-1]:
                    node = node.setdefault(name, {})
                if slot.path[-1] not in node:
                    node[slot.path[-1]] = np.empty(self._shape(key, skip), np.float32)
                view = disk_view(node[slot.path[-1]], slot, skip=skip)
                view[...] = handles[self._tensors[key].file].get_tensor(key)
        return tree

    def _shape(self, key: str, skip: int) -> tuple[int, ...]:
        return leaf_at(self._abstract, self.table[key].path).shape[skip:]
