"""Estimates against formulas written out, and against counting."""

import itertools
import math

import numpy as np
import pytest

from drlora_jax.errors import UserError
from drlora_jax.evaluation.statistics import compare, estimate, exponential, wilson


def test_mean_and_standard_error_of_a_share():
    found = estimate([1, 0, 1, 1])
    deviation = math.sqrt((3 * 0.25**2 + 0.75**2) / 3)
    assert found.value == 0.75 and found.n == 4
    assert found.stderr == pytest.approx(deviation / math.sqrt(4))
    assert found.ci95 == pytest.approx(wilson(3, 4))


def test_wilson_solves_its_quadratic():
    """The ends are the shares p whose distance to the observed one is z standard errors of p."""
    for successes, n in ((0, 10), (3, 10), (10, 10), (190, 200)):
        for end in wilson(successes, n):
            z = abs(successes / n - end) / math.sqrt(max(end * (1 - end), 1e-300) / n)
            assert end in (0.0, 1.0) or z == pytest.approx(1.959964, rel=1e-5)
    assert wilson(0, 10)[1] == pytest.approx(1.959964**2 / (10 + 1.959964**2), rel=1e-6)


def test_weighted_mean_is_total_over_total():
    nll, tokens = np.array([10.0, 3.0, 8.0]), np.array([4.0, 3.0, 2.0])
    found = estimate(nll / tokens, tokens)
    assert found.value == pytest.approx(21 / 9)
    residual = nll - found.value * tokens
    assert found.stderr == pytest.approx(math.sqrt(3 / 2 * (residual**2).sum()) / 9)
    low, high = found.ci95
    assert (low + high) / 2 == pytest.approx(found.value)


def test_perplexity_follows_the_loss():
    loss = estimate([2.0, 3.0], [1.0, 1.0])
    found = exponential(loss)
    assert found.value == pytest.approx(math.exp(2.5))
    assert found.ci95 == pytest.approx([math.exp(end) for end in loss.ci95])
    assert exponential(estimate([900.0, 900.0])).value == math.inf


def test_a_single_sample_has_no_error():
    found = estimate([1.0])
    assert (found.value, found.stderr, found.ci95) == (1.0, None, None)
    with pytest.raises(ValueError, match="at least one"):
        estimate([])


def _paired(values, weight=1.0):
    return {str(key): (value, weight) for key, value in enumerate(values)}


def test_p_value_of_right_and_wrong_is_mcnemars():
    """Counted over all sign patterns of the items that changed."""
    first = [0] * 9 + [1] * 1 + [1] * 20
    second = [1] * 9 + [0] * 1 + [1] * 20
    found = compare(_paired(first), _paired(second))
    patterns = itertools.product((-1, 1), repeat=10)
    exact = np.mean([abs(sum(signs)) >= 8 for signs in patterns])
    assert found.p_value == pytest.approx(exact, abs=0.004)
    assert found.is_shown and found.difference == pytest.approx(8 / 30)


def test_a_difference_within_noise_is_not_shown():
    draw = np.random.default_rng(1)
    first, second = draw.integers(0, 2, size=(2, 200))
    found = compare(_paired(first), _paired(second))
    assert not found.is_shown
    low, high = found.ci95
    assert low < 0 < high
    same = compare(_paired(first), _paired(first))
    assert (same.difference, same.p_value, same.is_shown) == (0.0, 1.0, False)


def test_only_the_same_items_are_paired():
    with pytest.raises(UserError, match="different items"):
        compare(_paired([1, 0]), _paired([1, 0, 1]))
    with pytest.raises(UserError, match="different items"):
        compare({}, {})
