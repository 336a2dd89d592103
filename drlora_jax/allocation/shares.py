"""Computes integers in proportion to weights, with an exact sum."""

import numpy as np


def divide(alpha_N: np.ndarray, total: int, *, beta: float, most: int) -> np.ndarray:
    """Returns integers from 1 to `most` in proportion to alpha^beta, i64 [N], with the sum `total`.

    The excess of shares above `most` goes to the others in proportion.
    """
    power_N = beta * np.log(alpha_N)
    weight_N = np.exp(power_N - power_N.max())  # relative to the largest, so that none overflows
    share_N = total * weight_N / weight_N.sum()
    is_full_N = share_N > most
    while (share_N > most).any():
        rest = total - most * is_full_N.sum()
        free = weight_N[~is_full_N].sum()
        share_N = np.where(is_full_N, most, rest * weight_N / (free or 1.0))
        is_full_N |= share_N > most
    return largest_remainder(share_N, total, most=most)


def largest_remainder(
    share_L: np.ndarray, total: int, *, least: int = 1, most: float = np.inf
) -> np.ndarray:
    """Rounds shares to integers from `least` to `most`, i64, with the sum `total`; ties between
    remainders go to the first layer.
    """
    count_L = np.maximum(np.floor(share_L).astype(np.int64), least)
    while count_L.sum() < total:
        count_L[np.argmax(np.where(count_L < most, share_L - count_L, -np.inf))] += 1
    while count_L.sum() > total:  # raising zeros to `least` is paid by who is furthest above
        above_L = np.where(count_L > least, count_L - share_L, -np.inf)
        count_L[np.argmax(above_L)] -= 1
    return count_L
