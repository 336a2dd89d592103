"""Reads the weights of a Hugging Face model directory.

The key table is strict: a tensor that no rule maps, a rule without its tensor, and a wrong shape or
dtype are errors that name the key. Weights are streamed leaf by leaf and layer by layer into device
buffers.
"""

import contextlib
import functools
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from drlora_jax.errors import UserError
from drlora_jax.interop.hf_files import (
    IGNORED_SUFFIXES,
    TensorInfo,
    find_model,
    open_weights,
    read_headers,
    read_model_config,
    visible_weights,
)
from drlora_jax.interop.name_hints import explain_names
from drlora_jax.models.architecture import ModelConfig
from drlora_jax.models.families import Slot, key_table
from drlora_jax.models.options import DecoderOptions
from drlora_jax.models.placement import NO_ADAPTER, Placement
from drlora_jax.models.transformer import Decoder, abstract_params
from drlora_jax.parallel.processes import place

READABLE_DTYPES = ("F32", "BF16", "F16")


def match_keys(
    config: ModelConfig, tensors: dict[str, TensorInfo], abstract: dict
) -> dict[str, Slot]:
    """Returns the slot of every tensor on disk, after checking names, shapes and dtypes.

    Args:
      abstract: our parameter tree of `jax.ShapeDtypeStruct`.
    """
    layout = (
        "fused" if any(key.endswith("mlp.experts.gate_up_proj") for key in tensors) else "experts"
    )
    _check_counts(config, tensors, layout)
    table = key_table(config, layout)
    on_disk = {key for key in tensors if not key.endswith(IGNORED_SUFFIXES)}
    missing, unmapped = sorted(table.keys() - on_disk), sorted(on_disk - table.keys())
    if missing:
        raise UserError(
            f"The weights lack {_some(missing)} ({config.family}, layout {layout})."
            f"{explain_names(table, on_disk)}{_passed_over(tensors)}"
        )
    if unmapped:
        places = sorted({tensors[key].file.name for key in unmapped})
        raise UserError(
            f"The weights have tensors that {config.family} models lack: {_some(unmapped)} (in "
            f"{_some(places)})."
        )
    for key, slot in table.items():
        _check_tensor(key, tensors[key], _disk_shape(slot, abstract))
    return table


def _check_tensor(key: str, info: TensorInfo, expected: tuple[int, ...]) -> None:
    if info.shape != expected:
        raise UserError(
            f"{key} has shape {list(info.shape)} in {info.file.name}, but config.json implies "
            f"{list(expected)}."
        )
    if info.dtype not in READABLE_DTYPES:
        readable = ", ".join(READABLE_DTYPES)
        raise UserError(
            f"{key} has dtype {info.dtype}; readable are {readable} (in {info.file.name})."
        )


def _passed_over(tensors: dict[str, TensorInfo]) -> str:
    """Names the weight files beside those that were read."""
    files = {info.file for info in tensors.values()}
    folders = {file.parent for file in files}
    others = [each.name for folder in folders for each in visible_weights(folder)]
    others = sorted(set(others) - {file.name for file in files})
    if not others:
        return ""
    read = _some(sorted(file.name for file in files))
    return f" Only {read} was read; {_some(others)} was not, because no index names it."


def _check_counts(config: ModelConfig, tensors: dict[str, TensorInfo], layout: str) -> None:
    """Checks the counts before every name is listed: a config may claim a million layers or
    experts.
    """
    counts = {"layers": config.num_layers}
    if layout == "experts" and config.moe:
        counts["experts"] = config.moe.routing.num_experts
    for what, count in counts.items():
        if count > len(tensors):
            raise UserError(
                f"config.json implies {count} {what}, but the weights have only {len(tensors)} "
                "tensors."
            )


def _some(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (
        f" and {len(names) - count} more" if len(names) > count else ""
    )


def leaf_at(tree: dict, path: tuple[str, ...]):
    for name in path:
        tree = tree[name]
    return tree


def _disk_shape(slot: Slot, abstract: dict) -> tuple[int, ...]:
    shape = list(leaf_at(abstract, slot.path).shape[len(slot.index) :])
    if slot.half is not None:
        shape[-1] //= 2
    if slot.transpose:
        shape[-2:] = shape[-1], shape[-2]
    return tuple(shape)


def load_model(
    path: str, *, dtype: str = "float32", adapter: Placement = NO_ADAPTER
) -> tuple[Decoder, dict]:
    """Loads a decoder and its `params` onto one device, from any `model.path`."""
    directory = find_model(path)
    config = read_model_config(directory)
    model = Decoder(config, DecoderOptions(dtype=jnp.dtype(dtype), adapter=adapter))
    here = SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        abstract_params(model),
    )
    return model, load_params(config, directory, abstract)


def load_params(
    config: ModelConfig,
    directory: pathlib.Path,
    abstract: dict,
    done: Callable[[], None] = lambda: None,
) -> dict:
    """Loads the weights of the directory into a parameter tree.

    Args:
      abstract: a tree of `jax.ShapeDtypeStruct`; leaves are placed on its shardings, if set.
      done: called after each tensor.

    The host holds one layer of one leaf at a time.
    """
    tensors = read_headers(directory)
    table = match_keys(config, tensors, abstract)
    pieces: dict[tuple[str, ...], dict[int | None, list[tuple[str, Slot]]]] = {}
    for key, slot in table.items():
        layer = slot.index[0] if slot.index else None
        pieces.setdefault(slot.path, {}).setdefault(layer, []).append((key, slot))
    with contextlib.ExitStack() as stack:
        handles = {
            file: stack.enter_context(open_weights(file))
            for file in {info.file for info in tensors.values()}
        }

        def read(key):
            tensor = handles[tensors[key].file].get_tensor(key)
            done()
            return tensor

        tree: dict = {}
        for path, by_layer in pieces.items():
            node = tree
            for name in path[:-1]:
                node = node.setdefault(name, {})
            node[path[-1]] = _load_leaf(leaf_at(abstract, path), by_layer, read)
    return tree


def _load_leaf(leaf: jax.ShapeDtypeStruct, by_layer: dict, read) -> jax.Array:
    if None in by_layer:
        host = np.empty(leaf.shape, leaf.dtype)
        _fill(host, by_layer[None], read, skip=0)
        return place(host, leaf.sharding)
    buffer = jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
    write_layer, layer_sharding = _layer_writer(leaf.sharding)
    for layer, entries in sorted(by_layer.items()):
        host = np.empty(leaf.shape[1:], leaf.dtype)
        _fill(host, entries, read, skip=1)
        # Placed before the call, so that no device holds more than its part of the layer.
        buffer = write_layer(buffer, place(host, layer_sharding), layer)
    return buffer


@functools.cache
def _layer_writer(sharding: jax.sharding.Sharding | None):
    """Returns a function that writes one layer in place, and the sharding of such a layer."""

    def write_layer(buffer, layer, index):
        return jax.lax.dynamic_update_index_in_dim(buffer, layer, index, axis=0)

    of_layer = sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        spec = jax.sharding.PartitionSpec(*sharding.spec[1:])
        of_layer = jax.sharding.NamedSharding(sharding.mesh, spec)
    return jax.jit(write_layer, donate_argnums=0, out_shardings=sharding), of_layer


def _fill(host: np.ndarray, entries: list[tuple[str, Slot]], read, *, skip: int) -> None:
    """Copies tensors into their places of one leaf, or of one layer of it (`skip` = 1 leading
    index).
    """
    for key, slot in entries:
        target = disk_view(host, slot, skip=skip)
        target[...] = read(key).astype(host.dtype)


def disk_view(leaf: np.ndarray, slot: Slot, *, skip: int = 0) -> np.ndarray:
    """Returns the part of a leaf that a tensor on disk holds, in the orientation of the disk; a
    view.

    Args:
      skip: leading axes of the parameter tree's leaf that `leaf` has not (1: it is of one layer).
    """
    part = leaf[slot.index[skip:]]
    if slot.half is not None:
        width = part.shape[-1] // 2
        part = part[..., slot.half * width : (slot.half + 1) * width]
    return np.swapaxes(part, -1, -2) if slot.transpose else part
