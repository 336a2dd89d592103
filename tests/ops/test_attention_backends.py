"""Long packed rows: every backend that runs here against scores of a whole row, and its leaks."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drlora_jax.errors import UserError
from drlora_jax.models.families import parse_config
from drlora_jax.models.options import keep
from drlora_jax.models.transformer import rematerialised
from drlora_jax.ops.attention import api
from drlora_jax.ops.attention.api import Call, attend, cannot, choose_backend
from drlora_jax.training.costs import attention_backends

LENGTH, HEADS, WIDTH = 256, 4, 8
# Documents that begin and end inside blocks, two of them within one block, and padding.
SIZES = ((100, 20, 70), (256,))
SEGMENTS = np.array(
    [
        np.repeat([*range(1, len(row) + 1), 0], [*row, LENGTH - sum(row)]).astype(np.int32)
        for row in SIZES
    ]
)
POSITIONS = np.array(
    [
        np.concatenate([*map(np.arange, row), np.zeros(LENGTH - sum(row))]).astype(np.int32)
        for row in SIZES
    ]
)
SINKS = np.array([0.5, -40.0, 1.0, 0.0], np.float32)
CASES = {
    "plain": {},
    "window_and_cap": {"window": 50, "soft_cap": 1.3},
    "sinks": {"sinks_N": SINKS},
}


def make_inputs(seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shapes = [(2, LENGTH, count, WIDTH) for count in (HEADS, 2, 2)]
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@functools.partial(jax.jit, static_argnames=("backend", "window", "soft_cap"))
def run(q, k, v, cotangent, sinks_N=None, *, backend, window=None, soft_cap=None):
    """(values, gradients of everything) of sum(values * cotangent); padding is left out."""
    is_real = jnp.asarray(SEGMENTS > 0)[:, :, None, None]

    def values(q, k, v, sinks_N):
        out = attend(
            q,
            k,
            v,
            segment_ids_BT=jnp.asarray(SEGMENTS),
            positions_BT=jnp.asarray(POSITIONS),
            scale=0.3,
            window=window,
            soft_cap=soft_cap,
            sinks_N=sinks_N,
            backend=backend,
        )
        return jnp.where(is_real, out, 0)

    out, pull = jax.vjp(values, q, k, v, sinks_N)
    return out, pull(cotangent)


@functools.cache
def whole_rows(name):
    inputs, cotangent = make_inputs(), make_inputs(1)[0]
    return run(*inputs, cotangent, **CASES[name], backend="xla")


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", ["native", "chunked", "splash"])
def test_values_and_gradients(backend, name):
    if backend == "splash" and name == "sinks":
        pytest.skip("no sinks")
    got = run(*make_inputs(), make_inputs(1)[0], **CASES[name], backend=backend)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(whole_rows(name)), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize("backend", ["xla", "native", "chunked", "splash"])
def test_documents_do_not_see_each_other(backend):
    """Changing one document leaves outputs and gradients of the others bit-identical."""
    inputs, others, cotangent = make_inputs(), make_inputs(2), make_inputs(1)[0]
    is_changed = (SEGMENTS == 2)[:, :, None, None]
    mixed = [jnp.where(is_changed, b, a) for a, b in zip(inputs, others, strict=True)]
    before, after = (
        jax.tree.leaves(run(*values, cotangent, backend=backend)) for values in (inputs, mixed)
    )
    for one, other in zip(before, after, strict=True):
        kept, moved = SEGMENTS != 2, SEGMENTS == 2
        np.testing.assert_array_equal(np.asarray(one)[kept], np.asarray(other)[kept])
        assert not np.allclose(np.asarray(one)[moved], np.asarray(other)[moved])


def test_the_mask_given_to_cudnn():
    """jax's own computation with what the kernel would be given."""
    inputs = make_inputs()
    packed = (jnp.asarray(SEGMENTS), jnp.asarray(POSITIONS))
    got = api._attend_cudnn(*inputs, *packed, 0.3, None, implementation="xla")
    expected, _ = whole_rows("plain")
    real = SEGMENTS > 0
    np.testing.assert_allclose(np.asarray(got)[real], np.asarray(expected)[real], atol=1e-5)


@pytest.mark.parametrize("remat, times", [("none", 1), ("selective", 1), ("full", 2)])
def test_how_often_cudnn_runs_forward(monkeypatch, remat, times):
    """Its kernel returns statistics without a name; without them it would run again. Traced for a
    GPU, with jax's look at the device's versions left out.
    """
    from jax._src.cudnn import fused_attention_stablehlo as kernel

    monkeypatch.setattr(kernel, "check_cudnn_version", lambda: 91900)
    monkeypatch.setattr(kernel, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(kernel, "is_cuda_compute_capability_equal", lambda _: False)
    ids_BT = jnp.ones((2, 256), jnp.int32)
    positions_BT = jnp.broadcast_to(jnp.arange(256), (2, 256))

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x_BTD):
            heads = [nn.DenseGeneral((4, 64), name=name)(x_BTD) for name in "qkv"]
            heads = [keep(head, name) for head, name in zip(heads, "qkv", strict=True)]
            packed = dict(segment_ids_BT=ids_BT, positions_BT=positions_BT)
            return attend(*heads, **packed, scale=0.1, platform="gpu")

    layer = rematerialised(Layer, remat)()
    x_BTD = jnp.ones((2, 256, 32), jnp.bfloat16)
    variables = jax.eval_shape(Layer().init, jax.random.key(0), x_BTD)
    variables = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.bfloat16), variables)
    loss = jax.grad(lambda variables: layer.apply(variables, x_BTD).astype(jnp.float32).sum())
    text = str(jax.make_jaxpr(loss)(variables))
    assert len(re.findall(r"= dot_product_attention_fwd_wrapper", text)) == times


def test_blocks_hold_no_row_of_scores():
    """The largest array in values and gradients grows with the row's length, not its square."""
    inputs, cotangent = make_inputs(), make_inputs(1)[0]

    def largest(backend):
        function = functools.partial(run.__wrapped__, backend=backend)
        compiled = jax.jit(function).lower(*inputs, cotangent).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    long = HEADS * LENGTH * LENGTH * 4
    assert largest("xla") > long
    assert f"{LENGTH},{LENGTH}]" not in str(
        jax.make_jaxpr(functools.partial(run.__wrapped__, backend="chunked"))(*inputs, cotangent)
    )


def test_choice():
    bf16 = Call(4096, 128, 128, jnp.dtype(jnp.bfloat16))
    assert choose_backend("tpu", bf16) == "splash"
    assert choose_backend("gpu", bf16) == "cudnn"
    assert choose_backend("cpu", bf16) == "chunked"
    assert choose_backend("cpu", bf16._replace(length=64)) == "xla"
    assert choose_backend("tpu", bf16._replace(has_sinks=True)) == "chunked"
    assert choose_backend("tpu", bf16._replace(length=500)) == "xla"
    assert choose_backend("tpu", bf16._replace(length=1000)) == "chunked"
    assert choose_backend("gpu", bf16._replace(length=1023)) == "chunked"
    odd = cannot("cudnn", "gpu", bf16._replace(length=1023))
    assert "an even number of tokens, got 1023" in odd
    assert choose_backend("gpu", bf16._replace(dtype=jnp.dtype(jnp.float32))) == "chunked"
    assert choose_backend("gpu", bf16._replace(soft_cap=30.0, length=512)) == "xla"
    assert "at most 128" in cannot("cudnn", "gpu", bf16._replace(head_width=192))
    float32 = bf16._replace(dtype=jnp.dtype(jnp.float32))
    assert choose_backend("cpu", float32) == "native"
    assert "in float32, not in bfloat16" in cannot("native", "cpu", bf16)
    assert "for CPUs, not for tpu" in cannot("native", "tpu", float32)


def test_a_backend_that_can_not_do_it_is_refused():
    from tests.support.tiny import OLMOE

    config, float32 = parse_config(OLMOE), jnp.dtype(jnp.float32)
    assert attention_backends(config, 64, float32, "cpu", "auto") == ["native"]
    assert attention_backends(config, 512, float32, "cpu", "chunked") == ["chunked"]
    message = "model.attention=splash cannot be used here: it needs rows of a multiple of 128"
    with pytest.raises(UserError, match=message):
        attention_backends(config, 64, float32, "cpu", "splash")
    with pytest.raises(ValueError, match="cudnn: it computes in 16-bit floats, not in float32"):
        run.__wrapped__(*make_inputs(), make_inputs(1)[0], backend="cudnn")
