"""Which weight matrices an adapter config means, and the table that says so before the first step.

A target is a role (q, k, v, o on attention; gate, up, down, gate_up on the experts for
`expert_lora`, on dense FFNs for the other kinds) or a regular expression over module paths such as
segment_0/layer_0/attention/q. A target that matches nothing, and an expert method that
adapts no expert, is refused: experts left out in silence are the commonest mistake with this kind
of model.
"""

import collections
import re
from collections.abc import Iterator
from typing import NamedTuple

from drlora_jax.adapters.lora import AdapterSpec
from drlora_jax.errors import UserError
from drlora_jax.models.architecture import ModelConfig, MoeConfig

EXPERT_ROLES = ("gate", "up", "down")


class Matrix(NamedTuple):
    """A weight matrix of the model, or all of its kind in the repeats of a segment."""

    path: str
    role: str
    kind: str  # attention, experts, router, ffn, embedding, head
    count: int  # matrices: repeats, times experts
    in_features: int
    out_features: int

    @property
    def parameters(self) -> int:
        return self.count * self.in_features * self.out_features


def matrices(config: ModelConfig) -> Iterator[Matrix]:
    """Every weight matrix, in the order of the stack."""
    width, vocabulary = config.width, config.vocab_size
    yield Matrix("embedding", "embedding", "embedding", 1, vocabulary, width)
    for index, segment in enumerate(config.segments):
        for position, layer in enumerate(segment.unit):
            place, count = f"segment_{index}/layer_{position}", segment.repeats
            attention = layer.attention
            queries = attention.num_heads * attention.head_dim
            keys = attention.num_kv_heads * attention.head_dim
            shapes = {"q": (width, queries), "k": (width, keys), "v": (width, keys)}
            shapes["o"] = (queries, width)
            for role, shape in shapes.items():
                yield Matrix(f"{place}/attention/{role}", role, "attention", count, *shape)
            if isinstance(layer.ffn, MoeConfig):
                experts = layer.ffn.routing.num_experts
                yield Matrix(f"{place}/moe/router", "router", "router", count, width, experts)
                kind, hidden, parent = "experts", layer.ffn.expert_dim, "moe"
                count = count * experts
            else:
                kind, hidden, parent = "ffn", layer.ffn.hidden_dim, "mlp"
            for role in EXPERT_ROLES:
                shape = (hidden, width) if role == "down" else (width, hidden)
                yield Matrix(f"{place}/{parent}/{role}", role, kind, count, *shape)
    if not config.tie_embeddings:
        yield Matrix("head", "head", "head", 1, width, vocabulary)


def resolve_targets(config: ModelConfig, kind: str, targets: tuple[str, ...]) -> frozenset[str]:
    """The module paths that carry factors; `<layer>/moe/gate_up` for the fused role."""
    adapted: set[str] = set()
    every = list(matrices(config))
    makes_experts = kind in ("mixlora", "mola")
    if makes_experts and any(matrix.kind == "experts" for matrix in every):
        raise UserError(
            f"adapter.kind={kind} makes experts on dense layers, and this {config.family} model "
            "has experts of its own; use adapter.kind=expert_lora."
        )
    for target in targets:
        paths = _match(every, kind, target)
        if not paths:
            roles = sorted({m.role for m in every if _takes_role(m, kind)})
            roles += ["gate_up"] if _match(every, kind, "gate_up") else []
            other = "lora" if kind == "expert_lora" else "expert_lora"
            way = f" adapter.kind={other} adapts it." if _match(every, other, target) else ""
            raise UserError(
                f"adapter.targets: {target!r} matches no weight of this {config.family} model with "
                f"adapter.kind={kind}. Roles: {', '.join(roles)}; or a regular expression over "
                f"paths such as {every[1].path}.{way}"
            )
        adapted |= paths
    _check_experts(config, kind, adapted)
    return frozenset(adapted)


def _takes_role(matrix: Matrix, kind: str) -> bool:
    return matrix.kind in ("attention", "experts" if kind == "expert_lora" else "ffn")


def _match(every: list[Matrix], kind: str, target: str) -> set[str]:
    if target == "gate_up":
        gates = [m for m in every if m.role == "gate" and m.kind == "experts"]
        return {m.path.removesuffix("gate") + "gate_up" for m in gates if _takes_role(m, kind)}
    by_role = {m.path for m in every if m.role == target and _takes_role(m, kind)}
    if by_role or re.fullmatch(r"\w+", target):
        return by_role
    try:
        pattern = re.compile(target)
    except re.error as error:
        message = f"adapter.targets: {target!r} is not a regular expression: {error}."
        raise UserError(message) from None
    adaptable = ("attention", "experts", "ffn")
    return {m.path for m in every if m.kind in adaptable and pattern.fullmatch(m.path)}


def _check_experts(config: ModelConfig, kind: str, adapted: set[str]) -> None:
    per_layer = {}
    for matrix in matrices(config):
        if matrix.kind == "router":
            layer = matrix.path.removesuffix("router")
            own = [path for path in adapted if path.startswith(layer)]
            per_layer[layer] = {path.removeprefix(layer) for path in own}
    roles = list(per_layer.values())
    if kind == "expert_lora" and not any(roles):
        raise UserError(
            "adapter.targets: adapter.kind=expert_lora adapts no expert; add gate, up, down or "
            "gate_up, "
            f"or set adapter.kind=lora (model: {config.family}, {len(config.moe_layers)} MoE "
            f"layers)."
        )
    if kind in ("mixlora", "mola"):
        kinds = ("ffn",) if kind == "mixlora" else ("attention", "ffn")
        _check_own_experts(kind, _roles_of_layers(config, adapted, kinds))
    if kind == "lora" and any(roles):
        raise UserError(
            "adapter.targets: adapter.kind=lora does not adapt experts; use expert_lora."
        )
    if any(found != roles[0] for found in roles):
        raise UserError(
            f"adapter.targets must adapt the same expert projections in every MoE layer, got "
            f"{per_layer}."
        )
    if roles and "gate_up" in roles[0] and roles[0] & {"gate", "up"}:
        raise UserError(
            "adapter.targets: gate_up next to gate or up on the experts; one or the other."
        )


def _roles_of_layers(
    config: ModelConfig, adapted: set[str], kinds: tuple[str, ...]
) -> dict[str, set[str]]:
    """Adapted roles among the matrices of these kinds, of every layer of every unit."""
    per_layer: dict[str, set[str]] = {}
    for matrix in matrices(config):
        if matrix.kind in kinds:
            layer = matrix.path.rsplit("/", 2)[0]
            roles = per_layer.setdefault(layer, set())
            roles |= {matrix.role} if matrix.path in adapted else set()
    return per_layer


def _check_own_experts(kind: str, every_layer: dict[str, set[str]]) -> None:
    roles = list(every_layer.values())
    if not any(roles):
        raise UserError(
            "adapter.targets: adapter.kind=mixlora adapts no FFN; add gate, up or down, or set "
            "adapter.kind=lora."
        )
    if any(found != roles[0] for found in roles):
        raise UserError(
            "adapter.targets must adapt the same projections in every layer for "
            f"adapter.kind={kind}, got {every_layer}."
        )


# ---------------------------------------------------------------------------------------------
# coverage


def linear_inputs(config: ModelConfig, spec: AdapterSpec) -> int:
    """Numbers a token that the plain LoRA of one layer reads, summed over its matrices; of the
    layer with the most.
    """
    by_layer: collections.Counter[tuple[str, str]] = collections.Counter()
    for matrix in matrices(config):
        if matrix.path in spec.paths:
            segment, layer, module, _ = matrix.path.split("/")
            is_plain = spec.experts_module not in ("*", module)
            by_layer[segment, layer] += matrix.in_features if is_plain else 0
    return max(by_layer.values(), default=0)


class Coverage(NamedTuple):
    """One line of the table: what happens to a kind of matrix."""

    path: str
    matrices: int
    parameters: int
    trained: int
    status: str


def coverage(config: ModelConfig, spec: AdapterSpec, targets: tuple[str, ...]) -> list[Coverage]:
    """Every weight matrix, adapted or frozen, and by which rule."""
    rows = []
    for matrix in matrices(config):
        rows.append(_cover(config, matrix, spec, targets))
        if matrix.path in spec.paths and spec.experts_module == "*":
            rows.append(_new_router(config, spec, matrix, f"{matrix.path}_router"))
        elif spec.experts_module == "mlp" and (matrix.kind, matrix.role) == ("ffn", "gate"):
            path = matrix.path.replace("/gate", "/router")
            rows.append(_new_router(config, spec, matrix, path))
    return rows


def _new_router(config: ModelConfig, spec: AdapterSpec, matrix: Matrix, path: str) -> Coverage:
    trained = sum(own_experts(config, spec, matrix.path)) * matrix.in_features
    return Coverage(path, matrix.count, 0, trained, "new, trained")


def own_experts(config: ModelConfig, spec: AdapterSpec, path: str) -> list[int]:
    """How many of the adapter's own experts a matrix has, in every repeat of its segment; closed
    ones, which only fill the arrays, are not counted.
    """
    segment, layer, *_ = path.split("/")
    counts = spec.experts_per_layer or (config.routing.num_experts,) * config.num_layers
    start = 0
    for index, each in enumerate(config.segments):
        width = len(each.unit)
        if segment == f"segment_{index}":
            own = counts[start : start + each.repeats * width]
            return list(own[int(layer.removeprefix("layer_")) :: width])
        start += each.repeats * width
    raise AssertionError(f"{path} is in no segment of the model")


def _cover(
    config: ModelConfig, matrix: Matrix, spec: AdapterSpec, targets: tuple[str, ...]
) -> Coverage:
    row = Coverage(matrix.path, matrix.count, matrix.parameters, 0, "")
    size = matrix.in_features + matrix.out_features
    if matrix.path in spec.paths:
        if spec.experts_module == "*" or (matrix.kind, spec.experts_module) == ("ffn", "mlp"):
            experts = own_experts(config, spec, matrix.path)
            span = f"{min(experts)} to {max(experts)}" if len(set(experts)) > 1 else experts[0]
            status = f"{span} LoRA experts, rank up to {spec.max_rank}"
            trained = sum(experts) * spec.max_rank * size
            return row._replace(trained=trained, status=status)
        rank = spec.max_rank if matrix.kind == "experts" else spec.rank
        label = f"LoRA, rank up to {rank}" if matrix.kind == "experts" else f"LoRA, rank {rank}"
        each = rank * size
        if spec.dora:
            label, each = f"DoRA, rank {rank}", each + matrix.out_features
        return row._replace(trained=matrix.count * each, status=label)
    fused = matrix.path.rpartition("/")[0] + "/gate_up"
    if matrix.kind == "experts" and matrix.role in ("gate", "up") and fused in spec.paths:
        # The fused pair is counted with gate; up shares it.
        fused_size = matrix.in_features + 2 * matrix.out_features
        trained = matrix.count * spec.max_rank * fused_size if matrix.role == "gate" else 0
        return row._replace(trained=trained, status=f"LoRA on gate_up, rank up to {spec.max_rank}")
    if matrix.kind == "router":
        if spec.train_router:
            status = "trained after warm-up (adapter.router)"
            return row._replace(trained=matrix.parameters, status=status)
        return row._replace(status="frozen: adapter.router=frozen")
    if matrix.kind in ("embedding", "head"):
        return row._replace(status="frozen: never adapted")
    return row._replace(status=f"frozen: not in adapter.targets ({', '.join(targets)})")


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
