"""Adds an adapter to base weights: W + A^T B, in f32; with DoRA, columns are then rescaled."""

import numpy as np

from drlora_jax.adapters.lora import SMALLEST_NORM
from drlora_jax.interop.lora_tables import LayerUpdate, Pair, expert_pair
from drlora_jax.models.architecture import EXPERTS, ROUTER
from drlora_jax.models.families import Slot


def delta(update: LayerUpdate, path: tuple[str, ...], weight: np.ndarray) -> np.ndarray | None:
    """Returns the adapter's update of one leaf of the layer, f32, oriented as in our tree.

    Args:
      path: of the leaf below the layer, such as ("attention", "q", "kernel") or ("moe", "down").
      weight: the base model's leaf.
    """
    matrices = update.matrices_in(path)
    if not matrices:
        return None
    if matrices[0].kind == ROUTER:
        return update.router_DE
    if matrices[0].kind == EXPERTS:
        parts = [_product(expert_pair(update.experts, matrix.role)) for matrix in matrices]
        like = next((part for part in parts if part is not None), None)
        if like is None:
            return None
        return np.concatenate([np.zeros_like(like) if p is None else p for p in parts], axis=-1)
    name = matrices[0].path
    added = _product(update.plain.get(name))
    if name not in update.magnitudes:
        return added
    merged_DF = weight + added
    length_F = column_norms(weight) + update.magnitudes[name]
    return merged_DF * (length_F / column_norms(merged_DF)).astype(np.float32) - weight


def column_norms(weight_DF: np.ndarray) -> np.ndarray:
    """Returns the norms of columns, f64 [D_out]; above zero, so that a column of zeros may be
    divided by its own.
    """
    return np.maximum(np.linalg.norm(weight_DF.astype(np.float64), axis=0), SMALLEST_NORM)


def _product(pair: Pair | None) -> np.ndarray | None:
    return None if pair is None else np.swapaxes(pair.a, -1, -2) @ pair.b


def merge_layer(params: dict, update: LayerUpdate) -> dict:
    """Returns one layer's f32 parameters with the adapter added."""

    def visit(tree: dict, path: tuple[str, ...]) -> dict:
        merged = {}
        for name, node in tree.items():
            here = (*path, name)
            if isinstance(node, dict):
                merged[name] = visit(node, here)
                continue
            added = delta(update, here, node)
            merged[name] = node if added is None else node + added
        return merged

    return visit(params, ())


def adapted_tensors(table: dict[str, Slot], updates: list[LayerUpdate]) -> dict[str, LayerUpdate]:
    """Returns the tensors on disk that the adapter changes, with what their layer gets."""
    by_layer = {update.layer.key: update for update in updates}
    found = {}
    for key, slot in table.items():
        update = by_layer.get((*slot.path[:2], slot.index[0])) if slot.index else None
        if update is not None and _is_adapted(update, slot):
            found[key] = update
    return found


def _is_adapted(update: LayerUpdate, slot: Slot) -> bool:
    for matrix in update.matrices_in(slot.path[2:], slot.half):
        if matrix.kind == ROUTER and update.router_DE is not None:
            return True
        if matrix.kind == EXPERTS and expert_pair(update.experts, matrix.role) is not None:
            return True
        if matrix.path in update.plain:
            return True
    return False


def merge_tensor(value: np.ndarray, slot: Slot, update: LayerUpdate) -> np.ndarray:
    """Adds the adapter to a tensor as it is on disk; returns f32, unless the update is zero.

    An expert without an active rank keeps its tensor unchanged, bit for bit.
    """
    if len(slot.index) > 1:  # of one expert
        (matrix,) = update.matrices_in(slot.path[2:], slot.half)
        pair = expert_pair(update.experts, matrix.role)
        added = pair.a[slot.index[1]].T @ pair.b[slot.index[1]]
    else:
        base = np.swapaxes(value, -1, -2) if slot.transpose else value
        added = delta(update, slot.path[2:], base.astype(np.float32))
    if not added.any():
        return value
    return value.astype(np.float32) + (np.swapaxes(added, -1, -2) if slot.transpose else added)
