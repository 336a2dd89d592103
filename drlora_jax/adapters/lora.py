"""Placement `lora`: one pair of LoRA matrices for each adapted projection of attention or a dense
FFN; and low-rank updates as every placement makes them.

    W' = W + s B A,    A and B stored as rank rows a [R, D_in] and b [R, D_out]

A starts Kaiming-uniform with a = sqrt(5), that is U(+-1 / sqrt(D_in)), for every allocated rank; B
starts at zero, so an adapted model starts as its base. The scale is constant: it does not depend on
the active rank, which keeps growth function-preserving.

With DoRA (arXiv 2402.09353) the update turns the columns of W and their lengths train apart,

    W' = (W + s A^T B) m / ||W + s A^T B||,    ||.|| and m by column,

with the norm taken as a constant in the backward pass (section 4.3). What is kept is m - ||W||,
zero at the start, so that an adapter can be made before its base is read.

LoRA Dropout (arXiv 2404.09610) leaves out columns of A and rows of B (inputs and outputs of the
update, never ranks), the same for all tokens of a micro-batch.
"""

import functools
from dataclasses import dataclass
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from drlora_jax.errors import UserError
from drlora_jax.models.architecture import ATTENTION, EXPERTS, FFN, Matrix, ModelConfig
from drlora_jax.models.placement import Coverage, Placement, PlacementOptions, Strength
from drlora_jax.ops.experts.shared import RoleLora
from drlora_jax.system.fields import fraction, option, positive

SMALLEST_NORM = 1e-15  # of a column with DoRA: one of zeros stays one


@dataclass(frozen=True)
class LoraOptions(PlacementOptions):
    text = "one pair of LoRA matrices per adapted matrix"

    factor_dropout: float = option(
        0.0, "share of A's columns and of B's rows left out of a step (LoRA Dropout)"
    )
    dora: bool = option(False, "the column norms of W' train apart (DoRA)")
    freeze_a: bool = option(False, "only B trains (FFA-LoRA)")

    def check(self, section) -> None:
        fraction("adapter", {"factor_dropout": self.factor_dropout})


@dataclass(frozen=True)
class Lora(Placement):
    """Plain LoRA; placements for experts adapt the matrices beside them in the same way."""

    scale: float = 1.0  # alpha / rank
    dropout: float = 0.0  # on the input of a low-rank product, in training
    rank: int = 0
    dora: bool = False
    factor_dropout: float = 0.0  # the rate of LoRA Dropout

    kind: ClassVar[str] = "lora"
    options: ClassVar[type[PlacementOptions]] = LoraOptions

    @classmethod
    def accepts(cls, matrix: Matrix) -> bool:
        return matrix.kind in (ATTENTION, FFN)

    @classmethod
    def check_paths(cls, config: ModelConfig, paths: frozenset[str]) -> None:
        if any(matrix.kind == EXPERTS and matrix.path in paths for matrix in config.matrices()):
            raise UserError(
                "adapter.targets: adapter.kind=lora does not adapt experts; use expert_lora."
            )

    @classmethod
    def from_section(cls, config, section, paths, *, rank, max_rank):
        return cls(
            paths=paths,
            max_rank=max_rank,
            scale=section.scale,
            dropout=section.dropout,
            rank=rank,
            dora=section.dora,
            factor_dropout=section.factor_dropout,
        )

    def delta(self, module, x_BTD, product_BTF, kernel_DF, segment_ids_BT):
        pair = LoraPair(product_BTF.shape[-1], self, name="lora")
        return pair(x_BTD, product_BTF, kernel_DF), []

    def cover(self, config: ModelConfig, matrix: Matrix, frozen: Coverage) -> list[Coverage]:
        if matrix.path not in self.paths:
            return [frozen]
        each = self.rank * (matrix.in_features + matrix.out_features)
        label = f"LoRA, rank {self.rank}"
        if self.dora:
            label, each = f"DoRA, rank {self.rank}", each + matrix.out_features
        return [frozen._replace(trained=matrix.count * each, status=label)]


@dataclass(frozen=True)
class ExpertOptions(PlacementOptions):
    """The fields of all placements with experts."""

    router_learning_rate: float | None = option(
        None, "of routers that train; none: train.learning_rate"
    )
    freeze_a: bool = option(False, "only B trains (FFA-LoRA)")
    freeze_idle_experts: bool = option(
        True, "an expert without tokens in a step keeps its LoRA matrices and moments"
    )

    def check(self, section) -> None:
        if self.router_learning_rate is not None:
            positive("adapter", {"router_learning_rate": self.router_learning_rate})


@dataclass(frozen=True)
class BesideOptions(ExpertOptions):
    """The fields of placements whose experts have plain LoRA beside them."""

    expert_scale: float | None = option(
        None, "scale of the experts, where plain LoRA beside them has another; none: the same"
    )
    expert_dropout: float | None = option(None, "dropout of the experts; none: the same")

    def check(self, section) -> None:
        super().check(section)
        if self.expert_scale is not None:
            positive("adapter", {"expert_scale": self.expert_scale})
        fraction("adapter", {"expert_dropout": self.expert_dropout or 0.0})


@dataclass(frozen=True)
class WithExperts(Lora):
    """LoRA matrices for experts, and plain LoRA on the other matrices that are adapted."""

    expert_scale: float | None = None  # None: as for plain LoRA
    expert_dropout: float | None = None

    @property
    def of_experts(self) -> Strength:
        """The scale and dropout of the experts' LoRA."""
        return Strength(
            self.scale if self.expert_scale is None else self.expert_scale,
            self.dropout if self.expert_dropout is None else self.expert_dropout,
        )


# --------------------------------------------------------------------------------- one matrix


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


class LoraPair(nn.Module):
    """A and B of one matrix; returns what they add to its product x W."""

    features: int
    adapter: "Lora"

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


# --------------------------------------------------------------------------------- all experts


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
