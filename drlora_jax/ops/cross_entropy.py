"""Sum of next-token negative log-likelihoods without a [tokens, vocabulary] array.

The head is applied to chunks of tokens. With a frozen head tokens with a target come first and the
chunks after the last of them are not computed: a prompt costs nothing here. The gradient of the
hidden states is computed in the same forward chunk (two matrix products instead of three), and the
backward pass only scales it. With a trained head (pretraining, where every token is a target) each
chunk is recomputed in the backward pass. Letters: T tokens, D model, V vocabulary, C chunks.
"""

import functools

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
) -> jax.Array:
    """Sum over tokens of mask * -log softmax(hidden @ head)[target], in nats, f32.

    Args:
      mask_T: f32, 0 leaves a token out.
      soft_cap: logits become cap * tanh(logits / cap).
      head_grad: whether the head receives a gradient.
    """
    size = min(CHUNK_TOKENS, hidden_TD.shape[0])
    pad = -hidden_TD.shape[0] % size
    hidden_TD = jnp.pad(hidden_TD, ((0, pad), (0, 0)))
    targets_T, mask_T = jnp.pad(targets_T, (0, pad)), jnp.pad(mask_T, (0, pad))
    if not head_grad:
        head_DV = lax.stop_gradient(head_DV)
        return _frozen_head_nll(soft_cap, size, hidden_TD, targets_T, mask_T, head_DV)
    chunks = (
        hidden_TD.reshape(-1, size, hidden_TD.shape[1]),
        targets_T.reshape(-1, size),
        mask_T.reshape(-1, size),
    )
    chunk_nll = jax.checkpoint(functools.partial(_chunk_nll, soft_cap))
    return jnp.sum(lax.map(lambda chunk: chunk_nll(*chunk, head_DV), chunks))


def _chunk_nll(soft_cap, hidden_TD, targets_T, mask_T, head_DV):
    logits_TV = jnp.matmul(hidden_TD, head_DV, preferred_element_type=jnp.float32)
    if soft_cap is not None:
        logits_TV = soft_cap * jnp.tanh(logits_TV / soft_cap)
    target_T = jnp.take_along_axis(logits_TV, targets_T[:, None], axis=-1)[:, 0]
    return jnp.sum((jax.nn.logsumexp(logits_TV, axis=-1) - target_T) * mask_T)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _frozen_head_nll(soft_cap, size, hidden_TD, targets_T, mask_T, head_DV):
    def chunk(nll, start, inputs):
        return nll + _chunk_nll(soft_cap, *inputs, head_DV)

    order_T = _targets_first(mask_T)
    tokens = (hidden_TD[order_T], targets_T[order_T], mask_T[order_T])
    return _each_chunk(size, chunk, jnp.zeros(()), tokens)


def _frozen_head_forward(soft_cap, size, hidden_TD, targets_T, mask_T, head_DV):
    def chunk(carry, start, inputs):
        nll, d_hidden_TD = carry
        chunk_nll, d_chunk_TD = jax.value_and_grad(functools.partial(_chunk_nll, soft_cap))(
            *inputs, head_DV
        )
        d_hidden_TD = lax.dynamic_update_slice_in_dim(d_hidden_TD, d_chunk_TD, start, axis=0)
        return nll + chunk_nll, d_hidden_TD

    order_T = _targets_first(mask_T)
    tokens = (hidden_TD[order_T], targets_T[order_T], mask_T[order_T])
    start = (jnp.zeros(()), jnp.zeros_like(hidden_TD))
    nll, d_hidden_TD = _each_chunk(size, chunk, start, tokens)
    return nll, (d_hidden_TD[jnp.argsort(order_T)], head_DV)


def _frozen_head_backward(soft_cap, size, saved, cotangent):
    d_hidden_TD, head_DV = saved
    d_hidden_TD = (cotangent * d_hidden_TD).astype(d_hidden_TD.dtype)
    zeros_T = jnp.zeros(d_hidden_TD.shape[0], jnp.float32)
    return d_hidden_TD, None, zeros_T, jnp.zeros_like(head_DV)


_frozen_head_nll.defvjp(_frozen_head_forward, _frozen_head_backward)


def _targets_first(mask_T):
    return jnp.argsort(mask_T == 0, stable=True)


def _each_chunk(size: int, run, carry, tokens):
    """`run(carry, start, chunk of tokens)` over the chunks that have a target."""

    def one(index, carry):
        start = index * size
        inputs = [lax.dynamic_slice_in_dim(values, start, size) for values in tokens]
        return run(carry, start, inputs)

    chunks = (jnp.sum(tokens[2] != 0) + size - 1) // size
    return lax.fori_loop(0, chunks, one, carry)
