"""Measures how heavy-tailed a weight matrix is: the exponent of a power law fitted to its spectrum.

The spectrum of W is the eigenvalues of W W^T, the squares of its singular values, ascending:
lambda_0 <= ... <= lambda_{N-1}, N the smaller side of W. Above lambda_i, the maximum-likelihood
exponent of a density ~ x^-alpha is (Hill; AlphaLoRA's PL_Alpha_Hill, arXiv 2410.10054)

    alpha_i = 1 + n / sum_{j >= i} ln(lambda_j / lambda_i),    n = N - i                       (1)

and its Kolmogorov-Smirnov distance from the n eigenvalues is

    KS_i = max_{j >= i} | 1 - (lambda_j / lambda_i)^(1 - alpha_i) - (j - i) / n |              (2)

An estimator decides where the tail begins. Exponents are dimensionless and above 1; a larger
exponent is a lighter tail, which the method reads as a layer that training has shaped less.
Everything is computed in float64 NumPy.
"""

from typing import Literal, NamedTuple, get_args

import numpy as np

from drlora_jax.errors import UserError

Estimator = Literal["fix_finger", "median"]
ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)
BINS = 100  # bins of the histogram in which fix_finger searches the peak of the spectrum


class Exponents(NamedTuple):
    """Holds the exponents of the L layers of a model that have experts: unweighted means over
    matrices, float64.
    """

    layer_L: np.ndarray  # over all matrices of the layer
    # Over the matrices of the expert; None where the base model has no experts.
    expert_LE: np.ndarray | None


class TailFit(NamedTuple):
    alpha: float
    # The tail is lambda_first ... lambda_{N-1}, counted among the eigenvalues above zero.
    first: int
    distance: float  # KS distance, between 0 and 1


def eigenvalues(weight_MN: np.ndarray) -> np.ndarray:
    """Returns the squared singular values of a matrix, f64 [min(M, N)], ascending.

    They are computed from the smaller Gram matrix, in float64 for every dtype of the weights:
    errors are about 1e-16 of the largest eigenvalue, the resolution of float32 singular values, in
    less time.

    Raises:
      UserError: If a weight is infinite or not a number.
    """
    weight_MN = np.asarray(weight_MN, np.float64)
    if not np.isfinite(weight_MN).all():
        raise UserError("a weight is infinite or not a number; is the file damaged?")
    if weight_MN.shape[0] > weight_MN.shape[1]:
        weight_MN = weight_MN.T
    return np.maximum(np.linalg.eigvalsh(weight_MN @ weight_MN.T), 0.0)


def fit_tail(eigenvalues_N: np.ndarray, estimator: Estimator = "fix_finger") -> TailFit:
    """Fits a power law to the tail of a spectrum.

    Args:
      eigenvalues_N: Ascending and not negative. Those that rounding cannot distinguish from zero
        (below N * 2^-52 of the largest) are ignored: their logarithms are meaningless.
      estimator: `fix_finger`, the authors' choice, takes the start with the smallest KS distance
        among those near or below the peak of the spectrum. `median` takes the upper half of the
        spectrum.

    Raises:
      UserError: If fewer than two eigenvalues are above zero, or all are equal: there is no tail.
    """
    eigenvalues_N = np.asarray(eigenvalues_N, np.float64)
    smallest = eigenvalues_N[-1:] * eigenvalues_N.size * np.finfo(np.float64).eps
    kept_N = eigenvalues_N[eigenvalues_N > smallest]
    if kept_N.size < 2:
        raise UserError(f"only {kept_N.size} of its eigenvalues are above zero; a tail needs two.")
    log_N = np.log(kept_N)
    alpha_N = _hill(log_N)
    if estimator == "fix_finger":
        candidates = _starts_near_peak(kept_N)
    else:
        candidates = [min(kept_N.size // 2, kept_N.size - 2)]
    distances = [_distance(log_N, first, alpha_N[first]) for first in candidates]
    best = int(np.argmin(distances))
    first = int(candidates[best])
    if not np.isfinite(alpha_N[first]):
        raise UserError("its largest eigenvalues are all equal: there is no tail to fit.")
    return TailFit(float(alpha_N[first]), first, float(distances[best]))


def _hill(log_N: np.ndarray) -> np.ndarray:
    """Returns alpha_i of equation (1) for every i but the last; infinite where all values of the
    tail are equal.
    """
    count_N = np.arange(log_N.size, 0, -1)
    sum_N = np.cumsum(log_N[::-1])[::-1] - count_N * log_N
    # Decided by the values themselves: rounding may leave a nonzero sum where all are equal.
    sum_N[log_N == log_N[-1]] = 0.0
    with np.errstate(divide="ignore"):
        return (1 + count_N / sum_N)[:-1]


def _distance(log_N: np.ndarray, first: int, alpha: float) -> float:
    """Returns KS_i of equation (2); 1, the worst value, where there is no exponent."""
    if not (np.isfinite(alpha) and alpha > 1):
        return 1.0
    tail_n = log_N[first:]
    law_n = -np.expm1((1 - alpha) * (tail_n - tail_n[0]))
    return float(np.abs(law_n - np.arange(tail_n.size) / tail_n.size).max())


def _starts_near_peak(kept_N: np.ndarray) -> np.ndarray:
    """Returns where the tail may begin for fix_finger.

    Candidates range from log10(0.95 peak) to 1.5 peak, where peak is the lower edge of the fullest
    of 100 bins over log10(lambda). The logarithm in the lower bound follows the authors' code, so
    that exponents can be compared with theirs. With a peak below 1 it excludes nothing; above 1 it
    may, so the result can depend on the scale of the weights.
    """
    counts, edges = np.histogram(np.log10(kept_N), bins=BINS)
    peak = 10 ** edges[np.argmax(counts)]
    is_near_N = (kept_N >= np.log10(0.95 * peak)) & (kept_N <= 1.5 * peak)
    return np.flatnonzero(is_near_N[:-1])
