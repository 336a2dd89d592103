"""Logits and weights against `transformers`: stored results everywhere, live ones beside torch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from drlora_jax.models.options import DecoderOptions
from drlora_jax.models.transformer import Decoder, logits
from drlora_jax.ops import Ops
from drlora_jax.ops.experts.api import expert_mlp
from tests.oracles.stored import (
    LAYOUTS,
    VARIANTS,
    copy_model,
    load_arrays,
    make_rows,
    stored_positions,
)
from tests.support.model_files import WEIGHTS, assert_bit_equal, load, write_shards

MAX_ABS, MAX_KL = 1e-4, 1e-5
MAX_DRIFT = 4e-6  # of stored logits from live ones, both computed in float64: f32 of up to 32
ROW_NAMES = ("plain", "padded", "packed")


@functools.cache
def compiled(config, backend, dtype):
    ops = Ops(expert_mlp=functools.partial(expert_mlp, backend=backend))
    model = Decoder(config, DecoderOptions(dtype=jnp.dtype(dtype), ops=ops))

    @jax.jit
    def run(params, *rows):
        hidden_BTD, _ = model.apply({"params": params}, *rows)
        return logits(config, params, hidden_BTD)

    return run


def our_logits(path, rows, *, backend="block", dtype="float32"):
    config, params = load(path, dtype)
    run = compiled(config, backend, dtype)
    return np.asarray(run(params, rows.tokens, rows.segments, rows.positions))


def log_softmax(x_NV):
    x_NV = x_NV.astype(np.float64)
    x_NV = x_NV - x_NV.max(axis=-1, keepdims=True)
    return x_NV - np.log(np.exp(x_NV).sum(axis=-1, keepdims=True))


def errors(expected_NV, got_NV) -> tuple[float, float]:
    """(largest absolute difference, largest KL of a token)."""
    expected, got = log_softmax(expected_NV), log_softmax(got_NV)
    kl_N = np.sum(np.exp(expected) * (expected - got), axis=-1)
    return float(np.abs(expected_NV - got_NV).max()), float(kl_N.max())


def assert_close(expected_NV, got_NV, name: str):
    max_abs, kl = errors(expected_NV, got_NV)
    print(f"{name}: {len(expected_NV)} tokens, max abs {max_abs:.1e}, KL {kl:.1e}")
    assert max_abs <= MAX_ABS, name
    assert kl <= MAX_KL, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_the_stored_ones(tmp_path, variant):
    rows, is_stored = make_rows(), stored_positions()
    got_BTV = our_logits(copy_model(variant, "experts", tmp_path), rows)
    expected_NV = load_arrays(variant)["logits"]
    for index, name in enumerate(ROW_NAMES):
        of_row = np.nonzero(is_stored)[0] == index
        assert_close(expected_NV[of_row], got_BTV[index][is_stored[index]], f"{variant} {name}")


def test_dense_backend_gives_the_same_logits(tmp_path):
    directory = copy_model("olmoe", "experts", tmp_path)
    got_BTV = our_logits(directory, make_rows(), backend="dense")
    assert_close(load_arrays("olmoe")["logits"], got_BTV[stored_positions()], "olmoe dense")


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_every_layout_and_sharding_gives_the_same_bits(tmp_path, family):
    single = copy_model(family, "experts", tmp_path / "single")
    _, params = load(single)
    assert_bit_equal(params, load(copy_model(family, "fused", tmp_path / "fused"))[1])
    for layout in LAYOUTS:
        tensors = load_file(tmp_path / ("fused" if layout == "fused" else "single") / WEIGHTS)
        for has_index in (True, False):
            sharded = tmp_path / f"{layout}_{has_index}"
            write_shards(sharded, tensors, (single / "config.json").read_text(), has_index)
            assert_bit_equal(params, load(sharded)[1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_loses_no_more_than_transformers_does(tmp_path, variant):
    """Over tokens, not at the worst one: where rounding makes a router choose another expert, each
    library has its own unlucky tokens.
    """
    directory, rows = copy_model(variant, "experts", tmp_path), make_rows()
    is_valid = rows.segments > 0
    exact, half = (
        log_softmax(our_logits(directory, rows, dtype=dtype)[is_valid])
        for dtype in ("float32", "bfloat16")
    )
    kl_N = np.sum(np.exp(exact) * (exact - half), axis=-1)
    theirs_N = load_arrays(variant)["bfloat16_kl"]
    for share in (0.5, 0.9):
        ours, theirs = np.quantile(kl_N, share), np.quantile(theirs_N, share)
        print(f"{variant}: KL at {share:.0%} of tokens {ours:.1e}, transformers {theirs:.1e}")
        assert ours <= 1.5 * theirs


# ------------------------------------------------------------------------------------------- live


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_the_live_ones(tmp_path, oracle, variant):
    rows = make_rows()
    layout = "fused" if variant == "olmoe" else "experts"  # the library reads both
    directory = copy_model(variant, layout, tmp_path)
    exact_NV = oracle.exact_logits(directory, rows)[stored_positions()]
    assert np.abs(load_arrays(variant)["logits"] - exact_NV).max() <= MAX_DRIFT
    # Like with like: one token of llama in their own float32 is 1.2e-4 from their float64.
    live_BTV = oracle.all_logits(oracle.load_model(directory), rows)
    got_BTV = our_logits(directory, rows)
    for index, name in enumerate(ROW_NAMES):
        is_valid_T = rows.segments[index] > 0
        assert_close(live_BTV[index][is_valid_T], got_BTV[index][is_valid_T], f"{variant} {name}")
