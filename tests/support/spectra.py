"""The published estimators of exponents, by their definition."""

import math


def slow_fit(eigenvalues_N, estimator):
    """The published estimator by its definition: plain loops over singular values squared."""
    values = [float(value) for value in eigenvalues_N]
    count = len(values)
    if estimator == "median":
        candidates = [min(count // 2, count - 2)]
    else:
        logs = [math.log10(value) for value in values]
        low, high = min(logs), max(logs)
        bins = [0] * 100
        for value in logs:
            bins[min(int((value - low) / (high - low) * 100), 99)] += 1
        peak = 10 ** (low + bins.index(max(bins)) * (high - low) / 100)
        bounds = math.log10(0.95 * peak), 1.5 * peak
        candidates = [i for i in range(count - 1) if bounds[0] <= values[i] <= bounds[1]]
    best = (math.inf, None, None)
    for i in candidates:
        tail = values[i:]
        exponent = 1 + len(tail) / sum(math.log(value / values[i]) for value in tail)
        distance = max(
            abs(1 - (value / values[i]) ** (1 - exponent) - j / len(tail))
            for j, value in enumerate(tail)
        )
        if distance < best[0]:
            best = (distance, exponent, i)
    return best
