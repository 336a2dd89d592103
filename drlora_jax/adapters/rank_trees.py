"""Arrays over layers and experts, [L, E, ...], as trees beside the factors; and back, measures of
every rank.

Letters: L layers with experts, P projections, E, R as in `allocation.base`.
"""

import fnmatch
from collections.abc import Callable

import jax
import jax.numpy as jnp

from drlora_jax.adapters.lora import AdapterSpec
from drlora_jax.models.architecture import ATTENTION_ROLES, ModelConfig
from drlora_jax.models.transformer import split_layers, stack_layers
from drlora_jax.ops.experts.shared import ROLES


def expert_roles(adapter: AdapterSpec) -> tuple[str, ...]:
    """Roles with factors on the routed experts, in the order of the P axis."""
    return tuple(
        role
        for role in (*ATTENTION_ROLES, *ROLES)
        if fnmatch.filter(adapter.paths, f"*/{adapter.experts_module}/{role}")
    )


def gates_tree(config: ModelConfig, roles: tuple[str, ...], gate_LPER: jax.Array) -> dict:
    """The model's `rank_mask` collection from one array."""
    tree: dict = {}
    for (segment, layer), gate in split_layers(config, gate_LPER).items():
        layer_tree = tree.setdefault(segment, {}).setdefault(layer, {})
        for index, role in enumerate(roles):
            module, name = config.expert_place(role)
            layer_tree.setdefault(module, {})[name] = {"gate": gate[:, index]}
    return tree if roles else {}


def lora_like(
    config: ModelConfig, lora: dict, expert_LE: jax.Array, mask_LER: jax.Array, router: jax.Array
) -> dict:
    """A tree like `lora` of what multiplies or selects each leaf, broadcastable to it.

    Expert factors get mask_LER (times expert_LE), router deltas get `router`; plain LoRA and the
    routers of an adapter's own experts get True.
    """

    def rest(names):
        return router if names[-1] == "router_delta" else jnp.asarray(True)

    rows_LER1 = (expert_LE[:, :, None] & (mask_LER > 0))[..., None]
    return over_experts(config, lora, rows_LER1, rest)


def over_experts(config: ModelConfig, lora: dict, array_L: jax.Array, rest: Callable) -> dict:
    """A tree like `lora`: the layers' slices of array_L [L, ...] for factors of experts, and
    rest(names of the path) for every other leaf.
    """
    per_layer = split_layers(config, array_L)

    def leaf(path, _):
        names = [part.key for part in path]
        is_expert = len(names) > 3 and names[3].endswith("_lora")
        return per_layer[names[0], names[1]] if is_expert else rest(names)

    return jax.tree.map_with_path(leaf, lora)


def over_roles(config: ModelConfig, roles: tuple[str, ...], measure: Callable) -> jax.Array:
    """[L, P, E, R] of measure(layer, role) -> [repeats, E, R], where layer(tree, role) has the
    leaves `a` and `b` of a tree like `lora`.
    """
    segments: dict = {}
    for segment, name in split_layers(config, jnp.zeros(len(config.moe_layers))):

        def layer(tree, role, segment=segment, name=name):
            module, place = config.expert_place(role)
            return tree[segment][name][module][place]

        rows = [measure(layer, role) for role in roles]
        segments.setdefault(segment, []).append(jnp.stack(rows, axis=1))
    return stack_layers(list(segments.values()))
