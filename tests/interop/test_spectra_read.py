"""Spectra of a model directory: which matrices are read, and what is kept between analyses."""

import pathlib
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from drlora_jax.allocation.spectra import eigenvalues
from drlora_jax.errors import UserError
from drlora_jax.interop import spectra_read
from drlora_jax.interop.hf_files import read_model_config
from drlora_jax.interop.spectra_read import find_matrices, fit_layers, read_matrix
from tests.oracles.stored import copy_model
from tests.support.model_files import WEIGHTS
from tests.support.spectra import slow_fit
from tests.support.tiny import MIXTRAL, write_tiny_model


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
    with pytest.raises(UserError, match=rf"{key} \(up of expert 2 in layer 1\): only 0 of its"):
        list(fit_layers(read_model_config(model), model))


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
