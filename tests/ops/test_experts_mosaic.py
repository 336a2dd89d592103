"""Expert MLPs with jax's grouped kernels for Hopper, in jax's interpreter of such kernels on a CPU,
and who may ask for them.

The interpreter fills memory that a kernel does not write with NaN: what reads rows of no group
shows. Compiling takes most of the time, so cases have equal shapes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drlora_jax.errors import UserError
from drlora_jax.models.families import parse_config
from drlora_jax.ops.experts import backends
from drlora_jax.ops.experts import mosaic as mosaic_lib
from drlora_jax.ops.experts.shared import Dropout
from drlora_jax.training.costs import backend_line, checked_expert_backend
from tests.support.expert_mlps import (
    SPEC,
    TRAINED,
    choose,
    groups,
    make_inputs,
    random_like,
    reference,
    value_and_pull,
)

HAS_KERNELS = mosaic_lib.jax_version() >= mosaic_lib.OLDEST_JAX
needs_kernels = pytest.mark.skipif(not HAS_KERNELS, reason="jax is older than its kernels")
ROUNDING = 0.006  # of a product of bfloat16 numbers, norm of the error to that of the result


def relative_error(got, wanted) -> float:
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    return np.linalg.norm(got - wanted) / (np.linalg.norm(wanted) or 1.0)


@pytest.fixture
def interpreted(monkeypatch):
    from jax.experimental.pallas import mosaic_gpu

    monkeypatch.setattr(mosaic_lib, "CORES", 4)  # the interpreter takes time for each
    with mosaic_gpu.force_gpu_interpret_mode(), jax.numpy_rank_promotion("allow"):
        yield


# ---------------------------------------------------------------------------------------- products

# Of five experts. Tiles are of 64 rows; what is left of 250 rows belongs to nobody.
GROUPS = {
    "aligned": (64, 128, 0, 0, 0),
    "unaligned": (37, 99, 7, 100, 7),
    "single rows": (1, 63, 1, 64, 1),
    "empty": (0, 100, 0, 92, 0),
    "skewed": (2, 245, 0, 1, 2),
    "nothing": (0, 0, 0, 0, 0),
}


def product_in_f64(rows, weights, size_E, dy, is_transposed):
    """The product of rows, and the gradients of rows and weights, group by group."""
    out, d_rows = np.zeros((len(rows), dy.shape[1])), np.zeros(rows.shape)
    d_weights, start = np.zeros(weights.shape), 0
    for expert, size in enumerate(size_E):
        own = slice(start, start + size)
        matrix = weights[expert].T if is_transposed else weights[expert]
        out[own] = rows[own] @ matrix
        d_rows[own] = dy[own] @ matrix.T
        d_matrix = rows[own].T @ dy[own]
        d_weights[expert] = d_matrix.T if is_transposed else d_matrix
        start += size
    return out, d_rows, d_weights


@needs_kernels
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("is_transposed", (False, True))
@pytest.mark.parametrize("name", GROUPS)
def test_a_product_and_its_gradients(name, is_transposed):
    """Against float64; weights as they lie and transposed, rows of no group at the end."""
    size_E, (width_in, width_out), count = np.array(GROUPS[name], np.int32), (64, 128), 250
    draw = np.random.default_rng(0)
    sides = (width_out, width_in) if is_transposed else (width_in, width_out)
    shapes = ((count, width_in), (len(size_E), *sides), (count, width_out))
    rows, weights, dy = (jnp.asarray(draw.normal(size=size), jnp.bfloat16) for size in shapes)
    taken = int(size_E.sum())
    # What comes back is masked, as are rows of an MLP's second product.
    dy = dy * (jnp.arange(count) < taken)[:, None].astype(dy.dtype)
    out, pull = jax.vjp(
        lambda rows, weights: mosaic_lib.product(rows, weights, jnp.asarray(size_E), is_transposed),
        rows,
        weights,
    )
    d_rows, d_weights = pull(dy)
    exact = (np.asarray(array, np.float64) for array in (rows, weights))
    wanted = product_in_f64(*exact, size_E, np.asarray(dy, np.float64), is_transposed)
    assert out.dtype == d_rows.dtype == d_weights.dtype == jnp.bfloat16
    assert out.shape == (count, width_out) and d_weights.shape == weights.shape
    for got, exactly in zip((out[:taken], d_rows[:taken]), wanted[:2], strict=True):
        assert relative_error(got, exactly[:taken]) <= ROUNDING
    for got, exactly in zip(d_weights, wanted[2], strict=True):  # each expert's own
        assert relative_error(got, exactly) <= ROUNDING


# ------------------------------------------------------------------------------------ the operation


def in_bfloat16(expert_TK, experts, roles, **sizes):
    inputs = list(make_inputs(expert_TK, experts, roles, width=64, hidden=64, **sizes))
    for index in (0, 3, 4):
        inputs[index] = inputs[index].astype(jnp.bfloat16)
    return tuple(inputs)


def mosaic(inputs, dy, spec, dropout=None):
    # Not jitted as a whole: kernels are then compiled once for all tests.
    return value_and_pull.__wrapped__(inputs, dy, spec, "mosaic", dropout)


def elsewhere():
    """Tokens and slots of other devices, and padding."""
    expert_TK = choose(100, 2, 5)
    expert_TK[5] = 5
    expert_TK[40:60] = (5, -1)
    expert_TK[7, 1] = expert_TK[9, 0] = 5
    return expert_TK


GELU = TRAINED._replace(activation="gelu_tanh")
CASES = {
    # Empty, single, unaligned and skewed groups; ranks from 0 to the maximum.
    "groups": (groups(64, 100, 0, 1, 35), ("gate", "up", "down"), TRAINED),
    "elsewhere": (elsewhere(), ("gate_up", "down"), GELU),
}


@needs_kernels
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", CASES)
def test_values_and_all_gradients(name):
    """As near to float64 as every expert on every token is, and nothing behind a closed gate."""
    expert_TK, roles, spec = CASES[name]
    inputs = in_bfloat16(expert_TK, 5, roles)
    dy = random_like(inputs[0])
    y, (dx, dp, *d_weights, d_lora) = reference(inputs, np.asarray(dy, np.float64), spec.activation)
    wanted = jax.tree.leaves((y, (dx, dp, *d_weights, d_lora)))
    dense = jax.tree.leaves(value_and_pull(inputs, dy, spec, "dense"))
    found = mosaic(inputs, dy, spec)
    for got, other, exactly in zip(jax.tree.leaves(found), dense, wanted, strict=True):
        assert got.shape == other.shape and got.dtype == other.dtype
        bound = 1.5 * relative_error(other, exactly) + ROUNDING
        assert relative_error(got, exactly) <= min(bound, 0.02)
    for role, factors in inputs[-1].items():
        closed_ER = np.asarray(factors.gate_ER) == 0
        assert closed_ER.any() and not closed_ER.all()
        assert not any(np.asarray(grad)[closed_ER].any() for grad in found[1][-1][role])


@needs_kernels
@pytest.mark.usefixtures("interpreted")
def test_dropout_draws_what_the_dense_backend_draws():
    spec = SPEC._replace(dropout=0.25)
    inputs = in_bfloat16(choose(100, 2, 5), 5, ("up", "down"))
    dy, dropout = random_like(inputs[0]), Dropout(jax.random.key(3), 11 + 2 * jnp.arange(100))
    dense = value_and_pull(inputs, dy, spec, "dense", dropout)
    got = mosaic(inputs, dy, spec, dropout)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(dense), strict=True):
        assert relative_error(one, other) <= 0.02
    without = value_and_pull(inputs, dy, SPEC, "dense")
    assert relative_error(dense[0], without[0]) > 0.05


@needs_kernels
def test_a_frozen_base_gets_no_weight_gradient():
    """Of factors A and B get one each, and rows get one from every product."""
    inputs = in_bfloat16(choose(64, 2, 4), 4, ("down",), ranks=32)
    counts = []
    for spec in (SPEC, TRAINED):
        traced = jax.make_jaxpr(
            lambda *args, spec=spec: value_and_pull.__wrapped__(*args, spec, "mosaic")
        )(inputs, inputs[0])
        called = [each.params.get("name") for each in traced.jaxpr.eqns]
        counts.append((called.count("_multiply"), called.count("_multiply_over_groups")))
    assert counts == [(8, 2), (8, 4)]


# ------------------------------------------------------------------------------- who may ask for it


class Device(NamedTuple):
    platform: str = "gpu"
    device_kind: str = "NVIDIA H200"
    compute_capability: str = "9.0"


H200 = Device()


def call(device=H200, dtype=jnp.bfloat16, widths=(2048, 1024)):
    return backends.Call(device.platform, dtype, widths, device)


@pytest.fixture
def new_jax(monkeypatch):
    monkeypatch.setattr(mosaic_lib, "jax_version", lambda: (0, 11, 2))
    monkeypatch.setattr(mosaic_lib, "_lacks_kernels", lambda: None)


@pytest.mark.usefixtures("new_jax")
@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (call(), None),
        (call(dtype=jnp.float16), None),
        (call(widths=(192, 256)), None),
        (call(dtype=jnp.float32), "multiply 16-bit floats, not float32"),
        (call(widths=(2048, 1000)), "widths of a multiple of 64, got 1000"),
        (call(Device(device_kind="NVIDIA A100", compute_capability="8.0")), "not for NVIDIA A100"),
        (call(Device(device_kind="NVIDIA B200", compute_capability="10.0")), "not for NVIDIA B200"),
        (call(Device("cpu", "cpu", "")), "for NVIDIA's Hopper, not for cpu"),
        (call(Device("tpu", "TPU v5", "")), "for NVIDIA's Hopper, not for tpu"),
    ],
)
def test_where_it_is_taken(asked, reason):
    found = backends.cannot("mosaic", asked)
    assert (found is None) == (reason is None) and (reason or "") in (found or "")
    assert (backends.choose_backend(asked) == "mosaic") == (reason is None)


def test_older_versions_of_jax_are_refused_by_name(monkeypatch):
    monkeypatch.setattr(mosaic_lib, "_lacks_kernels", lambda: None)
    for version, is_taken in (("0.10.2", False), ("0.11.1", False), ("0.11.2", True)):
        monkeypatch.setattr(jax, "__version__", version)
        found = backends.cannot("mosaic", call())
        assert (found is None) == is_taken
        assert (
            is_taken
            or f"needs jax 0.11.2 or newer, which needs Python 3.12, got {version}" in found
        )
    for version in ("0.12.0.1", "0.11.2.dev20260101", "1.0"):
        monkeypatch.setattr(jax, "__version__", version)
        assert backends.choose_backend(call()) == "mosaic"


def test_this_jax():
    assert (backends.choose_backend(call()) == "mosaic") == HAS_KERNELS


def test_a_later_jax_without_these_kernels(monkeypatch):
    """They are examples of jax, and may go or change: then experts are dense, and the line says."""

    def gone():
        raise ImportError("no module of that name")

    def ragged_dot(lhs, rhs, *, group_sizes, tile):
        return lhs

    monkeypatch.setattr(mosaic_lib, "jax_version", lambda: (1, 0, 0))
    for kernel, reason in (
        (gone, "does not provide its kernels"),
        (lambda: ragged_dot, "a different"),
    ):
        monkeypatch.setattr(mosaic_lib, "_row_kernel", kernel)
        mosaic_lib._lacks_kernels.cache_clear()
        assert reason in backends.cannot("mosaic", call())
        assert backends.choose_backend(call()) == "dense"
    mosaic_lib._lacks_kernels.cache_clear()


OLMOE = {
    "model_type": "olmoe",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": False,
}


@pytest.mark.usefixtures("new_jax")
def test_the_choice_and_its_reason_are_printed():
    config, bf16 = parse_config(OLMOE), jnp.dtype(jnp.bfloat16)

    def line(config, device, dtype=bf16, wanted="auto"):
        experts = checked_expert_backend(config, dtype, device, wanted)
        return backend_line(config, ["cudnn"], experts, device, dtype)

    assert line(config, Device()) == "kernels     experts=mosaic attention=cudnn (gpu)"
    dense = (
        "kernels     experts=dense attention=cudnn (gpu); every expert is computed on every token: "
    )
    ampere = Device(device_kind="NVIDIA A100", compute_capability="8.0")
    why = "mosaic cannot be used: its kernels are for NVIDIA's Hopper (9.0), not for NVIDIA A100"
    assert line(config, ampere) == f"{dense}{why} (8.0)"
    assert "16-bit floats, not float32" in line(config, Device(), jnp.dtype(jnp.float32))
    odd = parse_config(OLMOE | {"intermediate_size": 40})
    assert "a multiple of 64, got 40" in line(odd, Device())
    assert line(config, Device(), wanted="dense") == f"{dense}as configured"
    with pytest.raises(UserError, match="model.experts=mosaic cannot be used here: .*NVIDIA A100"):
        line(config, ampere, wanted="mosaic")
