"""AlphaLoRA (arXiv 2410.10054): how many LoRA experts a layer gets, from the exponents of its
pretrained weights and without training.

With the exponent alpha_l of layer l (the mean over its matrices, `drlora_jax.spectra`) and a
total of T experts, layer l is due

    f_l = T alpha_l^beta / sum_k alpha_k^beta                                                  (1)

A light tail (large alpha) is due more. Shares become whole numbers by largest remainder, and every
layer has at least one. The authors' own rounding can be had for comparison: it judges by alpha^beta
itself where the share is meant, takes experts from the layer with the largest exponent, and may
leave a layer with none or with less.
"""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from drlora_jax.errors import UserError

Rounding = Literal["largest_remainder", "upstream"]
ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)
MOST_EXPERTS = 1_000_000  # more can only be a slip


def allocate_experts(
    alpha_L: Sequence[float],
    total: int,
    *,
    beta: float = 2.5,
    rounding: Rounding = "largest_remainder",
) -> np.ndarray:
    """Experts of every layer, i64 [L]; their sum is `total`.

    Args:
      alpha_L: exponents, above zero; of layers, or of whatever the experts are divided among.
      beta: 0 divides evenly; the larger, the more goes to large exponents.
      rounding: `largest_remainder`, at least 1 everywhere; or `upstream`, equal to the authors'
        code, whose numbers can be 0 or negative.

    Raises:
      UserError: fewer experts than layers, exponents or beta that are no such numbers.
    """
    alpha_L = np.asarray(alpha_L, np.float64)
    _check(alpha_L, total, beta)
    if rounding == "upstream":
        return _as_upstream(alpha_L**beta, total)
    power_L = beta * np.log(alpha_L)
    weight_L = np.exp(power_L - power_L.max())  # of the largest: no beta overflows
    return _largest_remainder(total * weight_L / weight_L.sum(), total)


def _check(alpha_L: np.ndarray, total: int, beta: float) -> None:
    if alpha_L.ndim != 1 or not alpha_L.size:
        raise UserError(f"exponents must be one for each layer, got shape {list(alpha_L.shape)}.")
    if not (np.isfinite(alpha_L) & (alpha_L > 0)).all():
        raise UserError(f"exponents must be numbers above 0, got {alpha_L.tolist()}.")
    if not np.isfinite(beta):
        raise UserError(f"beta must be a number, got {beta}.")
    if not alpha_L.size <= total <= MOST_EXPERTS:
        raise UserError(
            f"The number of experts must be at least that of layers ({alpha_L.size}), one for "
            f"each, and at most {MOST_EXPERTS:,}; got {total:,}."
        )


def _largest_remainder(share_L: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers of at least 1 near the shares; among equal remainders the first layer wins."""
    count_L = np.maximum(np.floor(share_L).astype(np.int64), 1)
    while count_L.sum() < total:
        count_L[np.argmax(share_L - count_L)] += 1
    while count_L.sum() > total:  # ones in the place of zeros: paid by who is furthest above
        above_L = np.where(count_L > 1, count_L - share_L, -np.inf)
        count_L[np.argmax(above_L)] -= 1
    return count_L


def _as_upstream(weight_L: np.ndarray, total: int) -> np.ndarray:
    """Nearest whole numbers, halves to even; then one at a time by weight (not share) - count."""
    count_L = np.round(total * weight_L / weight_L.sum()).astype(np.int64)
    while count_L.sum() != total:
        if count_L.sum() < total:
            count_L[np.argmin(weight_L - count_L)] += 1
        else:
            count_L[np.argmax(weight_L - count_L)] -= 1
    return count_L
