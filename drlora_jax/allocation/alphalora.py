"""AlphaLoRA (arXiv 2410.10054): derives how many LoRA experts a layer gets from the heavy-tail
exponents of its pretrained weights, without training.

With the exponent alpha_l of layer l (the mean over its matrices, `allocation/spectra.py`) and a
total of T experts, layer l is entitled to

    f_l = T alpha_l^beta / sum_k alpha_k^beta                                                  (1)

experts: a light tail (large alpha) gets more. Shares are rounded to integers by largest remainder,
and every layer gets at least one. The authors' own rounding is available for comparison: it
compares counts with alpha^beta instead of with the share, takes experts from the layer with the
largest exponent, and may leave a layer with zero or a negative number.

As a policy it is static. Where the adapter brings its own experts, n_l experts of layer l have
rank r and the others rank 0. Where the experts are the base model's, their number is fixed and (1)
divides ranks instead: alpha_le is the mean over the matrices of expert e in layer l, and the
L * E * r ranks of the model are distributed among all experts of all layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from drlora_jax.allocation.base import CapacityShapes, Context, Policy, static_policy
from drlora_jax.allocation.exponents import ExponentFields
from drlora_jax.allocation.shares import divide
from drlora_jax.errors import UserError
from drlora_jax.system.fields import option, positive

Rounding = Literal["largest_remainder", "upstream"]
ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)
MOST_EXPERTS = 1_000_000  # more can only be a typing error


@dataclass(frozen=True)
class AlphaLora(ExponentFields):
    name = "alphalora"
    text = "AlphaLoRA: sets experts per layer, or ranks per expert, by the exponents of the weights"
    shares_among_layers = True

    experts: int | None = option(
        None, "total LoRA experts over all layers, with adapter.kind=mixlora or mola"
    )

    def check(self, section) -> None:
        if self.experts is not None:
            positive("allocation", {"experts": self.experts})
        super().check(section)

    def refuses(self, section, adapter) -> str | None:
        if adapter.makes_experts != (self.experts is not None):
            return (
                "allocation.experts is the total number of experts that alphalora distributes over "
                "the layers: adapter.kind=mixlora and mola need it, other kinds have a fixed "
                f"number. Got {self.experts} with adapter.kind={adapter.kind}."
            )
        return None

    def allocated_rank(self, section, adapter) -> int:
        return section.r_target if adapter.makes_experts else section.r_max  # all or none

    def wants_exponents(self) -> bool:
        return True

    def make(self, context: Context) -> Policy:
        found, beta, rank = context.exponents(), self.alpha_beta, context.r_target
        if context.has_new_experts:
            return alphalora_experts(
                context.shapes, found.layer_L, total=self.experts, rank=rank, beta=beta
            )
        return alphalora_ranks(context.shapes, found.expert_LE, r_target=rank, beta=beta)


def allocate_experts(
    alpha_L: Sequence[float],
    total: int,
    *,
    beta: float = 2.5,
    rounding: Rounding = "largest_remainder",
) -> np.ndarray:
    """Returns the number of experts of every layer, i64 [L], with the sum `total`.

    Args:
      alpha_L: Positive exponents of layers, or of whatever the experts are divided among.
      beta: 0 divides evenly; larger values favour large exponents.
      rounding: `largest_remainder`, at least 1 everywhere; or `upstream`, equal to the authors'
        code, whose numbers can be 0 or negative.

    Raises:
      UserError: If there are fewer experts than layers, or exponents or beta are invalid.
    """
    alpha_L = np.asarray(alpha_L, np.float64)
    _check(alpha_L, total, beta)
    if rounding == "upstream":
        return _as_upstream(alpha_L**beta, total)
    return divide(alpha_L, total, beta=beta, most=total)


def _check(alpha_L: np.ndarray, total: int, beta: float) -> None:
    if alpha_L.ndim != 1 or not alpha_L.size:
        raise UserError(f"exponents must be one per layer, got shape {list(alpha_L.shape)}.")
    if not (np.isfinite(alpha_L) & (alpha_L > 0)).all():
        raise UserError(f"exponents must be numbers above 0, got {alpha_L.tolist()}.")
    if not np.isfinite(beta):
        raise UserError(f"beta must be a number, got {beta}.")
    if not alpha_L.size <= total <= MOST_EXPERTS:
        raise UserError(
            f"The number of experts must be at least the number of layers ({alpha_L.size}) and at "
            f"most {MOST_EXPERTS:,}, got {total:,}."
        )


def _as_upstream(weight_L: np.ndarray, total: int) -> np.ndarray:
    """Rounds to the nearest integers, halves to even, then corrects the sum one at a time by
    weight (not share) - count.
    """
    count_L = np.round(total * weight_L / weight_L.sum()).astype(np.int64)
    while count_L.sum() != total:
        if count_L.sum() < total:
            count_L[np.argmin(weight_L - count_L)] += 1
        else:
            count_L[np.argmax(weight_L - count_L)] -= 1
    return count_L


def alphalora_experts(
    shapes: CapacityShapes, alpha_L: np.ndarray, *, total: int, rank: int, beta: float
) -> Policy:
    """Returns the policy in which the first n_l experts of layer l have `rank` and the others none;
    the n_l sum to `total`.
    """
    try:
        count_L = allocate_experts(alpha_L, total, beta=beta)
    except UserError as error:
        raise UserError(f"allocation.experts={total}: {error}") from error
    if total > shapes.experts * shapes.layers:
        raise UserError(
            f"allocation.experts={total} do not fit into {shapes.layers} layers of "
            f"adapter.num_experts={shapes.experts}. Raise adapter.num_experts to what the largest "
            "layer gets, which is more than the mean (`python -m drlora_jax.alpha` prints it)."
        )
    layer, most = int(count_L.argmax()), int(count_L.max())
    if most > shapes.experts:
        raise UserError(
            f"allocation.experts={total} gives {most} experts to layer {layer}, but a layer has "
            f"room for adapter.num_experts={shapes.experts}; set adapter.num_experts={most}."
        )
    is_active_LE = np.arange(shapes.experts) < count_L[:, None]
    return static_policy(
        "alphalora",
        rank * is_active_LE,
        budget=tuple((rank * count_L).tolist()),
        describe=(
            f"alphalora: {total} experts of rank {rank}, {count_L.min()} to {count_L.max()} per "
            f"layer, by exponents {alpha_L.min():.2f} to {alpha_L.max():.2f}"
        ),
    )


def alphalora_ranks(
    shapes: CapacityShapes, alpha_LE: np.ndarray, *, r_target: int, beta: float
) -> Policy:
    """Returns the policy with ranks in proportion to alpha^beta of every expert, from 1 to r_max,
    `r_target` on average.
    """
    if r_target > shapes.max_rank:
        raise UserError(
            f"allocation.kind=alphalora: r_target ({r_target}) is the mean rank and must be at "
            f"most allocation.r_max ({shapes.max_rank})."
        )
    total = alpha_LE.size * r_target
    ranks_LE = divide(alpha_LE.ravel(), total, beta=beta, most=shapes.max_rank)
    ranks_LE = ranks_LE.reshape(alpha_LE.shape)
    return static_policy(
        "alphalora",
        ranks_LE,
        budget=tuple(ranks_LE.sum(axis=1).tolist()),
        describe=(
            f"alphalora: ranks {ranks_LE.min()} to {ranks_LE.max()}, a mean of {r_target}, by "
            f"exponents {alpha_LE.min():.2f} to {alpha_LE.max():.2f}"
        ),
    )
