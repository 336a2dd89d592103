"""Reads fixed ranks from a file: a table written by hand, or the last row of another run.

With the ranks.jsonl of a finished DR-LoRA run this tells whether its ranks help because of where
they are, or because of when they were added.
"""

import json
from dataclasses import dataclass

import numpy as np

from drlora_jax.allocation.base import (
    CapacityShapes,
    Context,
    Policy,
    PolicyFields,
    static_policy,
)
from drlora_jax.errors import UserError
from drlora_jax.system.fields import option, require
from drlora_jax.system.paths import FILE, check_downloaded, kind_of, local_path


@dataclass(frozen=True)
class Pattern(PolicyFields):
    name = "pattern"
    text = "keeps the ranks of a file from the first step to the last"
    wants_equal_layers = False

    pattern: str | None = option(
        None, "file of ranks [layers][experts], or a run's ranks.jsonl", is_path=True
    )

    def check(self, section) -> None:
        super().check(section)
        require(
            bool(self.pattern),
            "allocation.kind=pattern needs allocation.pattern=FILE: ranks [layers][experts] "
            "as JSON, or the ranks.jsonl of a run.",
        )

    def make(self, context: Context) -> Policy:
        """Raises UserError when the table does not fit the model, the allocated ranks or the
        budget.
        """
        shapes, path, counts_L = context.shapes, self.pattern, context.counts_L
        ranks_LE = read_ranks(path, shapes)
        experts_L = np.array(counts_L or (shapes.experts,) * shapes.layers)
        budget_L = experts_L * context.r_target
        _check_budget(path, ranks_LE, experts_L, context.r_target)
        return static_policy(
            self.name,
            ranks_LE,
            budget=tuple(budget_L.tolist()) if len(set(counts_L)) > 1 else int(budget_L[0]),
            describe=(
                f"pattern: ranks of {path}, {ranks_LE.min()} to {ranks_LE.max()}, "
                f"a mean of {ranks_LE.mean():g}"
            ),
        )


def _check_budget(path: str, ranks_LE: np.ndarray, experts_L: np.ndarray, r_target: int) -> None:
    for layer, count in enumerate(experts_L):
        if ranks_LE[layer, count:].any():
            raise UserError(
                f"allocation.pattern={path} gives ranks to more experts than the {count} that "
                f"adapter.experts_per_layer has for layer {layer}: {ranks_LE[layer].tolist()}."
            )
    used_L, budget_L = ranks_LE.sum(axis=1), experts_L * r_target
    if (used_L > budget_L).any():
        layer = int(np.argmax(used_L - budget_L))
        raise UserError(
            f"allocation.pattern={path}: MoE layer {layer} has {used_L[layer]} ranks, more than "
            f"{experts_L[layer]} experts * allocation.r_target ({r_target}) = {budget_L[layer]}."
        )


def read_ranks(path: str, shapes: CapacityShapes) -> np.ndarray:
    """Reads i32 [L, E] from a JSON file of [L][E], or from the last row of a run's ranks.jsonl."""
    file = local_path(path, "allocation.pattern")
    if kind_of(file) != FILE:
        raise UserError(
            f"allocation.pattern={path} is {kind_of(file)}; give a JSON file of ranks "
            "[layers][experts] or a run's ranks.jsonl."
        )
    check_downloaded(file)
    try:
        lines = file.read_text(encoding="utf-8").strip().splitlines() or [""]
        value = json.loads(lines[-1] if file.suffix == ".jsonl" else "\n".join(lines))
        table = np.array(value["ranks"] if isinstance(value, dict) else value)
    except (ValueError, KeyError, RecursionError, OSError) as error:
        raise UserError(f"allocation.pattern={path} cannot be read as ranks: {error}.") from error
    wanted = (shapes.layers, shapes.experts)
    if table.shape != wanted or table.dtype.kind != "i":
        raise UserError(
            f"allocation.pattern={path} must hold integers [layers][experts] of shape "
            f"{list(wanted)}, got {table.dtype} of shape {list(table.shape)}."
        )
    if table.min() < 0 or table.max() > shapes.max_rank:
        raise UserError(
            f"allocation.pattern={path} has ranks from {table.min()} to {table.max()}; they must "
            f"be between 0 and allocation.r_max ({shapes.max_rank})."
        )
    return table.astype(np.int32)
