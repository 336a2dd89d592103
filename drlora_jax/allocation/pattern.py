"""Fixed ranks from a file: a table that was made by hand, or the last row of another run.

With the ranks.jsonl of a finished DR-LoRA run this answers whether its ranks help because of where
they are, or because of when they came.
"""

import json

import numpy as np

from drlora_jax.allocation.base import CapacityShapes, Policy, static_policy
from drlora_jax.errors import UserError
from drlora_jax.system.paths import FILE, check_downloaded, kind_of, local_path


def pattern(
    shapes: CapacityShapes, *, path: str, r_target: int, counts_L: tuple[int, ...] = ()
) -> Policy:
    """Ranks [L][E] of `path` from the first step to the last.

    Args:
      counts_L: experts of every layer, where an adapter's own are not as many everywhere.

    Raises UserError when the table does not fit the model, the allocated ranks or the budget.
    """
    ranks_LE = read_ranks(path, shapes)
    for layer, count in enumerate(counts_L):
        if ranks_LE[layer, count:].any():
            raise UserError(
                f"allocation.pattern={path} gives ranks to more experts than the {count} that "
                f"adapter.experts_per_layer has for layer {layer}: {ranks_LE[layer].tolist()}."
            )
    experts_L = np.array(counts_L or (shapes.experts,) * shapes.layers)
    budget_L, used_L = experts_L * r_target, ranks_LE.sum(axis=1)
    if (used_L > budget_L).any():
        layer = int(np.argmax(used_L - budget_L))
        raise UserError(
            f"allocation.pattern={path}: MoE layer {layer} has {used_L[layer]} ranks, more than "
            f"{experts_L[layer]} experts * allocation.r_target ({r_target}) = {budget_L[layer]}."
        )

    return static_policy(
        "pattern",
        ranks_LE,
        budget=tuple(budget_L.tolist()) if len(set(counts_L)) > 1 else int(budget_L[0]),
        describe=f"pattern: ranks of {path}, {ranks_LE.min()} to {ranks_LE.max()}, "
        f"a mean of {ranks_LE.mean():g}",
    )


def read_ranks(path: str, shapes: CapacityShapes) -> np.ndarray:
    """i32 [L, E] from a JSON file that holds [L][E], or from a run's ranks.jsonl: its last row."""
    file = local_path(path, "allocation.pattern")
    if kind_of(file) != FILE:
        raise UserError(
            f"allocation.pattern={path} is {kind_of(file)}; give a JSON file of ranks [layers]"
            "[experts] or a run's ranks.jsonl."
        )
    check_downloaded(file)
    try:
        lines = file.read_text(encoding="utf-8").strip().splitlines() or [""]
        value = json.loads(lines[-1] if file.suffix == ".jsonl" else "\n".join(lines))
        table = np.array(value["ranks"] if isinstance(value, dict) else value)
    except (ValueError, KeyError, RecursionError, OSError) as error:
        raise UserError(f"allocation.pattern={path} can not be read as ranks: {error}.") from error
    wanted = (shapes.layers, shapes.experts)
    if table.shape != wanted or table.dtype.kind != "i":
        raise UserError(
            f"allocation.pattern={path} must hold integers [layers][experts] of shape "
            f"{list(wanted)}, got {table.dtype} of shape {list(table.shape)}."
        )
    if table.min() < 0 or table.max() > shapes.max_rank:
        raise UserError(
            f"allocation.pattern={path} has ranks from {table.min()} to {table.max()}; they must "
            f"be in 0 to allocation.r_max ({shapes.max_rank})."
        )
    return table.astype(np.int32)
