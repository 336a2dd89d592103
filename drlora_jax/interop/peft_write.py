"""Writes an adapter as `peft` reads it (docs/design.md lists the versions), in one of two layouts.

    peft     experts are one 3-D parameter per layer, as in transformers 5. A of all experts is one
             matrix [E * r, D_in], expert after expert; in B [D_out, r * E] the expert is the
             fastest index. gate and up are one parameter, so separate pairs become one.
    peft-2d  one pair per expert and projection, [r, D_in] and [D_out, r], under the hub's names.
             All three projections of all experts are written, because readers stack them.

Every pair has the same rank r, padded with zeros, and lora_alpha = r: the scale is in B already.
Ranks by name (`rank_pattern`) would take less space, but not every reader supports them. A trained
router is written whole, in modules_to_save; with DoRA the magnitude m is stored with each pair.
"""

import json
import pathlib
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from safetensors.numpy import save_file

from drlora_jax.interop.lora_tables import LayerUpdate, Pair, expert_pair, fused_pair
from drlora_jax.models.architecture import EXPERTS, Matrix, ModelConfig
from drlora_jax.models.families import Slot, key_table

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
FUSED, PER_EXPERT = "peft", "peft-2d"


class Entry(NamedTuple):
    """A pair and its target."""

    target: str  # a module of the base model, or a parameter if experts are fused
    key: str  # the tensors are {key}.lora_A.weight and {key}.lora_B.weight
    pair: Pair  # [R, D_in] and [R, D_out], of a parameter with a leading [E]
    magnitude: np.ndarray | None = None  # of DoRA, [D_out]

    @property
    def is_parameter(self) -> bool:
        return self.pair.a.ndim == 3


class Adapter(NamedTuple):
    """The content of an adapter's two files."""

    tensors: dict[str, np.ndarray]
    rank: int
    modules: list[str]
    parameters: list[str]
    saved_modules: list[str]
    active_share: float  # nonzero fraction of the stored rank rows
    is_dora: bool = False


def pack(
    config: ModelConfig,
    updates: list[LayerUpdate],
    routers: dict[int, np.ndarray],
    layout: str,
    magnitudes: dict[tuple[int, str], np.ndarray] | None = None,
) -> Adapter:
    """Returns the adapter in one of the two layouts.

    Args:
      routers: trained routers [D, E] by layer number, base plus update.
      magnitudes: DoRA's m [D_out] by layer number and module path.
    """
    magnitudes = magnitudes or {}
    fused = _names(key_table(config, "fused"))
    names = fused if layout == FUSED else _names(key_table(config, "experts"))
    entries = [entry for each in updates for entry in _entries(each, names, layout, magnitudes)]
    rank = max(1, *(entry.pair.rank for entry in entries))
    tensors, saved = _tensors_of(entries, rank), []
    for update in updates:
        if update.layer.number in routers:
            key = _name(fused, update, "moe", "router")  # transformers 5's name in both layouts
            tensors[PREFIX + key] = np.ascontiguousarray(routers[update.layer.number].T)
            saved.append(key.removesuffix(".weight"))
    used = sum(int(entry.pair.b.any(axis=-1).sum()) for entry in entries)
    stored = rank * sum(len(e.pair.a) if e.is_parameter else 1 for e in entries)
    return Adapter(
        tensors=tensors,
        rank=rank,
        modules=_shorten([e.target for e in entries if not e.is_parameter], names, 1),
        parameters=_shorten([e.target for e in entries if e.is_parameter], names, 3),
        saved_modules=_shorten(saved, fused, 2),
        active_share=used / stored,
        is_dora=bool(magnitudes),
    )


def _tensors_of(entries: list, rank: int) -> dict[str, np.ndarray]:
    """Returns the tensors of all entries by name, their ranks filled up with zeros."""
    tensors = {}
    for entry in entries:
        tensors[f"{PREFIX}{entry.key}.lora_A.weight"] = pack_a(_pad(entry.pair.a, rank))
        tensors[f"{PREFIX}{entry.key}.lora_B.weight"] = pack_b(_pad(entry.pair.b, rank))
        if entry.magnitude is not None:
            tensors[f"{PREFIX}{entry.key}.lora_magnitude_vector"] = entry.magnitude
    return tensors


def write(directory: pathlib.Path, adapter: Adapter, base: str, metadata: dict[str, str]) -> None:
    """Writes both files. `base` goes into `base_model_name_or_path`: a directory or a hub name."""
    values = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": adapter.rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": adapter.is_dora,
        "target_modules": adapter.modules,
        "target_parameters": adapter.parameters or None,
        "modules_to_save": adapter.saved_modules or None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    text = json.dumps(values, indent=2) + "\n"
    (directory / CONFIG).write_text(text, encoding="utf-8")
    save_file(adapter.tensors, directory / WEIGHTS, metadata={"format": "pt", **metadata})


# ------------------------------------------------------------------------------------------- arrays


def _pad(rows: np.ndarray, rank: int) -> np.ndarray:
    widths = [(0, 0)] * rows.ndim
    widths[-2] = (0, rank - rows.shape[-2])
    return np.pad(rows, widths)


def pack_a(a: np.ndarray) -> np.ndarray:
    """Reshapes [E, R, D_in] to [E * R, D_in], the expert slowest; [R, D_in] stays."""
    return np.ascontiguousarray(a.reshape(-1, a.shape[-1]))


def pack_b(b: np.ndarray) -> np.ndarray:
    """Reshapes [R, D_out] to [D_out, R], and [E, R, D_out] to [D_out, R * E], the expert
    fastest.
    """
    if b.ndim == 2:
        return np.ascontiguousarray(b.T)
    return np.ascontiguousarray(b.transpose(2, 1, 0).reshape(b.shape[2], -1))


# -------------------------------------------------------------------------------------------- names

Names = dict[tuple, str]  # (segment, unit, repeat, path below the layer, expert, half) -> name


def _names(table: dict[str, Slot]) -> Names:
    names = {}
    for key, slot in table.items():
        if slot.index:
            expert = slot.index[1] if len(slot.index) > 1 else None
            where = (*slot.path[:2], slot.index[0])
            names[(*where, "/".join(slot.path[2:]), expert, slot.half)] = key
    return names


def _name(names: Names, update: LayerUpdate, *path: str, expert=None, half=None) -> str:
    return names[*update.layer.key, "/".join(path), expert, half]


def _module(key: str) -> str:
    return key.removesuffix(".weight")


def _entries(update: LayerUpdate, names: Names, layout: str, magnitudes: dict) -> Iterator[Entry]:
    for path, pair in update.plain.items():
        module = _module(_name(names, update, path, "kernel"))
        yield Entry(module, module, pair, magnitudes.get((update.layer.number, path)))
    if update.experts:
        yield from (_fused_entries if layout == FUSED else _expert_entries)(update, names)


def _fused_entries(update: LayerUpdate, names: Names) -> Iterator[Entry]:
    gate_up, down = fused_pair(update.experts), update.experts.get("down")
    # peft wraps the module that holds both parameters twice, gate_up inside; a single wrapper is
    # outside whichever parameter it is for.
    leaves = {matrix.half is not None: matrix.leaf for matrix in _experts(update)}
    for leaf, pair, is_inside in (
        (leaves[True], gate_up, down is not None),
        (leaves[False], down, False),
    ):
        if pair is not None:
            parameter = _name(names, update, *leaf)
            module = parameter.rpartition(".")[0]
            yield Entry(parameter, f"{module}.base_layer" if is_inside else module, pair)


def _expert_entries(update: LayerUpdate, names: Names) -> Iterator[Entry]:
    for matrix in _experts(update):
        pair = expert_pair(update.experts, matrix.role)
        for expert in range(matrix.count):
            sizes = (matrix.in_features, matrix.out_features)
            zeros = Pair(*(np.zeros((1, size), np.float32) for size in sizes))
            own = zeros if pair is None else Pair(pair.a[expert], pair.b[expert])
            name = _name(names, update, *matrix.leaf, expert=expert, half=matrix.half)
            yield Entry(_module(name), _module(name), own)


def _experts(update: LayerUpdate) -> list[Matrix]:
    return [matrix for matrix in update.matrices if matrix.kind == EXPERTS]


def _shorten(targets: list[str], names: Names, parts: int) -> list[str]:
    """Shortens targets to their last `parts` names, as peft matches them; a target stays whole
    where its short name would also match something that is not adapted.
    """

    def tail(name: str) -> str:
        return ".".join(name.split(".")[-parts:])

    chosen = set(targets)
    is_parameter = any(name in chosen for name in names.values())
    every = [_module(name) for name in names.values() if is_parameter != name.endswith(".weight")]
    found, there = (Counter(map(tail, group)) for group in (chosen, every))
    return sorted(
        {tail(name) if found[tail(name)] == there[tail(name)] else name for name in chosen}
    )
