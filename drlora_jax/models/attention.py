"""The attention block: projections, norms of queries and keys, rotary positions, packed causal
attention.

With a cache (collection `cache`, [B, G, S, H]) slot s holds position s. Several tokens per row are
the start of a text and attend to each other; a single one attends to the cache.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from drlora_jax.models.architecture import AttentionConfig
from drlora_jax.models.layers import Projection, RmsNorm, rotate
from drlora_jax.models.options import DecoderOptions, keep
from drlora_jax.models.routing import RoutingStats
from drlora_jax.ops.attention.api import attend_cached


class Attention(nn.Module):
    config: AttentionConfig
    options: DecoderOptions
    norm_epsilon: float

    @nn.compact
    def __call__(self, x_BTD, segment_ids_BT, positions_BT) -> tuple[jax.Array, list[RoutingStats]]:
        """The output [B, T, D], and the statistics of the adapter's routers on the projections."""
        config, cache_length = self.config, self.options.cache_length
        routed: list[RoutingStats] = []

        def project(role, features, has_bias, inputs):
            projection = Projection(features, self.options, has_bias, name=role)
            y, stats = projection(inputs, segment_ids_BT)
            routed.extend(stats)
            return y

        def heads(role, count):
            """Projects, normalises, clips and rotates, [B, T, count, H]."""
            y = project(role, count * config.head_dim, config.has_qkv_bias, x_BTD)
            is_normed = role != "v" and config.qk_norm != "none"
            if is_normed:  # the norm's gradient needs what it was given, or the projection again
                y = keep(y, role)
            if is_normed and config.qk_norm == "full":
                y = RmsNorm(self.norm_epsilon, self.options.dtype, name=f"{role}_norm")(y)
            if config.clip_qkv is not None:
                y = jnp.clip(y, -config.clip_qkv, config.clip_qkv)
            y = y.reshape(*y.shape[:2], count, config.head_dim)
            if is_normed and config.qk_norm == "head":
                y = RmsNorm(self.norm_epsilon, self.options.dtype, name=f"{role}_norm")(y)
            if role != "v":
                y = rotate(y, positions_BT, config.rope)
            return y if is_normed else keep(y, role)

        q_BTNH, k_BTGH = heads("q", config.num_heads), heads("k", config.num_kv_heads)
        v_BTGH = heads("v", config.num_kv_heads)
        sinks_N = None
        if config.has_sinks:
            shape_N, dtype = (config.num_heads,), self.options.dtype
            sinks_N = self.param("sinks", nn.initializers.zeros, shape_N, dtype)
        options = {
            "scale": config.scale,
            "window": config.window,
            "soft_cap": config.soft_cap,
            "sinks_N": sinks_N,
        }
        if cache_length:
            k_BGSH = self._cached("keys", k_BTGH, positions_BT)
            v_BGSV = self._cached("values", v_BTGH, positions_BT)
        if cache_length and x_BTD.shape[1] == 1:
            positions_B = positions_BT[:, 0]
            out_BTNH = attend_cached(q_BTNH[:, 0], k_BGSH, v_BGSV, positions_B, **options)
        else:
            out_BTNH = self.options.ops.attend(
                q_BTNH,
                k_BTGH,
                v_BTGH,
                segment_ids_BT=segment_ids_BT,
                positions_BT=positions_BT,
                **options,
            )
        out_BTD = out_BTNH.reshape(*x_BTD.shape[:2], -1)
        return project("o", x_BTD.shape[-1], config.has_output_bias, out_BTD), routed

    def _cached(self, name: str, new_BTGH: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """The cache [B, G, S, H] with the new tokens written at their positions."""
        new_BGTH = new_BTGH.transpose(0, 2, 1, 3)
        shape = (*new_BGTH.shape[:2], self.options.cache_length, new_BGTH.shape[3])
        cache = self.variable("cache", name, jnp.zeros, shape, new_BTGH.dtype)

        def write(row_GSH, new_GTH, start):
            return jax.lax.dynamic_update_slice(row_GSH, new_GTH, (0, start, 0))

        cache.value = jax.vmap(write)(cache.value, new_BGTH, positions_BT[:, 0])
        return cache.value
