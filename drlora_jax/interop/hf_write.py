"""Writes Hugging Face model directories: parameters in the hub's layout (one tensor per expert), or
a copy of another directory with some tensors changed.
"""

import contextlib
import json
import math
import pathlib
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from drlora_jax.errors import RunError, UserError
from drlora_jax.interop.companions import set_tokenizer, write_companions
from drlora_jax.interop.hf_files import HEAD, TensorInfo, open_weights, read_headers
from drlora_jax.interop.hf_read import disk_view, leaf_at
from drlora_jax.models.architecture import ModelConfig
from drlora_jax.models.families import key_table

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NUMPY_DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}


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


# ------------------------------------------------------ another directory with some tensors changed


def rewrite_model(
    source: pathlib.Path,
    target: pathlib.Path,
    changed: Collection[str],
    change: Callable[[str, np.ndarray], np.ndarray],
    *,
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
    end_token_ids: Sequence[int] = (),
    tokenizer_settings: Mapping[str, Any] = MappingProxyType({}),
) -> list[str]:
    """Writes `source` to the directory `target` with `change(key, value)` for the changed tensors.

    Names, layout, order, dtypes and shards stay, and so do the bytes of every other tensor. One
    shard is in memory at a time, and shards without a change are copied. Returns notes about the
    files next to the weights.

    Args:
      dtype: the dtype of every tensor; None: each keeps its own. A changed value is rounded once.
      max_shard_bytes: the largest size of a file; None: shards as in `source`.
      end_token_ids: tokens that end a text, for `generation_config.json` and `config.json`.
      tokenizer_settings: values of tokenizer_config.json that replace those of `source`.
    """
    tensors = read_headers(source)
    notes = write_companions(
        source, target, has_head=HEAD in tensors, dtype=dtype, end_token_ids=end_token_ids
    )
    set_tokenizer(target, tokenizer_settings)
    shards = _same_shards(tensors)
    if max_shard_bytes is not None:
        shards = _cut_shards(tensors, dtype, max_shard_bytes)
    for name, keys in shards.items():
        is_same_file = max_shard_bytes is None and dtype is None
        if is_same_file and not set(keys) & set(changed):
            shutil.copyfile(tensors[keys[0]].file, target / name)
        else:
            _write_shard(target / name, keys, tensors, changed, change, dtype)
    if list(shards) != [WEIGHTS] or (source / INDEX).is_file():
        _write_index(target / INDEX, shards, _size(tensors, dtype))
    return notes


def rewritten_bytes(source: pathlib.Path, dtype: str | None) -> int:
    """Returns the size of the weights that `rewrite_model` writes."""
    return _size(read_headers(source), dtype)


def _same_shards(tensors: dict[str, TensorInfo]) -> dict[str, list[str]]:
    shards: dict[str, list[str]] = {}
    for key, info in tensors.items():
        shards.setdefault(info.file.name, []).append(key)
    if len(shards) > 1 and WEIGHTS in shards:  # transformers would read that file alone
        return _numbered(list(shards.values()))
    return shards


def _cut_shards(tensors, dtype: str | None, limit: int) -> dict[str, list[str]]:
    """Groups tensors in order into files of at most `limit` bytes; a larger tensor is alone."""
    groups, size = [[]], 0
    for key, info in tensors.items():
        bytes_here = _bytes(info, dtype)
        if groups[-1] and size + bytes_here > limit:
            groups.append([])
            size = 0
        groups[-1].append(key)
        size += bytes_here
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return _numbered(groups)


def _numbered(groups: list[list[str]]) -> dict[str, list[str]]:
    count = len(groups)
    return {f"model-{i + 1:05}-of-{count:05}.safetensors": keys for i, keys in enumerate(groups)}


def _size(tensors: dict[str, TensorInfo], dtype: str | None) -> int:
    return sum(_bytes(info, dtype) for info in tensors.values())


def _bytes(info: TensorInfo, dtype: str | None) -> int:
    return math.prod(info.shape) * _disk_dtype(info, dtype).itemsize


def _disk_dtype(info: TensorInfo, dtype: str | None) -> np.dtype:
    # Buffers that reading ignores may have any dtype; they count as F32.
    return np.dtype(dtype) if dtype else NUMPY_DTYPES.get(info.dtype, np.dtype(np.float32))


def _write_shard(file, keys, tensors, changed, change, dtype: str | None) -> None:
    values, metadata = {}, {}
    with contextlib.ExitStack() as stack:
        sources = {tensors[key].file for key in keys}
        handles = {source: stack.enter_context(open_weights(source)) for source in sources}
        for handle in handles.values():
            metadata |= handle.metadata() or {}
        for key in keys:
            value = handles[tensors[key].file].get_tensor(key)
            value = change(key, value) if key in changed else value
            if dtype or key in changed:
                value = cast(key, value, _disk_dtype(tensors[key], dtype))
            values[key] = np.ascontiguousarray(value)
    save_file(values, file, metadata={"format": "pt"} | metadata)


def cast(name: str, value: np.ndarray, dtype) -> np.ndarray:
    """Casts a value to `dtype`; refuses one that would overflow to infinity."""
    if value.dtype == dtype:
        return value
    with np.errstate(over="ignore"):  # reported below, with the name
        rounded = value.astype(dtype, copy=False)
    is_lost = np.isinf(rounded) & np.isfinite(value)
    if is_lost.any():
        kind = np.dtype(dtype)
        largest = float(np.abs(value[is_lost]).max())
        raise RunError(
            f"{name} has a value of {largest:.4g}, but the largest {kind.name} is "
            f"{float(ml_dtypes.finfo(kind).max):.4g}. Give --dtype bfloat16 or float32."
        )
    return rounded


def _write_index(file: pathlib.Path, shards: dict[str, list[str]], size: int) -> None:
    weight_map = {key: name for name, keys in shards.items() for key in keys}
    values = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
