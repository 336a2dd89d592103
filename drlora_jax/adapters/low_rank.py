"""Low-rank updates: W' = W + s B A, with A and B stored as rank rows a [R, D_in] and b [R, D_out].

A starts Kaiming-uniform with a = sqrt(5), that is U(+-1 / sqrt(D_in)), for every allocated rank; B
starts at zero, so an adapted model starts as its base. The scale is constant: it does not depend on
the active rank, which keeps growth function-preserving.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from drlora_jax.ops.experts.shared import RoleLora


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def lora_delta(x_BTD: jax.Array, a_RD: jax.Array, b_RF: jax.Array, scale: float) -> jax.Array:
    """s * (x A^T) B in the dtype of x; gradients of A and B are summed in f32."""
    return _low_rank(x_BTD, a_RD, scale) @ b_RF.astype(x_BTD.dtype)


def _low_rank(x_BTD, a_RD, scale: float):
    return ((x_BTD @ a_RD.astype(x_BTD.dtype).T) * scale).astype(x_BTD.dtype)


def _lora_delta_forward(x_BTD, a_RD, b_RF, scale):
    z_BTR = _low_rank(x_BTD, a_RD, scale)
    return z_BTR @ b_RF.astype(x_BTD.dtype), (x_BTD, z_BTR, a_RD, b_RF)


def _lora_delta_backward(scale, saved, dy_BTF):
    """Written out: what autodiff makes of it transposes the cotangent of all tokens for B's
    gradient, which on CPU takes longer than the product.
    """
    x_BTD, z_BTR, a_RD, b_RF = saved
    dz_BTR = _low_rank(dy_BTF, b_RF, scale)
    tokens = tuple(range(x_BTD.ndim - 1))

    def gram(left, right):
        axes = (tokens, tokens)
        return jnp.tensordot(left, right, axes, preferred_element_type=jnp.float32)

    dx_BTD = dz_BTR @ a_RD.astype(dz_BTR.dtype)
    return dx_BTD, gram(dz_BTR, x_BTD), gram(z_BTR, dy_BTF)


lora_delta.defvjp(_lora_delta_forward, _lora_delta_backward)


def init_a(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Kaiming-uniform with a = sqrt(5) over the last axis: U(+-1 / sqrt(D_in)), f32."""
    bound = shape[-1] ** -0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def drop_inputs(x_BTD: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    keep = jax.random.bernoulli(key, 1.0 - rate, x_BTD.shape)
    return jnp.where(keep, x_BTD / (1.0 - rate), 0).astype(x_BTD.dtype)


def drop_in_training(module: nn.Module, x_BTD: jax.Array, rate: float) -> jax.Array:
    """The input of a low-rank product: as it is, unless the module was given dropout's key."""
    if rate == 0 or not module.has_rng("dropout"):
        return x_BTD
    return drop_inputs(x_BTD, rate, module.make_rng("dropout"))


class ExpertPairs(nn.Module):
    """LoRA matrices and gate of one projection for all experts.

    The collection `rank_mask` holds the gate f32 [E, R]: the mask arange(R) < rank, times a gate of
    ones whose gradient is the importance of each rank. It is state: never trained, derived from the
    integer ranks.
    """

    num_experts: int
    in_features: int
    out_features: int
    max_rank: int

    @nn.compact
    def __call__(self) -> RoleLora:
        shape_ER = (self.num_experts, self.max_rank)
        a_shape = (*shape_ER, self.in_features)
        a_ERD = self.variable("lora", "a", lambda: init_a(self.make_rng("params"), a_shape)).value
        b_ERF = self.variable(
            "lora", "b", lambda: jnp.zeros((*shape_ER, self.out_features), jnp.float32)
        ).value
        return RoleLora(a_ERD, b_ERF, rank_gate(self, shape_ER))


def rank_gate(module: nn.Module, shape_ER: tuple[int, int]) -> jax.Array:
    """The gate of the module's experts, f32 [E, R]."""
    return module.variable("rank_mask", "gate", lambda: jnp.ones(shape_ER, jnp.float32)).value
