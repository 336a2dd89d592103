"""Norms, rotary positions and the projection that every weight matrix outside the experts is.

Legend of the letters in names: B batch, T query position, S key position, D model width, N query
heads, G key-value heads, H head width, E experts, K experts per token, P assignments of a token to
an expert (B * T * K), F expert hidden, R ranks, L layers, V vocabulary.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from drlora_jax.models.architecture import RopeConfig
from drlora_jax.models.options import DecoderOptions
from drlora_jax.models.routing import RoutingStats

kernel_init = nn.initializers.normal(0.02)


def last_axis(vector: jax.Array, like: jax.Array) -> jax.Array:
    """A vector with as many axes as `like`, to meet its last one: nothing here broadcasts ranks in
    silence.
    """
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


def rms_norm(x_BTD: jax.Array, scale_D: jax.Array, epsilon: float) -> jax.Array:
    """x / rms(x) in f32, cast to the dtype of x, times the scale."""
    x_f32 = x_BTD.astype(jnp.float32)
    x_f32 = x_f32 * jax.lax.rsqrt(jnp.mean(x_f32 * x_f32, axis=-1, keepdims=True) + epsilon)
    return last_axis(scale_D, x_BTD) * x_f32.astype(x_BTD.dtype)


def rotate(x_BTNH: jax.Array, positions_BT: jax.Array, rope: RopeConfig) -> jax.Array:
    """Rotary embedding of the first 2 * len(inverse_frequencies) dimensions; angles in f32."""
    frequencies = jnp.asarray(rope.inverse_frequencies, jnp.float32)
    angles = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None]
    cos = (jnp.cos(angles) * rope.attention_factor).astype(x_BTNH.dtype)
    sin = (jnp.sin(angles) * rope.attention_factor).astype(x_BTNH.dtype)
    width = 2 * frequencies.size
    turned, rest = x_BTNH[..., :width], x_BTNH[..., width:]
    if rope.interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = jnp.split(turned, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


class RmsNorm(nn.Module):
    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BTD):
        scale_D = self.param("scale", nn.initializers.ones, (x_BTD.shape[-1],), self.dtype)
        return rms_norm(x_BTD, scale_D, self.epsilon)


class Projection(nn.Module):
    """x @ kernel (+ bias), and what the adapter adds where the module's name is one of its paths.

    Returns it with the statistics of the adapter's routers.
    """

    features: int
    options: DecoderOptions
    has_bias: bool = False

    @nn.compact
    def __call__(self, x_BTD, segment_ids_BT) -> tuple[jax.Array, list[RoutingStats]]:
        dtype, adapter = self.options.dtype, self.options.adapter
        kernel_DF = self.param("kernel", kernel_init, (x_BTD.shape[-1], self.features), dtype)
        product_BTF = y_BTF = x_BTD @ kernel_DF
        if self.has_bias:
            bias_F = self.param("bias", nn.initializers.zeros, (self.features,), dtype)
            y_BTF = y_BTF + last_axis(bias_F, y_BTF)
        if self.name not in adapter.paths:
            return y_BTF, []
        added_BTF, stats = adapter.delta(self, x_BTD, product_BTF, kernel_DF, segment_ids_BT)
        return y_BTF + added_BTF, stats
