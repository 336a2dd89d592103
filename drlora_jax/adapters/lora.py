"""Low-rank adapters: W' = W + s * B A, with A and B stored as rank rows a [R, D_in] and b [R,
D_out].

`AdapterSpec` says which matrices of the model are adapted. A starts Kaiming-uniform with a =
sqrt(5), that is U(+-1 / sqrt(D_in)), for every allocated rank; B starts at zero, so an adapted
model starts as its base. The scale is constant: it does not depend on the active rank, which keeps
growth function-preserving.

With DoRA (arXiv 2402.09353) the update turns the columns of W and their lengths train apart,

    W' = (W + s A^T B) m / ||W + s A^T B||,    ||.|| and m by column,

with the norm taken as a constant in the backward pass (section 4.3). What is kept is m - ||W||,
zero at the start, so that an adapter can be made before its base is read.

LoRA Dropout (arXiv 2404.09610) leaves out columns of A and rows of B (inputs and outputs of the
update, never ranks), the same for all tokens of a micro-batch.
"""

import functools
from dataclasses import dataclass, replace

import flax.linen as nn
import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class AdapterSpec:
    """Which modules carry low-rank factors; static and hashable."""

    paths: frozenset[str] = frozenset()  # module paths, such as segment_0/layer_0/attention/q
    scale: float = 1.0
    dropout: float = 0.0
    expert_scale: float | None = None  # None: as plain LoRA's
    expert_dropout: float | None = None
    rank: int = 0  # of plain LoRA
    max_rank: int = 0  # of every expert
    train_router: bool = False
    # Whose paths mean factors of experts: the base's, mlp (MixLoRA), or * for any (MoLA).
    experts_module: str = "moe"
    # Of an adapter's own experts, those of every layer that exist; (): as many everywhere.
    experts_per_layer: tuple[int, ...] = ()
    dora: bool = False  # of plain LoRA
    factor_dropout: float = 0.0  # of plain LoRA

    @property
    def of_experts(self) -> "AdapterSpec":
        """The same with the scale and dropout of experts as its own."""
        own = {"scale": self.expert_scale, "dropout": self.expert_dropout}
        return replace(self, **{name: value for name, value in own.items() if value is not None})


NO_ADAPTER = AdapterSpec()
SMALLEST_NORM = 1e-15  # of a column with DoRA: one of zeros stays one


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


def dora_scale(
    kernel_DF: jax.Array, a_RD: jax.Array, b_RF: jax.Array, growth_F: jax.Array, scale: float
) -> jax.Array:
    """m / ||W + s A^T B|| by column, f32 [F], with m = ||W|| + growth; only m has a gradient.

    The norm is put together from products with R rows: W + s A^T B itself is never made.
    """
    kernel_DF = jax.lax.stop_gradient(kernel_DF.astype(jnp.float32))
    a_RD, b_RF = (jax.lax.stop_gradient(rows * scale**0.5) for rows in (a_RD, b_RF))
    base_F = jnp.sum(kernel_DF**2, axis=0)
    change_F = jnp.sum(b_RF * (2 * (a_RD @ kernel_DF) + (a_RD @ a_RD.T) @ b_RF), axis=0)
    norm_F = jnp.sqrt(jnp.maximum(base_F + change_F, SMALLEST_NORM**2))
    return (jnp.sqrt(base_F) + growth_F) / norm_F


class PlainLora(nn.Module):
    """One pair of factors for one matrix; gives what is added to its product x W."""

    features: int
    adapter: AdapterSpec

    @nn.compact
    def __call__(self, x_BTD, product_BTF, kernel_DF):
        rank, width = self.adapter.rank, x_BTD.shape[-1]
        a_RD = self.variable(
            "lora", "a", lambda: init_a(self.make_rng("params"), (rank, width))
        ).value
        b_RF = self.variable(
            "lora", "b", lambda: jnp.zeros((rank, self.features), jnp.float32)
        ).value
        x_BTD = drop_in_training(self, x_BTD, self.adapter.dropout)
        kept_a_RD, kept_b_RF = self._leave_out(a_RD), self._leave_out(b_RF)
        delta_BTF = lora_delta(x_BTD, kept_a_RD, kept_b_RF, self.adapter.scale)
        if not self.adapter.dora:
            return delta_BTF
        growth_F = self.variable("lora", "magnitude_delta", jnp.zeros, (self.features,)).value
        scale_F = dora_scale(kernel_DF, a_RD, b_RF, growth_F, self.adapter.scale)
        scale_F = scale_F.reshape((1,) * (product_BTF.ndim - 1) + scale_F.shape)
        return ((scale_F - 1) * product_BTF + scale_F * delta_BTF).astype(product_BTF.dtype)

    def _leave_out(self, rows_RX: jax.Array) -> jax.Array:
        """Rank rows without the features that LoRA Dropout leaves out, the rest / (1 - rate)."""
        rate = self.adapter.factor_dropout
        if rate == 0:
            return rows_RX
        return rows_RX * drop_in_training(self, jnp.ones((1, rows_RX.shape[1])), rate)
