"""Computes causal attention over packed rows with jax's splash kernel for TPU.

Causality and the window are lazy masks of the kernel, documents are its segment ids: no mask or
score array exists. Output and logsumexp carry the name `attn_lse`, so that a rematerialisation
policy saves them and the kernel does not run twice.
"""

import functools

import jax
import jax.numpy as jnp

LANES = 128  # row lengths must be a multiple of it; head widths are padded to one
LARGEST_BLOCK = 512


def attend_splash(
    q_BTNH,
    k_BSGH,
    v_BSGV,
    segment_ids_BT,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Computes attention, [B, T, N, V] in the dtype of the queries; positions must rise by one
    within a document.

    Args:
      interpret: Interprets the kernel without a TPU, slowly.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel

    batch, length, heads, _ = q_BTNH.shape
    groups, value_width = k_BSGH.shape[2], v_BSGV.shape[3]
    per_group = heads // groups
    run = _kernel(length, per_group, window, soft_cap, interpret)
    q_BTNH = (q_BTNH * jnp.asarray(scale, q_BTNH.dtype)).astype(q_BTNH.dtype)
    q_BGMTH = _padded(q_BTNH).reshape(batch, length, groups, per_group, -1).transpose(0, 2, 3, 1, 4)
    k_BGSH, v_BGSV = (_padded(x).transpose(0, 2, 1, 3) for x in (k_BSGH, v_BSGV))

    def row(q_GMTH, k_GSH, v_GSV, segment_ids_T):
        segments = kernel.SegmentIds(segment_ids_T, segment_ids_T)
        return jax.vmap(lambda q, k, v: run(q, k, v, segments))(q_GMTH, k_GSH, v_GSV)

    out = jax.vmap(row)(q_BGMTH, k_BGSH, v_BGSV, segment_ids_BT)
    out = out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, -1)
    return out[..., :value_width].astype(q_BTNH.dtype)


def _padded(x):
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, -x.shape[-1] % LANES)))


def _kernel(length: int, heads: int, window: int | None, soft_cap: float | None, interpret: bool):
    """Returns the kernel for the query heads that share a key-value head."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    block = next(size for size in (LARGEST_BLOCK, 384, 256, LANES) if length % size == 0)
    sizes = splash.BlockSizes(
        **dict.fromkeys(("block_q", "block_kv", "block_kv_compute"), block),
        **dict.fromkeys(("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"), block),
        **dict.fromkeys(("block_q_dq", "block_kv_dq"), block),
    )
    shape = (length, length)
    mask = (
        splash.CausalMask(shape) if window is None else splash.LocalMask(shape, (window - 1, 0), 0)
    )
    make = functools.partial(
        splash.make_splash_mqa_single_device,
        mask=splash.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        attn_logits_soft_cap=soft_cap,
        residual_checkpoint_name="attn_lse",
    )
    return make(interpret=True) if interpret else make()
