"""The expert operation on CPU in compiled code: `native/experts.cc`, for frozen float32 weights.

Like `block` it sorts (token, expert) assignments by expert and follows the active ranks; it pads no
blocks, and the products with LoRA matrices are part of those with weights. Up to
`library.MOST_PARTS` cores compute equal parts of the sorted assignments. Letters as in `block`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from drlora_jax.ops.experts.shared import ROLES, Dropout, RoleLora
from drlora_jax.ops.native import library


def cannot(platform: str, dtype, base_grad: bool = False) -> str | None:
    """Returns why the kernels cannot do this in programs compiled for `platform`, or None."""
    if base_grad:
        return "its kernels have no gradients of the base"
    return library.cannot(platform, jnp.dtype(dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def expert_mlp(spec, x_TD, expert_TK, weight_TK, weights, lora, dropout, layer):
    """As `ops.grouped.expert_mlp`; `weights` are stacks [L, E, ...], of which `layer` is used."""
    return _forward(spec, (x_TD, expert_TK, weight_TK, weights, lora, dropout, layer), False)[0]


def _expert_mlp_forward(spec, *inputs):
    y_TD, gate_up_PF = _forward(spec, inputs, keeps=not spec.repeats)
    return y_TD, (inputs, checkpoint_name(gate_up_PF, "moe_gu") if gate_up_PF.size else gate_up_PF)


def _expert_mlp_backward(spec, saved, dy_TD):
    inputs, gate_up_PF = saved
    x_TD, expert_TK, weight_TK, _, lora, _, _ = inputs
    matrices = _matrices(lora, inputs[3])
    size = sum(array[0].size for array in matrices)
    parts = library.parts()
    results = (x_TD, expert_TK.size, *matrices, (parts - 1, *x_TD.shape), (parts - 1, size))
    arguments = (*_arguments(spec, inputs), dy_TD, gate_up_PF)
    dx_TD, dp_P, *d_matrices = _call("ExpertsBackward", spec, results, arguments)
    d_lora = {
        role: RoleLora(*d_matrices[3 * index : 3 * index + 3])
        for index, role in enumerate(ROLES)
        if role in lora
    }
    return dx_TD, None, dp_P.reshape(weight_TK.shape), None, d_lora, None, None


expert_mlp.defvjp(_expert_mlp_forward, _expert_mlp_backward)


def _forward(spec, inputs, keeps: bool):
    """Sums over experts [T, D], and pre-activations of sorted assignments (none if not kept)."""
    x_TD, expert_TK, _, (w_gate_up_LEDF, _), *_ = inputs
    kept = (expert_TK.size if keeps else 0, w_gate_up_LEDF.shape[-1])
    results = (x_TD, kept, (library.parts() - 1, *x_TD.shape))
    return _call("ExpertsForward", spec, results, _arguments(spec, inputs))[:2]


def _arguments(spec, inputs) -> tuple:
    x_TD, expert_TK, weight_TK, weights, lora, dropout, layer = inputs
    slots_T = expert_TK.shape[1] * jnp.arange(len(x_TD), dtype=jnp.int32)
    if dropout.first_slot_T is not None:
        slots_T = dropout.first_slot_T.astype(jnp.int32)
    seeds = dropout_seeds(dropout) if spec.dropout else jnp.zeros((len(ROLES), 2), jnp.uint32)
    tokens = (x_TD, expert_TK.astype(jnp.int32), weight_TK)
    return (*tokens, *weights, layer, seeds, slots_T, *_matrices(lora, weights))


def dropout_seeds(dropout: Dropout) -> jax.Array:
    """Seeds of rows and of columns for each of `ROLES`, u32 [roles, 2]: those of `shared.drop`."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(dropout.key, jnp.arange(len(ROLES)))
    return jax.vmap(lambda key: jax.random.bits(key, (2,), jnp.uint32))(keys)


def _matrices(lora: dict[str, RoleLora], weights) -> list[jax.Array]:
    """A, B and gates of all roles; those that are not adapted have no ranks."""
    _, experts, width, both = weights[0].shape
    sizes = {"gate": (width, both // 2), "up": (width, both // 2), "gate_up": (width, both)}
    sizes |= {"down": (both // 2, width)}
    arrays = []
    for role in ROLES:
        d_in, d_out = sizes[role]
        none = [jnp.zeros((experts, 0, *tail), jnp.float32) for tail in ((d_in,), (d_out,), ())]
        arrays += list(lora.get(role, none))
    return arrays


def _call(name: str, spec, results, arguments):
    """Runs a kernel; its results are float32 and as large as the arrays or shapes given."""

    def shape(like):
        return (like,) if isinstance(like, int) else getattr(like, "shape", like)

    out = [jax.ShapeDtypeStruct(shape(like), jnp.float32) for like in results]
    return jax.ffi.ffi_call(library.kernels().targets[name], out, vmap_method="sequential")(
        *arguments,
        scale=np.float32(spec.scale),
        is_gelu=spec.activation == "gelu_tanh",
        dropout=np.float64(spec.dropout),
        parts=np.int64(library.parts()),
    )
