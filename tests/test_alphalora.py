"""AlphaLoRA's analysis: exponents of spectra, experts of layers, `python -m drlora_jax.alpha`."""

import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as xml

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.stored import copy_model
from safetensors.numpy import load_file, save_file
from test_parity_transformers import WEIGHTS
from tiny import MIXTRAL, write_tiny_model

from drlora_jax import alpha, cli
from drlora_jax.allocation import spectra
from drlora_jax.allocation.alphalora import allocate_experts
from drlora_jax.allocation.spectra import ESTIMATORS, eigenvalues, fit_tail
from drlora_jax.errors import UserError
from drlora_jax.interop import spectra_read
from drlora_jax.interop.hf_files import read_model_config
from drlora_jax.interop.spectra_read import find_matrices, fit_layers, read_matrix

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
        with pytest.raises(UserError, match="all alike"):
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
        ([2.0, 3.0], 1, 2.5, r"at least that of layers \(2\).*got 1"),
        ([2.0, 3.0], 10**7, 2.5, "at most 1,000,000; got 10,000,000"),
        ([2.0, 0.0], 8, 2.5, "numbers above 0"),
        ([2.0, math.nan], 8, 2.5, "numbers above 0"),
        ([], 8, 2.5, r"one for each layer, got shape \[0\]"),
        ([2.0], 8, math.inf, "beta must be a number"),
    ):
        with pytest.raises(UserError, match=message):
            allocate_experts(alphas, total, beta=beta)


# ------------------------------------------------------------------------------------- models


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model", MIXTRAL)


@pytest.fixture
def model(written, tmp_path):
    """A Mixtral of two layers with four experts each, to be changed at will."""
    return pathlib.Path(shutil.copytree(written, tmp_path / "model"))


def read_all(directory) -> dict[str, np.ndarray]:
    by_layer = find_matrices(read_model_config(directory), directory)
    return {each.name: read_matrix(each) for matrices in by_layer for each in matrices}


def test_matrices_of_a_moe_are_those_on_disk(model):
    on_disk, read = load_file(model / WEIGHTS), read_all(model)
    assert len(read) == 2 * (4 + 3 * 4)
    expected = {f"{role}_proj": role for role in "qkvo"}
    experts = {"w1": "gate", "w3": "up", "w2": "down"}
    for key, value in on_disk.items():
        parts = key.split(".")  # model.layers.LAYER. ... .EXPERT.NAME.weight
        if parts[-2] in experts:
            name = f"{parts[2]}.{experts[parts[-2]]}.{parts[-3]}"
        elif parts[-2] in expected:
            name = f"{parts[2]}.{expected[parts[-2]]}"
        else:
            continue
        np.testing.assert_array_equal(read.pop(name), value)
    assert not read


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_fused_experts_are_taken_apart(family, tmp_path):
    """The two layouts of one model, stored by transformers, hold the same matrices."""
    fused = read_all(copy_model(family, "fused", tmp_path / "fused"))
    single = read_all(copy_model(family, "experts", tmp_path / "experts"))
    assert fused.keys() == single.keys()
    for name, value in single.items():
        np.testing.assert_array_equal(fused[name], value)


def test_a_layer_is_the_mean_of_its_matrices(tmp_path):
    directory = copy_model("llama", "experts", tmp_path / "model")
    tensors = load_file(directory / WEIGHTS)
    for fit in fit_layers(read_model_config(directory), directory, estimator="median"):
        expected = [
            slow_fit(np.linalg.svd(value, compute_uv=False)[::-1] ** 2, "median")[1]
            for key, value in tensors.items()
            if key.startswith(f"model.layers.{fit.layer}.") and "_proj.weight" in key
        ]
        assert len(expected) == 7
        assert fit.alpha == pytest.approx(np.mean(expected), rel=1e-4)  # f32 singular values


def test_a_matrix_without_an_exponent_is_named(model):
    tensors = load_file(model / WEIGHTS)
    key = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    save_file(tensors | {key: np.zeros_like(tensors[key])}, model / WEIGHTS)
    with pytest.raises(UserError, match=rf"{key} \(up of expert 2 in layer 1\): 0 of its"):
        list(fit_layers(read_model_config(model), model))


# ------------------------------------------------------------------------------------- cache


@pytest.fixture
def counted(monkeypatch):
    """The matrices that were decomposed, by name."""
    names = []

    def count(matrix):
        names.append(matrix.name)
        return eigenvalues(read_matrix(matrix))

    monkeypatch.setattr(spectra_read, "_spectrum", count)
    return names


def alphas_of(model, cache, estimator="fix_finger"):
    fits = fit_layers(read_model_config(model), model, estimator=estimator, cache=cache)
    return [fit.alpha for fit in fits]


def test_spectra_are_computed_once_and_serve_both_estimators(model, tmp_path, counted):
    cache = tmp_path / "cache"
    first = alphas_of(model, cache)
    assert len(counted) == 32
    assert alphas_of(model, cache) == first
    median = alphas_of(model, cache, "median")
    assert len(counted) == 32 and median != first
    assert alphas_of(model, None, "median") == median


def test_threads_do_not_change_the_result(model):
    config = read_model_config(model)
    one, many = (list(fit_layers(config, model, threads=count)) for count in (1, 3))
    assert one == many


def test_other_weights_are_not_taken_for_the_same(model, tmp_path, counted):
    cache = tmp_path / "cache"
    first = alphas_of(model, cache)
    (folder,) = cache.iterdir()
    tensors = load_file(model / WEIGHTS)
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] += 1
    save_file(tensors, model / WEIGHTS)
    second = alphas_of(model, cache)
    assert len(counted) == 64
    assert second[0] != first[0] and second[1] == first[1]
    (other,) = set(cache.iterdir()) - {folder}
    for file in folder.iterdir():  # whole, but of the first model
        shutil.copy(file, other)
    assert alphas_of(model, cache) == second and len(counted) == 96


def test_spectra_of_an_older_fingerprint_are_used(model, tmp_path, counted):
    cache = tmp_path / "cache"
    expected = alphas_of(model, cache)
    (folder,) = cache.iterdir()
    assert folder.name == spectra_read.fingerprint(model)[:32]
    shutil.rmtree(folder)
    older = spectra_read.legacy_fingerprint(model)
    (cache / older[:32]).mkdir()
    assert alphas_of(model, cache) == expected and len(counted) == 64
    assert alphas_of(model, cache) == expected and len(counted) == 64
    assert [each.name for each in cache.iterdir()] == [older[:32]]


def test_a_stopped_analysis_goes_on(model, tmp_path, counted):
    cache = tmp_path / "cache"
    config = read_model_config(model)
    next(fit_layers(config, model, cache=cache))
    fits = list(fit_layers(config, model, cache=cache))
    assert [fit.is_cached for fit in fits] == [True, False]
    assert len(counted) == len(set(counted)) == 32


def test_a_damaged_cache_is_computed_again(model, tmp_path):
    """Cut off, a bit flipped in many places, emptied, another file: never other numbers."""
    cache = tmp_path / "cache"
    expected = alphas_of(model, cache)
    file = sorted(cache.rglob("layer_0000.safetensors"))[0]
    good = file.read_bytes()
    config = read_model_config(model)
    matrices = find_matrices(config, model)[0]
    identity = spectra_read.fingerprint(model)
    assert spectra_read._load(file, matrices, identity)
    broken = [b"", b"x" * 100, good[:-1], good[:40], good + b"\0"]
    for place in range(0, len(good), len(good) // 150):
        broken.append(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
    for data in broken:
        file.write_bytes(data)
        assert spectra_read._load(file, matrices, identity) is None
    assert alphas_of(model, cache) == expected
    assert file.read_bytes() == good


# ------------------------------------------------------------------------------------- commands


def run(*arguments) -> int:
    return alpha.main([str(each) for each in arguments])


def run_as_a_module(*arguments) -> str:
    """What the command prints in a process of its own that has no torch, and prints ASCII."""
    code = "import runpy, sys; sys.modules['torch'] = None; del sys.argv[0]\n"
    code += "runpy.run_module('drlora_jax.alpha', run_name='__main__', alter_sys=True)\n"
    environment = os.environ | {
        "PYTHONPATH": str(pathlib.Path(alpha.__file__).parents[1]),
        "PYTHONIOENCODING": "ascii",
    }
    command = [sys.executable, "-c", code, "drlora_jax.alpha", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_command_on_the_bundled_moe(tmp_path, capsys):
    out, svg = tmp_path / "alpha.json", tmp_path / "alpha.svg"
    arguments = ["bundled:tiny_moe", "--experts", 20, "--cache", tmp_path / "cache"]
    shown = run_as_a_module(*arguments, "--out", out, "--svg", svg)
    stored = json.loads(out.read_text())
    assert stored["model"] == "bundled:tiny_moe" and stored["experts"] == 20
    alphas = [layer["alpha"] for layer in stored["layers"]]
    assert [len(layer["matrices"]) for layer in stored["layers"]] == [28] * 4
    for layer in stored["layers"]:
        assert layer["alpha"] == pytest.approx(np.mean([m["alpha"] for m in layer["matrices"]]))
        line = f"{layer['layer']:>5}{layer['alpha']:>10.4f}{28:>10}{layer['experts']:>9}  "
        assert line in shown
    counts = [layer["experts"] for layer in stored["layers"]]
    assert counts == allocate_experts(alphas, 20).tolist()
    bars = [line.count("#") for line in shown.splitlines()]
    bars = [bar for bar in bars if bar]
    np.testing.assert_allclose(np.array(bars) / max(bars), alphas / np.max(alphas), atol=0.02)
    heights = [
        float(each.attrib["height"])
        for each in xml.parse(svg).getroot().iter("{http://www.w3.org/2000/svg}rect")
    ][1:]
    np.testing.assert_allclose(np.array(heights) / heights[0], np.array(counts) / counts[0], 0.01)
    again = tmp_path / "again.json"
    assert run(*arguments, "--out", again) == 0
    assert "spectra of 4 layers from the cache" in capsys.readouterr().out
    assert again.read_text() == out.read_text()


def test_options_reach_the_result(model, tmp_path):
    out = tmp_path / "alpha.json"
    options = ["--beta", 0, "--estimator", "median", "--rounding", "upstream", "--no-cache"]
    assert run(model, "--experts", 9, *options, "--out", out) == 0
    stored = json.loads(out.read_text())
    assert (stored["beta"], stored["estimator"]) == (0, "median")
    expected = alphas_of(model, None, "median")
    assert [layer["alpha"] for layer in stored["layers"]] == expected
    assert sorted(layer["experts"] for layer in stored["layers"]) == [4, 5]
    assert not (tmp_path / "cache").exists()


def test_layers_left_without_an_expert_are_said(model, capsys, monkeypatch):
    monkeypatch.setattr(alpha, "allocate_experts", lambda *_, **__: np.array([0, 9]))
    assert run(model, "--experts", 9, "--no-cache") == 0
    assert "Layers without an expert, as the authors' rounding has it: [0]." in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["model"], "following arguments are required: --experts"),
        (["model", "--experts", "1"], r"--experts 1 --beta 2.5: .* at least that of layers \(2\)"),
        (["model", "--experts", "many"], "--experts: invalid int value: 'many'"),
        (["model", "--experts", "9", "--beta", "nan"], "beta must be a number, got nan"),
        (["model", "--experts", "9", "--estimator", "hill"], "invalid choice: 'hill'"),
        (["modle", "--experts", "9"], "MODEL modle: no such directory; did you mean model"),
        (["bundled:huge", "--experts", "9"], "it has bundled:tiny_moe"),
        (["model", "--experts", "9", "--out", "none/a.json"], "--out none/a.json: give a file in"),
        (["model", "--experts", "9", "--svg", "model"], "--svg model: give a file in a directory"),
        (["model", "--experts", "9", "--cache", "file"], "--cache file can not be written: "),
        (["model", "--experts", "9", "--threads", "0"], "--threads must be 1 or more, got 0"),
        (["model", "--experts", "9", "--cache", "a", "--no-cache"], "not allowed with argument"),
        (["empty", "--experts", "9"], "empty is an empty directory, not a model directory"),
        (["pickled", "--experts", "9"], "pickle files are not read"),
    ],
)
def test_mistakes_end_with_one_message(arguments, message, model, tmp_path, capsys, monkeypatch):
    shutil.copytree(model, tmp_path / "pickled")
    (tmp_path / "pickled" / WEIGHTS).rename(tmp_path / "pickled" / "pytorch_model.bin")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(spectra_read, "_spectrum", lambda _: pytest.fail("not refused"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as end:
        cli.run_and_exit(lambda: alpha.main(arguments))
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    assert re.search(message, lines[0]), lines[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_a_default_cache_that_can_not_be_is_done_without(model, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert run(model, "--experts", 9) == 0
    assert "no cache    " in capsys.readouterr().err


def test_the_maths_needs_numpy_only():
    source = pathlib.Path(spectra.__file__).read_text()
    assert "jax" not in source.replace("drlora_jax", "")
