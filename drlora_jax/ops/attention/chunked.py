"""Computes causal attention over packed rows in blocks, with an online softmax: memory grows
linearly with the row's length, not quadratically.

For every block of queries, a loop iterates over the blocks of keys from the first one that its
documents or its window can reach up to its own block, so packed documents cost as much as separate
ones. The backward pass recomputes the probabilities of a block from the saved logsumexp. Letters as
in `ops.attention.api`; C positions per block, M query heads per key-value head.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

BLOCK = 128
UNSEEN = -1e30  # score of a masked key: finite, so that a query without keys so far gives no NaN


class Options(NamedTuple):
    scale: float
    window: int | None = None
    soft_cap: float | None = None
    block: int = BLOCK


def attend_row(
    q_TNH, k_SGH, v_SGV, segment_ids_T, positions_T, sinks_N, options: Options
) -> jax.Array:
    """Computes attention within one row, [T, N, V], in the dtype of the queries.

    `sinks_N` is f32; -inf means no sink.
    """
    length, heads, _ = q_TNH.shape
    groups = k_SGH.shape[1]
    pad = -length % options.block
    q_TNH, k_SGH, v_SGV = (jnp.pad(x, ((0, pad), (0, 0), (0, 0))) for x in (q_TNH, k_SGH, v_SGV))
    # Padding queries and keys form a document of their own.
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


class _Blocks:
    """Divides a row into blocks: which keys a block of queries attends to, and their scores."""

    def __init__(self, options: Options, segment_ids_T, positions_T):
        self._options, self._segments, self._positions = options, segment_ids_T, positions_T
        size = options.block
        self.count = segment_ids_T.size // size
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
        """Returns (scores, their derivative by the uncapped scores), f32."""
        scores = self._options.scale * _product("GMTH,GSH->GMTS", q_GMCH, k_GCH)
        cap = self._options.soft_cap
        if cap is None:
            return scores, 1.0
        capped = jnp.tanh(scores / cap)
        return cap * capped, 1.0 - capped * capped


def _product(equation, left, right):
    return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)


def _forward(options, q_GMTH, k_GSH, v_GSV, segment_ids_T, positions_T, sinks_GM):
    blocks = _Blocks(options, segment_ids_T, positions_T)

    def block_of_queries(i):
        q_GMCH = blocks.cut(q_GMTH, i, 2)

        def block_of_keys(j, carry):
            old_max, total, out = carry  # of the online softmax: m, l and the unnormalised output
            scores, _ = blocks.scores(q_GMCH, blocks.cut(k_GSH, j, 1))
            is_seen = blocks.is_seen(i, j)
            new_max = jnp.maximum(old_max, jnp.max(jnp.where(is_seen, scores, UNSEEN), axis=-1))
            weights = jnp.where(is_seen, jnp.exp(scores - new_max[..., None]), 0.0)
            rescale = jnp.exp(old_max - new_max)
            v_GCV = blocks.cut(v_GSV, j, 1)
            added = _product("GMTS,GSV->GMTV", weights.astype(v_GCV.dtype), v_GCV)
            total = total * rescale + jnp.sum(weights, axis=-1)
            return new_max, total, out * rescale[..., None] + added

        shape = q_GMCH.shape[:3]
        # A sink is a score that is present from the start and has no value.
        first_max = jnp.broadcast_to(jnp.maximum(sinks_GM, UNSEEN)[:, :, None], shape)
        total = jnp.broadcast_to((sinks_GM > UNSEEN).astype(jnp.float32)[:, :, None], shape)
        start = (first_max, total, jnp.zeros((*shape, v_GSV.shape[-1]), jnp.float32))
        last_max, total, out = lax.fori_loop(blocks.first[i], i + 1, block_of_keys, start)
        return (out / total[..., None]).astype(q_GMTH.dtype), last_max + jnp.log(total)

    out, lse = lax.map(block_of_queries, jnp.arange(blocks.count))
    return _joined(out), _joined(lse)


def _joined(blocks):
    """Joins [blocks, G, M, C, ...] to [G, M, T, ...]."""
    moved = jnp.moveaxis(blocks, 0, 2)
    return moved.reshape(*moved.shape[:2], -1, *moved.shape[4:])


def _attend_forward(options, *inputs):
    # Named, so that a rematerialisation policy can save them instead of recomputing all blocks.
    out, lse = (checkpoint_name(x, "attn_lse") for x in _forward(options, *inputs))
    return out, (inputs, out, lse)


def _attend_backward(options, saved, d_out):
    inputs, out, lse = saved
    q_GMTH, k_GSH, v_GSV, segment_ids_T, positions_T, sinks_GM = inputs
    blocks = _Blocks(options, segment_ids_T, positions_T)
    # The gradient through the softmax's normalisation, common to all scores of a query.
    mean = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def block_of_queries(carry, i):
        q_GMCH, do_GMCV = blocks.cut(q_GMTH, i, 2), blocks.cut(d_out, i, 2)
        lse_i, mean_i = blocks.cut(lse, i, 2)[..., None], blocks.cut(mean, i, 2)[..., None]

        def block_of_keys(j, carry):
            dq, dk, dv = carry
            k_GCH, v_GCV = blocks.cut(k_GSH, j, 1), blocks.cut(v_GSV, j, 1)
            scores, slope = blocks.scores(q_GMCH, k_GCH)
            weights = jnp.where(blocks.is_seen(i, j), jnp.exp(scores - lse_i), 0.0)
            d_weights = _product("GMTV,GSV->GMTS", do_GMCV, v_GCV)
            d_scores = (options.scale * weights * (d_weights - mean_i) * slope).astype(q_GMTH.dtype)
            dq = dq + _product("GMTS,GSH->GMTH", d_scores, k_GCH)
            dk = _add(dk, _product("GMTS,GMTH->GSH", d_scores, q_GMCH), j, options.block)
            weights = weights.astype(v_GSV.dtype)
            return dq, dk, _add(dv, _product("GMTS,GMTV->GSV", weights, do_GMCV), j, options.block)

        start = (jnp.zeros(q_GMCH.shape, jnp.float32), *carry)
        dq, *carry = lax.fori_loop(blocks.first[i], i + 1, block_of_keys, start)
        return tuple(carry), dq.astype(q_GMTH.dtype)

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k_GSH, v_GSV))
    (dk, dv), dq = lax.scan(block_of_queries, zeros, jnp.arange(blocks.count))
    d_sinks = -jnp.sum(jnp.exp(sinks_GM[:, :, None] - lse) * mean, axis=-1)
    return _joined(dq), dk.astype(k_GSH.dtype), dv.astype(v_GSV.dtype), None, None, d_sinks


def _add(total, part, block, size: int):
    start = block * size
    old = lax.dynamic_slice_in_dim(total, start, size, axis=1)
    return lax.dynamic_update_slice_in_dim(total, old + part, start, axis=1)


_attend.defvjp(_attend_forward, _attend_backward)
