"""Sums next-token negative log-likelihoods without a [tokens, vocabulary] array.

The head is applied to chunks of tokens. With a frozen head, tokens with a target are sorted first
and chunks without targets are skipped: a prompt costs nothing here. The gradient of the hidden
states is computed in the same forward chunk (two matrix products instead of three), and the
backward pass only scales it. With a trained head (pretraining, where every token is a target) each
chunk is recomputed in the backward pass. With `vocab_axis`, every device of that mesh axis holds a
part of the vocabulary: maxima, sums and target logits are communicated over the axis, logits never
are. Letters: T tokens, D model, V vocabulary, C chunks.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

CHUNK_TOKENS = 1024


def summed_nll(
    hidden_TD: jax.Array,
    head_DV: jax.Array,
    targets_T: jax.Array,
    mask_T: jax.Array,
    *,
    soft_cap: float | None = None,
    head_grad: bool = False,
    vocab_axis: str | None = None,
) -> jax.Array:
    """Returns the sum over tokens of mask * -log softmax(hidden @ head)[target], in nats, f32.

    Args:
      mask_T: f32, 0 excludes a token.
      soft_cap: Logits become cap * tanh(logits / cap).
      head_grad: Whether the head receives a gradient.
      vocab_axis: Inside a shard_map, the axis over which the columns of a frozen head are sharded
        evenly; tokens are the same on all its devices.
    """
    size = min(CHUNK_TOKENS, hidden_TD.shape[0])
    pad = -hidden_TD.shape[0] % size
    hidden_TD = jnp.pad(hidden_TD, ((0, pad), (0, 0)))
    targets_T, mask_T = jnp.pad(targets_T, (0, pad)), jnp.pad(mask_T, (0, pad))
    if not head_grad:
        head_DV = lax.stop_gradient(head_DV)
        static = _Static(size, soft_cap, vocab_axis)
        return _frozen_head_nll(static, hidden_TD, targets_T, mask_T, head_DV)
    chunks = (
        hidden_TD.reshape(-1, size, hidden_TD.shape[1]),
        targets_T.reshape(-1, size),
        mask_T.reshape(-1, size),
    )
    chunk_nll = jax.checkpoint(functools.partial(_chunk_nll, soft_cap))
    return jnp.sum(lax.map(lambda chunk: chunk_nll(*chunk, head_DV), chunks))


class _Static(NamedTuple):
    size: int  # tokens per chunk
    soft_cap: float | None
    vocab_axis: str | None


def _chunk_nll(soft_cap, hidden_TD, targets_T, mask_T, head_DV):
    logits_TV = jnp.matmul(hidden_TD, head_DV, preferred_element_type=jnp.float32)
    if soft_cap is not None:
        logits_TV = soft_cap * jnp.tanh(logits_TV / soft_cap)
    target_T = jnp.take_along_axis(logits_TV, targets_T[:, None], axis=-1)[:, 0]
    return jnp.sum((jax.nn.logsumexp(logits_TV, axis=-1) - target_T) * mask_T)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _frozen_head_nll(static, hidden_TD, targets_T, mask_T, head_DV):
    def chunk(nll, start, inputs):
        return nll + _frozen_chunk(static, *inputs, head_DV)[0]

    order_T = _targets_first(mask_T)
    tokens = (hidden_TD[order_T], targets_T[order_T], mask_T[order_T])
    return _each_chunk(static.size, chunk, jnp.zeros(()), tokens)


def _frozen_chunk(static, hidden_TD, targets_T, mask_T, head_DV):
    """Returns the summed NLL, and a function that computes this device's part of its gradient with
    respect to hidden_TD.
    """
    logits_TV = jnp.matmul(hidden_TD, head_DV, preferred_element_type=jnp.float32)
    slope_TV = None
    if static.soft_cap is not None:
        turned_TV = jnp.tanh(logits_TV / static.soft_cap)
        logits_TV, slope_TV = static.soft_cap * turned_TV, 1.0 - turned_TV**2
    size, axis = logits_TV.shape[1], static.vocab_axis
    highest_T1 = jnp.max(logits_TV, axis=1, keepdims=True)
    if axis is not None:
        highest_T1 = lax.pmax(highest_T1, axis)
        targets_T = targets_T - lax.axis_index(axis) * size  # outside [0, size): on another device
    share_TV = jnp.exp(logits_TV - highest_T1)
    is_target_TV = jnp.arange(size)[None] == targets_T[:, None]
    total_T = jnp.sum(share_TV, axis=1)
    target_T = jnp.sum(jnp.where(is_target_TV, logits_TV, 0.0), axis=1)
    if axis is not None:
        total_T, target_T = lax.psum((total_T, target_T), axis)
    nll = jnp.sum((jnp.log(total_T) + highest_T1[:, 0] - target_T) * mask_T)

    def gradient():
        d_logits_TV = (share_TV / total_T[:, None] - is_target_TV) * mask_T[:, None]
        if slope_TV is not None:
            d_logits_TV = d_logits_TV * slope_TV
        return d_logits_TV.astype(hidden_TD.dtype) @ head_DV.T

    return nll, gradient


def _frozen_head_forward(static, hidden_TD, targets_T, mask_T, head_DV):
    def chunk(carry, start, inputs):
        nll, d_hidden_TD = carry
        chunk_nll, gradient = _frozen_chunk(static, *inputs, head_DV)
        d_hidden_TD = lax.dynamic_update_slice_in_dim(d_hidden_TD, gradient(), start, axis=0)
        return nll + chunk_nll, d_hidden_TD

    order_T = _targets_first(mask_T)
    tokens = (hidden_TD[order_T], targets_T[order_T], mask_T[order_T])
    start = (jnp.zeros(()), jnp.zeros_like(hidden_TD))
    nll, d_hidden_TD = _each_chunk(static.size, chunk, start, tokens)
    if static.vocab_axis is not None:
        d_hidden_TD = lax.psum(d_hidden_TD, static.vocab_axis)
    return nll, (d_hidden_TD[jnp.argsort(order_T)], head_DV)


def _frozen_head_backward(static, saved, cotangent):
    d_hidden_TD, head_DV = saved
    d_hidden_TD = (cotangent * d_hidden_TD).astype(d_hidden_TD.dtype)
    zeros_T = jnp.zeros(d_hidden_TD.shape[0], jnp.float32)
    return d_hidden_TD, None, zeros_T, jnp.zeros_like(head_DV)


_frozen_head_nll.defvjp(_frozen_head_forward, _frozen_head_backward)


def _targets_first(mask_T):
    return jnp.argsort(mask_T == 0, stable=True)


def _each_chunk(size: int, run, carry, tokens):
    """Calls `run(carry, start, chunk of tokens)` for the chunks that have a target."""

    def one(index, carry):
        start = index * size
        inputs = [lax.dynamic_slice_in_dim(values, start, size) for values in tokens]
        return run(carry, start, inputs)

    chunks = (jnp.sum(tokens[2] != 0) + size - 1) // size
    return lax.fori_loop(0, chunks, one, carry)
