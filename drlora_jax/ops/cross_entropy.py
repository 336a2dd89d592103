"""Sum of next-token negative log-likelihoods without a [tokens, vocabulary] array.

The head is applied to chunks of tokens. With a frozen head the gradient of the hidden states is
computed in the same forward chunk (two matrix products instead of three), and the backward pass
only scales it. With a trained head (pretraining) each chunk is recomputed in the backward pass.
Letters: T tokens, D model, V vocabulary, C chunks.
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
    pad = -hidden_TD.shape[0] % min(CHUNK_TOKENS, hidden_TD.shape[0])
    hidden_TD = jnp.pad(hidden_TD, ((0, pad), (0, 0)))
    targets_T, mask_T = jnp.pad(targets_T, (0, pad)), jnp.pad(mask_T, (0, pad))
    size = min(CHUNK_TOKENS, hidden_TD.shape[0])
    chunks = (
        hidden_TD.reshape(-1, size, hidden_TD.shape[1]),
        targets_T.reshape(-1, size),
        mask_T.reshape(-1, size),
    )
    if not head_grad:
        return _frozen_head_nll(soft_cap, *chunks, lax.stop_gradient(head_DV))
    chunk_nll = jax.checkpoint(functools.partial(_chunk_nll, soft_cap))
    return jnp.sum(lax.map(lambda chunk: chunk_nll(*chunk, head_DV), chunks))


def _chunk_nll(soft_cap, hidden_TD, targets_T, mask_T, head_DV):
    logits_TV = jnp.matmul(hidden_TD, head_DV, preferred_element_type=jnp.float32)
    if soft_cap is not None:
        logits_TV = soft_cap * jnp.tanh(logits_TV / soft_cap)
    target_T = jnp.take_along_axis(logits_TV, targets_T[:, None], axis=-1)[:, 0]
    return jnp.sum((jax.nn.logsumexp(logits_TV, axis=-1) - target_T) * mask_T)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _frozen_head_nll(soft_cap, hidden_CTD, targets_CT, mask_CT, head_DV):
    chunks = (hidden_CTD, targets_CT, mask_CT)
    return jnp.sum(lax.map(lambda chunk: _chunk_nll(soft_cap, *chunk, head_DV), chunks))


def _frozen_head_forward(soft_cap, hidden_CTD, targets_CT, mask_CT, head_DV):
    def chunk(inputs):
        hidden_TD, targets_T, mask_T = inputs
        return jax.value_and_grad(functools.partial(_chunk_nll, soft_cap))(
            hidden_TD, targets_T, mask_T, head_DV
        )

    nll_C, d_hidden_CTD = lax.map(chunk, (hidden_CTD, targets_CT, mask_CT))
    return jnp.sum(nll_C), (d_hidden_CTD, mask_CT, head_DV)


def _frozen_head_backward(soft_cap, saved, cotangent):
    d_hidden_CTD, mask_CT, head_DV = saved
    d_hidden_CTD = (cotangent * d_hidden_CTD).astype(d_hidden_CTD.dtype)
    return d_hidden_CTD, None, jnp.zeros_like(mask_CT), jnp.zeros_like(head_DV)


_frozen_head_nll.defvjp(_frozen_head_forward, _frozen_head_backward)
