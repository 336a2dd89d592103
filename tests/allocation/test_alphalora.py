"""AlphaLoRA's analysis: exponents of spectra, and experts of layers."""

import math
import pathlib

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drlora_jax.allocation import spectra
from drlora_jax.allocation.alphalora import allocate_experts
from drlora_jax.allocation.spectra import ESTIMATORS, eigenvalues, fit_tail
from drlora_jax.errors import UserError
from tests.support.spectra import slow_fit

# Exponents of layers as the MoLA paper prints them (NAACL 2025, appendix H).
LLAMA_2_7B = (
    [2.14, 2.74, 3.03, 3.12, 3.2, 3.15, 3.01, 3.04, 2.79, 2.85, 2.75, 2.72, 2.96, 2.97, 3.03]
    + [3.15, 3.45, 3.72, 4.02, 3.77, 4.37, 4.55, 4.32, 4.18, 4.25, 4.2, 3.74, 4.25, 4.22, 4.13]
    + [4.42, 3.44]
)
MISTRAL_7B = (
    [2.14, 3.14, 3.73, 3.49, 3.7, 3.83, 3.53, 3.58, 3.08, 3.31, 2.96, 2.75, 2.85, 2.96, 3.17]
    + [3.62, 4.83, 3.52, 4.45, 4.34, 4.28, 4.26, 4.32, 4.23, 4.78, 4.45, 4.12, 4.72, 3.99, 4.26]
    + [3.38, 2.99]
)
# What the authors' code gives for them, and the same shares by largest remainder.
UPSTREAM = {
    "mistral": "1 3 5 4 5 5 4 4 3 4 3 2 2 3 3 4 8 4 7 7 7 7 7 7 9 7 6 9 6 7 4 3",
    "llama": "1 3 3 4 4 4 3 3 3 3 3 3 3 3 3 4 5 6 7 6 8 6 8 7 8 7 6 8 8 7 8 5",
}
OURS = {
    "mistral": "1 3 5 4 5 5 4 4 3 3 3 2 2 3 3 4 9 4 7 7 7 7 7 7 9 7 6 9 6 7 4 3",
    "llama": "1 3 3 4 4 4 3 3 3 3 3 2 3 3 3 4 5 5 7 6 8 9 8 7 8 7 6 8 8 7 8 4",
}
# What another paper says that AlphaLoRA chose for Mistral-7B (LayerIF, NeurIPS 2025).
LAYERIF = "1 3 5 4 5 5 4 4 3 4 3 2 2 3 3 4 9 4 7 7 7 7 7 7 9 7 6 8 6 7 4 3"
ALPHAS = {"mistral": MISTRAL_7B, "llama": LLAMA_2_7B}

# ------------------------------------------------------------------------------------- estimators


def golden_matrices():
    draw = np.random.default_rng(0)
    shapes = ((1.0, (64, 96)), (0.02, (128, 128)), (0.02, (256, 512)))
    return [scale * draw.standard_normal(shape) for scale, shape in shapes]


@pytest.mark.parametrize("number", range(3))
def test_published_numbers_of_the_estimators(number):
    expected = (
        (2.2537410377, 26, 0.2011945785, 2.5891859171),
        (6.2692812563, 111, None, 2.1451116504),
        (20.6669673455, 247, None, 2.6830569083),
    )[number]
    spectrum = eigenvalues(golden_matrices()[number])
    fit, median = fit_tail(spectrum), fit_tail(spectrum, "median")
    assert fit.alpha == pytest.approx(expected[0], abs=1e-10)
    assert median.alpha == pytest.approx(expected[3], abs=1e-10)
    assert fit.first == expected[1]
    assert expected[2] is None or fit.distance == pytest.approx(expected[2], abs=1e-10)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("shape", [(20, 33), (40, 17), (2, 9), (60, 60)])
def test_a_slow_loop_over_singular_values_agrees(shape, estimator):
    """Of matrices with heavy tails, and of a scale at which fix_finger's lower bound cuts."""
    draw = np.random.default_rng(5)
    for scale in (0.02, 3.0):
        weight_MN = scale * draw.standard_t(2.5, size=shape)
        fit = fit_tail(eigenvalues(weight_MN), estimator)
        singular = np.linalg.svd(weight_MN, compute_uv=False)[::-1]
        distance, exponent, first = slow_fit(singular**2, estimator)
        assert fit.first == first
        assert fit.alpha == pytest.approx(exponent, rel=1e-9)
        assert fit.distance == pytest.approx(distance, rel=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("exponent", [1.5, 2.5, 4.0])
def test_a_power_law_has_its_exponent(exponent, estimator):
    """The quantiles of x^-alpha above 0.1: every start is as good as another."""
    count = 4000
    above = (np.arange(count)[::-1] + 0.5) / count
    fit = fit_tail(0.1 * above ** (-1 / (exponent - 1)), estimator)
    assert fit.alpha == pytest.approx(exponent, rel=0.02)
    assert fit.distance < 0.01


def test_a_heavier_tail_has_a_smaller_exponent():
    draw = np.random.default_rng(0)
    by_freedom = [
        fit_tail(eigenvalues(0.01 * draw.standard_t(freedom, size=(200, 300))), "median").alpha
        for freedom in (2, 4, 100)
    ]
    assert by_freedom == sorted(by_freedom)


@settings(max_examples=30, deadline=None)
@given(power=st.integers(-20, 20), seed=st.integers(0, 99))
def test_the_median_estimator_does_not_depend_on_scale(power, seed):
    weight_MN = np.random.default_rng(seed).standard_normal((12, 20))
    spectrum = eigenvalues(weight_MN)
    scaled = eigenvalues(2.0**power * weight_MN)
    assert fit_tail(scaled, "median").alpha == pytest.approx(fit_tail(spectrum, "median").alpha)


@settings(max_examples=30, deadline=None)
@given(power=st.integers(0, 20), seed=st.integers(0, 99))
def test_fix_finger_does_not_depend_on_scale_with_a_peak_below_one(power, seed):
    spectrum = eigenvalues(np.random.default_rng(seed).standard_normal((12, 20)) / 64)
    alphas = [fit_tail(spectrum * scale).alpha for scale in (1.0, 4.0**-power)]
    assert alphas[0] == pytest.approx(alphas[1])


def test_fix_finger_has_a_logarithm_as_lower_bound():
    """As published: with a peak above 1 small eigenvalues may be cut, by another scale not."""
    spectrum = eigenvalues(np.random.default_rng(1).standard_normal((40, 50)))
    below, near, far = (spectra._starts_near_peak(spectrum * 4.0**power) for power in (-6, 0, 4))
    assert below[0] == far[0] == 0 and near[0] > 0
    assert below[-1] == near[-1] == far[-1]


def test_orientation_and_dtype_do_not_matter():
    weight_MN = np.random.default_rng(2).standard_normal((9, 14)).astype(ml_dtypes.bfloat16)
    expected = np.linalg.svd(weight_MN.astype(np.float64), compute_uv=False)[::-1] ** 2
    for each in (weight_MN, weight_MN.T, weight_MN.astype(np.float32)):
        np.testing.assert_allclose(eigenvalues(each), expected, rtol=1e-10)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_rounding_makes_of_zeros_is_left_out(estimator):
    """A matrix of rank 10 has the exponent of its ten eigenvalues, whatever noise is around 0."""
    draw = np.random.default_rng(3)
    weight_MN = draw.standard_normal((30, 10)) @ draw.standard_normal((10, 50))
    exact = np.linalg.svd(weight_MN, compute_uv=False)[9::-1] ** 2
    fit = fit_tail(eigenvalues(weight_MN), estimator)
    assert fit.alpha == pytest.approx(fit_tail(exact, estimator).alpha, rel=1e-9)


def test_spectra_without_a_tail_are_refused():
    for estimator in ESTIMATORS:
        with pytest.raises(UserError, match="all equal"):
            fit_tail(np.ones(8), estimator)
        with pytest.raises(UserError, match="0 of its eigenvalues are above zero"):
            fit_tail(np.zeros(8), estimator)
        with pytest.raises(UserError, match="1 of its eigenvalues"):
            fit_tail(eigenvalues(np.ones((3, 4))), estimator)
    for broken in (np.nan, np.inf):
        with pytest.raises(UserError, match="infinite or not a number"):
            eigenvalues(np.array([[1.0, broken], [2.0, 3.0]]))


# ------------------------------------------------------------------------------------- allocation


@pytest.mark.parametrize("model", ALPHAS)
def test_published_exponents_give_the_known_experts(model):
    ours = allocate_experts(ALPHAS[model], 160)
    upstream = allocate_experts(ALPHAS[model], 160, rounding="upstream")
    assert " ".join(map(str, ours)) == OURS[model]
    assert " ".join(map(str, upstream)) == UPSTREAM[model]


def test_a_list_published_by_others_is_one_expert_away():
    published = np.array(LAYERIF.split(), int)
    for rounding, distance in (("upstream", 2), ("largest_remainder", 2)):
        counts = allocate_experts(MISTRAL_7B, 160, rounding=rounding)
        assert np.abs(counts - published).sum() == distance


def test_upstream_rounding_may_leave_layers_with_nothing():
    counts = allocate_experts(MISTRAL_7B, 40, rounding="upstream")
    assert sorted(counts)[:2] == [-1, 0] and counts.sum() == 40


exponents = st.lists(st.floats(1.01, 50), min_size=1, max_size=40)


@settings(max_examples=200, deadline=None)
@given(alphas=exponents, more=st.integers(0, 300), beta=st.floats(-6, 60))
def test_shares_are_kept_within_the_floor(alphas, more, beta):
    total = len(alphas) + more
    counts = allocate_experts(alphas, total, beta=beta)
    assert counts.sum() == total and counts.min() >= 1
    order = np.argsort(alphas, kind="stable")
    steps = np.diff(counts[order]) * (1 if beta >= 0 else -1)
    is_more = np.diff(np.array(alphas)[order]) > 0
    assert (steps[is_more] >= -1).all()  # no more than a rounding against the order
    # Without a floor that binds, every count is a neighbour of its share.
    weights = np.exp(beta * (np.log(alphas) - np.log(max(alphas) if beta > 0 else min(alphas))))
    shares = total * weights / weights.sum()
    if shares.min() >= 1:
        assert (np.abs(counts - shares) < 1 + 1e-9).all()


@given(total=st.integers(4, 50), alpha=st.floats(1.01, 9))
def test_equal_layers_and_beta_zero_divide_evenly(total, alpha):
    expected = [total // 4 + (index < total % 4) for index in range(4)]
    assert allocate_experts([alpha] * 4, total).tolist() == expected
    assert allocate_experts([1.5, 2, 3, 4], total, beta=0).tolist() == expected


def test_the_floor_is_paid_by_the_layer_furthest_above_its_share():
    assert allocate_experts([1.1, 1.1, 1.1, 9.0], 4, beta=9).tolist() == [1, 1, 1, 1]
    assert allocate_experts([1.1, 1.1, 1.1, 9.0], 10, beta=9).tolist() == [1, 1, 1, 7]


def test_arguments_that_are_no_such_numbers_are_refused():
    for alphas, total, beta, message in (
        ([2.0, 3.0], 1, 2.5, r"at least the number of layers \(2\).*got 1"),
        ([2.0, 3.0], 10**7, 2.5, "at most 1,000,000, got 10,000,000"),
        ([2.0, 0.0], 8, 2.5, "numbers above 0"),
        ([2.0, math.nan], 8, 2.5, "numbers above 0"),
        ([], 8, 2.5, r"one per layer, got shape \[0\]"),
        ([2.0], 8, math.inf, "beta must be a number"),
    ):
        with pytest.raises(UserError, match=message):
            allocate_experts(alphas, total, beta=beta)


def test_the_maths_needs_numpy_only():
    source = pathlib.Path(spectra.__file__).read_text()
    assert "jax" not in source.replace("drlora_jax", "")
