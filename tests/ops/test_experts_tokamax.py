"""Expert MLPs with the grouped products of `tokamax`, and who may ask for which backend."""

import importlib.util
import json
import pathlib
import runpy
import sys
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drlora_jax import train
from drlora_jax.config import load_config
from drlora_jax.errors import UserError
from drlora_jax.interop.hf_files import find_model
from drlora_jax.ops import ops_for
from drlora_jax.ops.experts import backends, tokamax
from drlora_jax.training.costs import checked_expert_backend
from tests.support.expert_mlps import (
    CASES,
    SPEC,
    TRAINED,
    choose,
    make_inputs,
    random_like,
    reference,
    relative_error,
    value_and_pull,
)

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"
needs_tokamax = pytest.mark.skipif(
    importlib.util.find_spec("tokamax") is None,
    reason="tokamax is not installed: it needs Python 3.12 or newer",
)


# ------------------------------------------------------------------------------------------ values


@needs_tokamax
@pytest.mark.parametrize("name", ("all_to_one_of_5", "empty_groups"))
def test_values_and_gradients(name):
    """Of its way without a kernel, with all gradients and with those of a frozen base."""
    expert_TK, num_experts, roles, spec = CASES[name]
    inputs = make_inputs(expert_TK, num_experts, roles)
    dy = random_like(inputs[0])
    y, (dx, dp, *d_weights, d_lora) = reference(inputs, np.asarray(dy, np.float64), spec.activation)
    if not spec.base_grad:
        d_weights = [np.zeros_like(grad) for grad in d_weights]
    expected = jax.tree.leaves((y, (dx, dp, *d_weights, d_lora)))
    got = value_and_pull(inputs, dy, spec, "tokamax")
    dense = value_and_pull(inputs, dy, spec, "dense")
    for one, other, wanted in zip(*map(jax.tree.leaves, (got, dense)), expected, strict=True):
        assert relative_error(one, wanted) <= 1e-5
        assert relative_error(one, other) <= 1e-5


@needs_tokamax
def test_slots_of_other_devices_and_padding():
    """Group sizes sum up to fewer rows than there are."""
    expert_TK = choose(70, 2, 4)
    expert_TK[5] = 4
    expert_TK[40:60] = (4, -1)
    inputs = make_inputs(expert_TK, 4, ("gate_up", "down"))
    dy = random_like(inputs[0])
    expected = reference(inputs, np.asarray(dy, np.float64), "silu")
    got = value_and_pull(inputs, dy, TRAINED, "tokamax")
    for one, wanted in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert relative_error(one, wanted) <= 1e-5


@needs_tokamax
def test_bfloat16_stays_bfloat16():
    inputs = list(make_inputs(choose(40, 2, 4), 4, ("gate_up", "down")))
    for index in (0, 3, 4):
        inputs[index] = inputs[index].astype(jnp.bfloat16)
    dy = random_like(inputs[0])
    got, (dx, *_) = value_and_pull(tuple(inputs), dy, SPEC, "tokamax")
    ragged, _ = value_and_pull(tuple(inputs), dy, SPEC, "ragged")
    assert got.dtype == dx.dtype == jnp.bfloat16
    assert relative_error(got.astype(jnp.float32), ragged.astype(jnp.float32)) <= 2**-7


# -------------------------------------------------------------------------------- which product


class Asked(NamedTuple):
    """Stands in for the package and notes what it is asked for."""

    calls: list

    def ragged_dot(self, rows, weights_EIO, size_E, *, preferred_element_type, implementation):
        self.calls.append((rows.shape, weights_EIO.shape, implementation))
        assert preferred_element_type == rows.dtype
        return jax.lax.ragged_dot(rows, weights_EIO, size_E)


@pytest.mark.parametrize(
    ("platform", "implementation", "taken"),
    [("tpu", "mosaic", [True, False, False]), ("gpu", "mosaic", [True] * 3), ("cpu", "xla", None)],
)
def test_which_products_it_computes(monkeypatch, platform, implementation, taken):
    """On TPU no thin ones and no odd numbers of rows; what it does not take is computed, too."""
    package = Asked([])
    monkeypatch.setitem(sys.modules, "tokamax", package)
    product = jax.jit(tokamax.product_for(platform))
    shapes = [((256, 128), (2, 128, 256)), ((256, 128), (2, 128, 16)), ((200, 128), (2, 128, 128))]
    for rows, weights in shapes:
        out = product(jnp.ones(rows), jnp.ones(weights), jnp.array([100, 28], jnp.int32))
        np.testing.assert_array_equal(out[:128], np.full((128, weights[2]), 128.0))
    taken = taken or [True] * 3
    wanted = [(*shape, implementation) for shape, is_it in zip(shapes, taken, strict=True) if is_it]
    assert package.calls == wanted


def test_it_is_imported_only_where_it_is_used():
    with mock.patch.dict(sys.modules, {"tokamax": None}):  # an import of it would raise
        inputs = make_inputs(choose(9, 2, 3), 3, ("up",))
        jax.eval_shape(
            lambda *values: value_and_pull.__wrapped__(*values, SPEC, "ragged"), inputs, inputs[0]
        )
        with pytest.raises(ImportError):
            value_and_pull.__wrapped__(inputs, inputs[0], SPEC, "tokamax")


# ------------------------------------------------------------------------------- who may ask for it


class Device(NamedTuple):
    platform: str
    device_kind: str = ""


@pytest.fixture(scope="module")
def tiny_run():
    """`build(*overrides)`: a run of the shipped configuration without files."""
    abstract_job = runpy.run_path(BENCHMARKS / "jobs.py")["abstract_job"]

    def build(*overrides):
        config = load_config("bundled:tiny", ["model.dtype=float32", *overrides])
        values = json.loads((find_model(config.model.path) / "config.json").read_text())
        return train.build(abstract_job(config, values, 1), jax.devices()[:1])

    return build


@pytest.mark.parametrize("experts", ["auto", "native", "block", "dense"])
def test_a_choice_is_taken_and_logged(tiny_run, experts):
    run, chosen = tiny_run(f"model.experts={experts}"), experts.replace("auto", "native")
    assert run.backends.startswith(f"kernels     experts={chosen} attention=")
    assert run.model.options.ops.expert_mlp.keywords["backend"] == chosen
    assert run.model.options.ops.reads_stacks == (chosen != "dense")


def call(platform, kind="", dtype=jnp.bfloat16):
    return backends.Call(platform, dtype, (128, 64), Device(platform, kind))


def test_choices_by_platform(monkeypatch):
    assert backends.choose_backend(call("tpu")) == "ragged"  # not tokamax, which nobody measured
    keywords = ops_for("tpu", experts="tokamax").expert_mlp.keywords
    assert (keywords["backend"], keywords["platform"]) == ("tokamax", "tpu")
    cannot = backends.cannot
    assert cannot("ragged", call("tpu")) is None
    assert not any(cannot("dense", call(platform)) for platform in ("cpu", "gpu", "tpu"))
    assert "no grouped kernel for bfloat16 on gpu" in cannot("ragged", call("gpu"))
    for experts in ("native", "block"):
        assert "for CPUs, not for tpu" in cannot(experts, call("tpu"))
    assert "in float32, not in bfloat16" in cannot("native", call("cpu"))
    monkeypatch.setattr(tokamax, "is_installed", lambda: True)
    assert cannot("tokamax", call("tpu", "TPU v5 lite")) is None
    assert "v5 and later" in cannot("tokamax", call("tpu", "TPU v4"))


def test_a_gpu_is_tried_first(monkeypatch):
    """A wide and a thin product with their gradients, on the device of the mesh; what is raised
    becomes the reason.
    """
    tried = []

    def compile_product(product, dtype, device, hidden):
        tried.append((dtype, device, hidden))
        if hidden < 128:
            raise NotImplementedError("no such tile\nmore")

    monkeypatch.setattr(tokamax, "is_installed", lambda: True)
    monkeypatch.setattr(backends, "_compile_product", compile_product)
    asked = call("gpu", "NVIDIA X")
    reason = backends.cannot("tokamax", asked)
    assert reason == "a small case does not compile for NVIDIA X: no such tile"
    assert tried == [(jnp.bfloat16, asked.device, 256), (jnp.bfloat16, asked.device, 16)]


def test_the_small_case_has_all_gradients(monkeypatch):
    shapes = []

    def product(rows, weights_EIO, size_E):
        shapes.append((rows.shape, weights_EIO.shape))
        return jax.lax.ragged_dot(rows, weights_EIO, size_E)

    backends._compile_product(product, jnp.float32, jax.devices()[0], 16)
    assert shapes == [((384, 128), (5, 128, 16))]


def test_what_can_not_be_used_is_refused(monkeypatch, tiny_run):
    for experts, reason in {
        "tokamax": "it has kernels for TPU and NVIDIA, not for cpu",
        "ragged": "XLA has no grouped kernel for float32 on cpu",
    }.items():
        with pytest.raises(UserError, match=f"model.experts={experts} cannot .*: {reason}"):
            tiny_run(f"model.experts={experts}")
    config = tiny_run().job.model_config
    monkeypatch.setattr(tokamax, "is_installed", lambda: False)
    with pytest.raises(UserError, match="it is not installed; with Python 3.12 or newer: pip"):
        checked_expert_backend(config, jnp.bfloat16, Device("tpu"), "tokamax")
