"""Causal attention over packed rows in blocks, with an online softmax: memory grows with the row's
length, not with its square.

A block of queries walks the blocks of keys from the first one that its documents or its window can
reach up to its own, so documents that are packed together cost what they cost apart. The backward
pass computes the probabilities of a block again from the logsumexp that the forward pass kept.
Letters as in `ops.attention`; C positions of a block, M query heads of a key-value head.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

BLOCK = 128
UNSEEN = -1e30  # a score: finite, so that a row that sees nothing yet has no NaN


class Options(NamedTuple):
    scale: float
    window: int | None = None
    soft_cap: float | None = None
    block: int = BLOCK


def attend_row(
    q_TNH, k_SGH, v_SGV, segment_ids_T, positions_T, sinks_N, options: Options
) -> jax.Array:
    """Attention within one row, [T, N, V], in the dtype of the queries.

    `sinks_N` is f32; -inf is no sink.
    """
    length, heads, _ = q_TNH.shape
    groups = k_SGH.shape[1]
    pad = -length % options.block
    q_TNH, k_SGH, v_SGV = (jnp.pad(x, ((0, pad), (0, 0), (0, 0))) for x in (q_TNH, k_SGH, v_SGV))
    # Queries and keys behind the row are of a document of their own.
    segment_ids_T = jnp.pad(segment_ids_T, (0, pad), constant_values=-1)
    positions_T = jnp.pad(positions_T, (0, pad))
    q_GMTH = q_TNH.reshape(-1, groups, heads // groups, q_TNH.shape[-1]).transpose(1, 2, 0, 3)
    k_GSH, v_GSV = k_SGH.transpose(1, 0, 2), v_SGV.transpose(1, 0, 2)
    sinks_GM = sinks_N.reshape(groups, -1)
    out_GMTV = _attend(options, q_GMTH, k_GSH, v_GSV, segment_ids_T, positions_T, sinks_GM)
    return out_GMTV.transpose(2, 0, 1, 3).reshape(-1, heads, v_SGV.shape[-1])[:length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, q_GMTH, k_GSH, v_GSV, segment_ids_T, positions_T, sinks_GM):
    return _forward(options, q_GMTH, k_GSH, v_GSV, segment_ids_T, positions_T, sinks_GM)[0]


class _Walk:
    """Blocks of one row: which keys a block of queries meets, and their scores."""

    def __init__(self, options: Options, segment_ids_T, positions_T):
        self._options, self._segments, self._positions = options, segment_ids_T, positions_T
        size = options.block
        self.blocks = segment_ids_T.size // size
        index_T = jnp.arange(segment_ids_T.size)
        reach_T = positions_T
        if options.window is not None:
            reach_T = jnp.minimum(reach_T, options.window - 1)
        first_T = jnp.maximum(index_T - reach_T, 0)
        self.first = jnp.min(first_T.reshape(-1, size), axis=1) // size

    def cut(self, array, block, axis: int):
        size = self._options.block
        return lax.dynamic_slice_in_dim(array, block * size, size, axis)

    def is_seen(self, i, j):
        segments_i, segments_j = (self.cut(self._segments, block, 0) for block in (i, j))
        positions_i, positions_j = (self.cut(self._positions, block, 0) for block in (i, j))
        age_CC = positions_i[:, None] - positions_j[None, :]
        seen_CC = (segments_i[:, None] == segments_j[None, :]) & (age_CC >= 0)
        if self._options.window is not None:
            seen_CC &= age_CC < self._options.window
        return seen_CC[None, None]

    def scores(self, q_GMCH, k_GCH):
        """(scores, their slope by the uncapped ones), f32."""
        scores = self._options.scale * _product("GMTH,GSH->GMTS", q_GMCH, k_GCH)
        cap = self._options.soft_cap
        if cap is None:
            return scores, 1.0
        capped = jnp.tanh(scores / cap)
        return cap * capped, 1.0 - capped * capped


def _product(equation, left, right):
    return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)


def _forward(options, q_GMTH, k_GSH, v_GSV, segment_ids_T, positions_T, sinks_GM):
    walk = _Walk(options, segment_ids_T, positions_T)

    def block_of_queries(i):
        q_GMCH = walk.cut(q_GMTH, i, 2)

        def block_of_keys(j, carry):
            top, total, out = carry
            scores, _ = walk.scores(q_GMCH, walk.cut(k_GSH, j, 1))
            is_seen = walk.is_seen(i, j)
            new_top = jnp.maximum(top, jnp.max(jnp.where(is_seen, scores, UNSEEN), axis=-1))
            weights = jnp.where(is_seen, jnp.exp(scores - new_top[..., None]), 0.0)
            shrink = jnp.exp(top - new_top)
            v_GCV = walk.cut(v_GSV, j, 1)
            added = _product("GMTS,GSV->GMTV", weights.astype(v_GCV.dtype), v_GCV)
            total = total * shrink + jnp.sum(weights, axis=-1)
            return new_top, total, out * shrink[..., None] + added

        shape = q_GMCH.shape[:3]
        # A sink is a score that is there from the start and has no value.
        top = jnp.broadcast_to(jnp.maximum(sinks_GM, UNSEEN)[:, :, None], shape)
        total = jnp.broadcast_to((sinks_GM > UNSEEN).astype(jnp.float32)[:, :, None], shape)
        start = (top, total, jnp.zeros((*shape, v_GSV.shape[-1]), jnp.float32))
        top, total, out = lax.fori_loop(walk.first[i], i + 1, block_of_keys, start)
        return (out / total[..., None]).astype(q_GMTH.dtype), top + jnp.log(total)

    out, lse = lax.map(block_of_queries, jnp.arange(walk.blocks))
    return _joined(out), _joined(lse)


def _joined(blocks):
    """[blocks, G, M, C, ...] to [G, M, T, ...]."""
    moved = jnp.moveaxis(blocks, 0, 2)
    return moved.reshape(*moved.shape[:2], -1, *moved.shape[4:])


def _attend_forward(options, *inputs):
    # Named, so that a rematerialisation policy can keep them instead of walking all blocks again.
    out, lse = (checkpoint_name(x, "attn_lse") for x in _forward(options, *inputs))
    return out, (inputs, out, lse)


def _attend_backward(options, saved, d_out):
    inputs, out, lse = saved
    q_GMTH, k_GSH, v_GSV, segment_ids_T, positions_T, sinks_GM = inputs
    walk = _Walk(options, segment_ids_T, positions_T)
    # What the softmax's normalisation sends back to every score of a query.
    mean = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def block_of_queries(carry, i):
        q_GMCH, do_GMCV = walk.cut(q_GMTH, i, 2), walk.cut(d_out, i, 2)
        lse_i, mean_i = walk.cut(lse, i, 2)[..., None], walk.cut(mean, i, 2)[..., None]

        def block_of_keys(j, carry):
            dq, dk, dv = carry
            k_GCH, v_GCV = walk.cut(k_GSH, j, 1), walk.cut(v_GSV, j, 1)
            scores, slope = walk.scores(q_GMCH, k_GCH)
            weights = jnp.where(walk.is_seen(i, j), jnp.exp(scores - lse_i), 0.0)
            d_weights = _product("GMTV,GSV->GMTS", do_GMCV, v_GCV)
            d_scores = (options.scale * weights * (d_weights - mean_i) * slope).astype(q_GMTH.dtype)
            dq = dq + _product("GMTS,GSH->GMTH", d_scores, k_GCH)
            dk = _add(dk, _product("GMTS,GMTH->GSH", d_scores, q_GMCH), j, options.block)
            weights = weights.astype(v_GSV.dtype)
            return dq, dk, _add(dv, _product("GMTS,GMTV->GSV", weights, do_GMCV), j, options.block)

        start = (jnp.zeros(q_GMCH.shape, jnp.float32), *carry)
        dq, *carry = lax.fori_loop(walk.first[i], i + 1, block_of_keys, start)
        return tuple(carry), dq.astype(q_GMTH.dtype)

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k_GSH, v_GSV))
    (dk, dv), dq = lax.scan(block_of_queries, zeros, jnp.arange(walk.blocks))
    d_sinks = -jnp.sum(jnp.exp(sinks_GM[:, :, None] - lse) * mean, axis=-1)
    return _joined(dq), dk.astype(k_GSH.dtype), dv.astype(v_GSV.dtype), None, None, d_sinks


def _add(total, part, block, size: int):
    start = block * size
    old = lax.dynamic_slice_in_dim(total, start, size, axis=1)
    return lax.dynamic_update_slice_in_dim(total, old + part, start, axis=1)


_attend.defvjp(_attend_forward, _attend_backward)
