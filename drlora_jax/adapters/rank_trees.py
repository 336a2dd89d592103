"""Arrays over layers and experts, [L, E, ...], as trees beside the factors; and back, the
importance of every rank.

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


def with_probe(config: ModelConfig, mask_LER: jax.Array) -> jax.Array:
    """The mask with every expert's next inactive rank let through. Its B row is zero, so the model
    computes the same; its B row has a gradient.
    """
    first_LE1 = mask_LER[..., :1]
    if config.experts_module == "moe":  # an adapter's own expert without a rank stays closed
        first_LE1 = jnp.ones_like(first_LE1)
    return jnp.concatenate([first_LE1, mask_LER[..., :-1]], axis=-1)


def probe_importance(
    config: ModelConfig, roles: tuple[str, ...], grads: dict, mask_LER: jax.Array
) -> jax.Array:
    """sum_i dB_ik^2 for the rank k that `with_probe` added, 0 for all others, f32 [L, P, E, R]."""
    rows_LPER = _over_roles(
        config, roles, lambda layer, role: jnp.sum(layer(grads, role)["b"] ** 2, axis=-1)
    )
    return rows_LPER * (with_probe(config, mask_LER) - mask_LER)[:, None]


def elementwise_importance(
    config: ModelConfig, roles: tuple[str, ...], lora: dict, grads: dict
) -> jax.Array:
    """(sum_j |A_kj dA_kj|) * (sum_i |B_ik dB_ik|) for every rank, f32 [L, P, E, R]."""

    def sides(layer, role):
        factors, grad = layer(lora, role), layer(grads, role)
        a_side, b_side = (
            jnp.sum(jnp.abs(factors[side] * grad[side]), axis=-1) for side in ("a", "b")
        )
        return a_side * b_side

    return _over_roles(config, roles, sides)


def _over_roles(config: ModelConfig, roles: tuple[str, ...], measure: Callable) -> jax.Array:
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
