"""Arrays over layers and experts, [L, E, ...], as trees like the LoRA matrices; and back, the
measures of every rank.

The functions take the model, whose config and adapter say which layers have experts and where their
matrices are. Letters: L layers with experts, P projections, E, R as in `allocation.base`. A matrix
that all experts of a layer share has an axis of 1 in the place of E.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from drlora_jax.models.transformer import Decoder, split_layers, stack_layers


def rank_axes(model: Decoder) -> tuple[int, int]:
    """The sizes (P, E) of arrays [L, P, E, R]: adapted projections of experts, and experts."""
    adapter = model.options.adapter
    routing = adapter.routing(model.config)
    return len(adapter.expert_roles()), routing.num_experts if routing else 0


def _split(model: Decoder, array_L) -> dict[tuple[str, str], jax.Array]:
    layers = model.options.adapter.expert_layers(model.config)
    return split_layers(model.config, layers, array_L)


def gates_tree(model: Decoder, gate_LPER: jax.Array) -> dict:
    """The model's `rank_mask` collection from one array."""
    adapter = model.options.adapter
    roles, tree = adapter.expert_roles(), {}
    for (segment, layer), gate in _split(model, gate_LPER).items():
        layer_tree = tree.setdefault(segment, {}).setdefault(layer, {})
        for index, role in enumerate(roles):
            module, name = adapter.expert_place(role)
            layer_tree.setdefault(module, {})[name] = {"gate": gate[:, index]}
    return tree if roles else {}


def masks_tree(model: Decoder, mask_LER: jax.Array) -> dict:
    """The `rank_mask` collection for one mask of every expert, the same for all projections."""
    layers, experts, ranks = mask_LER.shape
    shape = (layers, len(model.options.adapter.expert_roles()), experts, ranks)
    return gates_tree(model, jnp.broadcast_to(mask_LER[:, None], shape))


def lora_like(
    model: Decoder, lora: dict, expert_LE: jax.Array, mask_LER: jax.Array, router: jax.Array
) -> dict:
    """A tree like `lora` of what multiplies or selects each leaf, broadcastable to it.

    LoRA matrices of experts get mask_LER (times expert_LE), those that a layer's experts share get
    it where any expert has it, router deltas get `router`; plain LoRA and the routers of an
    adapter's own experts get True.
    """

    def rest(names):
        return router if names[-1] == "router_delta" else jnp.asarray(True)

    rows_LER1 = (expert_LE[:, :, None] & (mask_LER > 0))[..., None]
    return over_experts(model, lora, rows_LER1, rest)


def over_experts(model: Decoder, lora: dict, array_L: jax.Array, rest: Callable) -> dict:
    """A tree like `lora`: the layers' slices of array_L [L, E, ...] for LoRA matrices of experts
    (of booleans, any over E for those that the experts share), and rest(names of the path) for
    every other leaf.
    """
    adapter, per_layer = model.options.adapter, _split(model, array_L)
    places = {adapter.expert_place(role) for role in adapter.expert_roles()}

    def leaf(path, value):
        names = [part.key for part in path]
        if tuple(names[2:4]) not in places:
            return rest(names)
        rows = per_layer[names[0], names[1]]
        is_shared = value.shape[1] < rows.shape[1]
        return jnp.any(rows, axis=1, keepdims=True) if is_shared else rows

    return jax.tree.map_with_path(leaf, lora)


def over_roles(model: Decoder, measure: Callable) -> jax.Array:
    """[L, P, E, R] of measure(layer, role) -> [repeats, E, R], where layer(tree, role) has the
    leaves `a` and `b` of a tree like `lora`.
    """
    adapter, segments = model.options.adapter, {}
    numbers_L = jnp.zeros(len(adapter.expert_layers(model.config)))
    for segment, name in _split(model, numbers_L):

        def layer(tree, role, segment=segment, name=name):
            module, place = adapter.expert_place(role)
            return tree[segment][name][module][place]

        rows = [measure(layer, role) for role in adapter.expert_roles()]
        segments.setdefault(segment, []).append(jnp.stack(rows, axis=1))
    return stack_layers(list(segments.values()))
