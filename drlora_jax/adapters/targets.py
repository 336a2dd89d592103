"""Which weight matrices an adapter config means, and the table that says so before the first step.

A target is a role (q, k, v, o for attention; gate, up, down, gate_up for experts or dense FFNs,
whichever the placement adapts) or a regular expression over module paths such as
segment_0/layer_0/attention/q. A target that matches nothing, and a placement for experts that
adapts no expert, is refused: experts left out in silence are the commonest mistake with this kind
of model.
"""

import collections
import re

from drlora_jax.adapters.registry import PLACEMENTS
from drlora_jax.errors import UserError
from drlora_jax.models.architecture import (
    ATTENTION,
    EMBEDDING,
    EXPERTS,
    FFN,
    HEAD,
    ROUTER,
    Matrix,
    ModelConfig,
)
from drlora_jax.models.placement import Coverage, Placement

ADAPTABLE = (ATTENTION, EXPERTS, FFN)


def resolve_targets(config: ModelConfig, kind: str, targets: tuple[str, ...]) -> frozenset[str]:
    """The module paths with LoRA matrices; `<layer>/moe/gate_up` for the fused role.

    Args:
      kind: the placement's name, a value of `adapter.kind`.
    """
    placement, every = PLACEMENTS[kind], list(config.matrices())
    placement.check_model(config)
    adapted: set[str] = set()
    for target in targets:
        paths = _match(every, placement, target)
        if not paths:
            raise UserError(_no_match(config, every, placement, target))
        adapted |= paths
    placement.check_paths(config, frozenset(adapted))
    return frozenset(adapted)


def _no_match(
    config: ModelConfig, every: list[Matrix], placement: type[Placement], target: str
) -> str:
    roles = sorted({matrix.role for matrix in every if placement.accepts(matrix)})
    roles += ["gate_up"] if _match(every, placement, "gate_up") else []
    others = (kind for kind, each in PLACEMENTS.items() if _match(every, each, target))
    other = next(others, None)
    way = f" adapter.kind={other} adapts it." if other else ""
    return (
        f"adapter.targets: {target!r} matches no weight of this {config.family} model with "
        f"adapter.kind={placement.kind}. Roles: {', '.join(roles)}; or a regular expression over "
        f"paths such as {every[1].path}.{way}"
    )


def _match(every: list[Matrix], placement: type[Placement], target: str) -> set[str]:
    if target == "gate_up":
        gates = (matrix for matrix in every if (matrix.role, matrix.kind) == ("gate", EXPERTS))
        accepted = (matrix.path for matrix in gates if placement.accepts(matrix))
        return {f"{path.removesuffix('gate')}gate_up" for path in accepted}
    by_role = {m.path for m in every if m.role == target and placement.accepts(m)}
    if by_role or re.fullmatch(r"\w+", target):
        return by_role
    try:
        pattern = re.compile(target)
    except re.error as error:
        message = f"adapter.targets: {target!r} is not a regular expression: {error}."
        raise UserError(message) from None
    return {m.path for m in every if m.kind in ADAPTABLE and pattern.fullmatch(m.path)}


# ---------------------------------------------------------------------------------------- coverage


def linear_inputs(config: ModelConfig, adapter: Placement) -> int:
    """Numbers per token that the plain LoRA of one layer reads, summed over its matrices; for the
    layer with the most.
    """
    by_layer: collections.Counter[str] = collections.Counter()
    for matrix in config.matrices():
        by_layer[matrix.path.rpartition("/")[0].rpartition("/")[0]] += adapter.plain_inputs(matrix)
    return max(by_layer.values(), default=0)


def coverage(config: ModelConfig, adapter: Placement, targets: tuple[str, ...]) -> list[Coverage]:
    """Every weight matrix, adapted or frozen, and by which rule; and what the adapter adds."""
    status = {
        EMBEDDING: "frozen: never adapted",
        HEAD: "frozen: never adapted",
        ROUTER: "frozen: adapter.router=frozen",
    }
    rows = []
    for matrix in config.matrices():
        reason = status.get(matrix.kind, f"frozen: not in adapter.targets ({', '.join(targets)})")
        frozen = Coverage(matrix.path, matrix.count, matrix.parameters, 0, reason)
        rows += adapter.cover(config, matrix, frozen)
    return rows


def coverage_lines(rows: list[Coverage]) -> list[str]:
    """The table as text, with totals."""
    width = max(len(row.path) for row in rows)
    lines = [f"{'weights':<{width}}  {'matrices':>8}  {'parameters':>14}  {'trained':>13}  adapter"]
    for row in rows:
        numbers = f"{row.matrices:>8,}  {row.parameters:>14,}  {row.trained:>13,}"
        lines.append(f"{row.path:<{width}}  {numbers}  {row.status}")
    total, trained = sum(row.parameters for row in rows), sum(row.trained for row in rows)
    share = f"{100 * trained / total:.2f} % trained"
    lines.append(f"{'total':<{width}}  {'':>8}  {total:>14,}  {trained:>13,}  {share}")
    return lines
