"""Allocates by the heavy-tail exponents of pretrained weights: config fields, a prior for the
saliency, and initial ranks.
"""

from dataclasses import dataclass

import numpy as np

from drlora_jax.allocation.base import PolicyFields
from drlora_jax.allocation.shares import divide
from drlora_jax.allocation.spectra import Estimator
from drlora_jax.system.fields import option


@dataclass(frozen=True)
class ExponentFields(PolicyFields):
    """Fields of policies that read exponents."""

    alpha_beta: float = option(2.5, "shares are in proportion to alpha ** alpha_beta")
    alpha_file: str | None = option(
        None, "exponents written by `drlora_jax.alpha --out`; none: computed", is_path=True
    )
    alpha_estimator: Estimator = option(
        "fix_finger", "how the start of a spectrum's tail is found, whose exponent is alpha"
    )


def spectral_prior(alpha_LE: np.ndarray, power: float) -> np.ndarray:
    """Returns (alpha / its layer's mean)^power, by which saliency is multiplied, float64 [L, E]."""
    return (alpha_LE / alpha_LE.mean(axis=1, keepdims=True)) ** power


def spectral_start(alpha_LE: np.ndarray, rank: int, *, beta: float, most: int) -> np.ndarray:
    """Returns initial ranks, i32 [L, E]: each layer distributes E * rank in proportion to
    alpha^beta, from 1 to `most` per expert.
    """
    total = rank * alpha_LE.shape[1]
    ranks = [divide(alpha_E, total, beta=beta, most=most) for alpha_E in alpha_LE]
    return np.array(ranks, np.int32)
