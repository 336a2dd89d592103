"""Tables of what a trained adapter adds to a base model, layer by layer, for every export.

For a matrix W [D_in, D_out] the adapted one is W + A^T B with rank rows a [R, D_in], b [R, D_out].
The scale of the run is folded into B, and rows of inactive ranks are zero in both, so these arrays
alone define the function, without mask, rank or alpha.
"""

from typing import NamedTuple

import numpy as np

from drlora_jax.models.architecture import Layer, Matrix, ModelConfig
from drlora_jax.models.placement import Placement

ROUTER = "moe/router"


class Pair(NamedTuple):
    """Rank rows of one matrix, or of that matrix in all experts (a leading [E])."""

    a: np.ndarray  # [R, D_in]
    b: np.ndarray  # [R, D_out]

    @property
    def rank(self) -> int:
        return self.a.shape[-2]


class LayerUpdate(NamedTuple):
    """What the adapter adds to one layer; all arrays f32."""

    layer: Layer
    matrices: tuple[Matrix, ...]  # of the layer; paths begin below it
    plain: dict[str, Pair]  # by module path below the layer, such as attention/q
    experts: dict[str, Pair]  # by role: gate, up or gate_up, and down
    router_DE: np.ndarray | None  # added to the router; None if it was not trained
    # With DoRA, by the same paths: m less the norms of the base model's columns, [D_out].
    magnitudes: dict[str, np.ndarray]

    def matrices_in(self, leaf: tuple[str, ...], half: int | None = None) -> list[Matrix]:
        """Returns the matrices of a leaf of the layer's parameters, or of one half of its columns;
        none in a norm or a bias.
        """
        found = (matrix for matrix in self.matrices if matrix.leaf == leaf)
        return [matrix for matrix in found if half is None or matrix.half == half]


def layer_updates(
    config: ModelConfig, adapter: Placement, lora: dict, ranks_LE: np.ndarray
) -> list[LayerUpdate]:
    """Returns the update of every layer for the `lora` collection (host arrays) at these ranks.

    Pairs of experts have as many rows as the largest active rank of any layer: each expert's active
    rows are a prefix, and the other allocated rows are left out.
    """
    expert_layers = list(adapter.expert_layers(config))
    roles = {"/".join(adapter.expert_place(role)): role for role in adapter.expert_roles()}
    rows, found = int(ranks_LE.max(initial=0)), []
    for layer in config.layers():
        plain, experts, router_DE, magnitudes = {}, {}, None, {}
        for path, leaf in _modules(layer.below(lora)):
            if path == f"{ROUTER}_delta":
                update_DE = np.asarray(leaf[layer.repeat])
                router_DE = update_DE if update_DE.any() else None  # zero until warm-up ends
            elif path in roles:
                pair = _pair(leaf, layer.repeat, adapter.of_experts.scale)
                active_E = ranks_LE[expert_layers.index(layer.number)]
                experts[roles[path]] = _active(pair, active_E, rows)
            else:
                path = path.removesuffix("/lora")
                plain[path] = _pair(leaf, layer.repeat, adapter.scale)
                if "magnitude_delta" in leaf:
                    magnitudes[path] = np.asarray(leaf["magnitude_delta"][layer.repeat])
        matrices = tuple(layer.config.matrices(config.width))
        found.append(LayerUpdate(layer, matrices, plain, experts, router_DE, magnitudes))
    return found


def _modules(tree: dict, path: str = ""):
    """Yields (path, {a, b, ...}) of every pair below a layer, and (path, array) of a router
    delta.
    """
    for name, node in tree.items():
        here = f"{path}/{name}" if path else name
        if not isinstance(node, dict) or node.keys() >= {"a", "b"}:
            yield here, node
        else:
            yield from _modules(node, here)


def _pair(matrices: dict, repeat: int, scale: float) -> Pair:
    return Pair(np.asarray(matrices["a"][repeat]), np.asarray(matrices["b"][repeat]) * scale)


def _active(pair: Pair, ranks_E: np.ndarray, rows: int) -> Pair:
    """Zeroes the rows of inactive ranks in both matrices; a matrix that experts share is
    repeated.
    """
    is_active_ER1 = (np.arange(rows)[None] < ranks_E[:, None])[..., None]
    return Pair(*(np.where(is_active_ER1, part[:, :rows], np.float32(0)) for part in pair))


# -------------------------------------------------------------------------------------- gate and up


def expert_pair(experts: dict[str, Pair], role: str) -> Pair | None:
    """Returns the pair of gate, up or down alone; None if the adapter leaves that matrix
    unchanged.
    """
    if role in experts or role == "down" or "gate_up" not in experts:
        return experts.get(role)
    a, b = experts["gate_up"]
    hidden = b.shape[-1] // 2
    return Pair(a, b[..., :hidden] if role == "gate" else b[..., hidden:])


def fused_pair(experts: dict[str, Pair]) -> Pair | None:
    """Returns one pair for the columns [gate | up].

    Separate pairs become one with the sum of their ranks: A rows below each other, B
    block-diagonal. This is exact, whereas adding the pairs' rows would mix them.
    """
    if "gate_up" in experts:
        return experts["gate_up"]
    gate, up = experts.get("gate"), experts.get("up")
    if gate is None and up is None:
        return None
    columns = (gate or up).b.shape[-1]
    padding = ((0, 0), (0, 0))
    parts = []
    if gate is not None:
        parts.append(Pair(gate.a, np.pad(gate.b, (*padding, (0, columns)))))
    if up is not None:
        parts.append(Pair(up.a, np.pad(up.b, (*padding, (columns, 0)))))
    return Pair(*(np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True)))
