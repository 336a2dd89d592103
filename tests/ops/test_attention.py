"""Packed causal attention against a NumPy loop, and what may not leak between documents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drlora_jax.models.architecture import (
    AttentionConfig,
    LayerConfig,
    ModelConfig,
    MoeConfig,
    RopeConfig,
    RoutingConfig,
    SegmentConfig,
)
from drlora_jax.models.options import DecoderOptions
from drlora_jax.models.transformer import Decoder, logits
from drlora_jax.ops.attention.api import attend_cached
from tests.support.attention import (
    CASES,
    SCALE,
    SEGMENTS,
    loop_attention,
    make_inputs,
    positions_of,
    run,
)

# Row by row, batched, in blocks, and in compiled code.
HOW = {
    "rows": {"backend": "xla", "platform": "cpu"},
    "batched": {"backend": "xla", "platform": "tpu"},
    "chunked": {"backend": "chunked"},
    "native": {"backend": "native"},
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", CASES)
def test_values(name, how):
    inputs = make_inputs()
    got = np.asarray(run(*inputs, **CASES[name], **HOW[how]))
    assert got.shape == (*SEGMENTS.shape, 4, 5) and np.all(np.isfinite(got))
    expected = loop_attention(*inputs, **CASES[name])
    np.testing.assert_allclose(got[SEGMENTS > 0], expected[SEGMENTS > 0], atol=1e-5)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_groups_of_query_heads(kv_heads, how):
    inputs = make_inputs(kv_heads, value_width=6)
    got, expected = run(*inputs, **HOW[how]), loop_attention(*inputs)
    np.testing.assert_allclose(got[SEGMENTS > 0], expected[SEGMENTS > 0], atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_a_cache_gives_what_the_last_token_of_a_row_gets(name):
    """Row 1 is one document; what lies in later slots must not matter."""
    options = dict(CASES[name])
    sinks = options.pop("sinks", None)
    inputs = make_inputs()
    expected = loop_attention(*inputs, sinks=sinks, **options)[1]
    q_TNH, k_TGH, v_TGV = (value[1] for value in inputs)
    length, spare = len(q_TNH), 4
    k_GSH, v_GSV = (
        jnp.concatenate([value, jnp.full((spare, *value.shape[1:]), 1e9)]).transpose(1, 0, 2)
        for value in (k_TGH, v_TGV)
    )
    got = attend_cached(
        q_TNH,
        jnp.broadcast_to(k_GSH[None], (length, *k_GSH.shape)),
        jnp.broadcast_to(v_GSV[None], (length, *v_GSV.shape)),
        jnp.arange(length),
        scale=SCALE,
        sinks_N=None if sinks is None else jnp.asarray(sinks, jnp.float32),
        **options,
    )
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_bfloat16_in_and_out():
    inputs = [value.astype(jnp.bfloat16) for value in make_inputs()]
    got = run(*inputs)
    assert got.dtype == jnp.bfloat16
    expected = loop_attention(*inputs)
    error = np.abs(np.asarray(got, np.float64) - expected)[SEGMENTS > 0]
    assert error.max() < 2**-7 * np.abs(expected).max()


@pytest.mark.parametrize("how", HOW)
def test_gradients_against_differences_of_the_loop(how):
    options = CASES["all"]
    inputs = make_inputs()
    cotangent = np.random.default_rng(5).normal(size=(*SEGMENTS.shape, 4, 5))
    cotangent[SEGMENTS == 0] = 0
    _, pull = jax.vjp(lambda *inputs: run(*inputs, **options, **HOW[how]), *inputs)
    grads = pull(jnp.asarray(cotangent, jnp.float32))
    for index, grad in enumerate(grads):
        assert np.all(np.isfinite(grad))
        direction = np.random.default_rng(index).normal(size=grad.shape)

        def moved(size, index=index, direction=direction):
            values = [np.asarray(value, np.float64) for value in inputs]
            values[index] = values[index] + size * direction
            return np.sum(cotangent * loop_attention(*values, **options))

        difference = (moved(1e-5) - moved(-1e-5)) / 2e-5
        np.testing.assert_allclose(np.sum(grad * direction), difference, rtol=1e-4)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("changed", [1, 2, 0])
def test_documents_do_not_see_each_other(changed, how):
    """Changing one document (or the padding) leaves every other output bit-identical."""
    inputs, others = make_inputs(seed=1), make_inputs(seed=2)
    is_changed = jnp.asarray(SEGMENTS == changed)[:, :, None, None]
    mixed = [jnp.where(is_changed, b, a) for a, b in zip(inputs, others, strict=True)]
    before, after = (np.asarray(run(*values, **HOW[how])) for values in (inputs, mixed))
    np.testing.assert_array_equal(before[SEGMENTS != changed], after[SEGMENTS != changed])
    assert not np.allclose(before[SEGMENTS == changed], after[SEGMENTS == changed])


# ------------------------------------------------------------------------------ the whole decoder


@pytest.fixture(scope="module")
def decoder_logits():
    """A function (tokens, segment ids) -> logits of a small random decoder."""
    rope = RopeConfig(tuple(10000.0 ** (-np.arange(4) / 4)))
    attention = AttentionConfig(4, 2, 8, 8**-0.5, rope)
    moe = MoeConfig(expert_dim=12, routing=RoutingConfig(num_experts=4, experts_per_token=2))
    segment = SegmentConfig((LayerConfig(attention, moe),), 2)
    config = ModelConfig("test", 32, 16, (segment,), 1e-5)
    model = Decoder(config, DecoderOptions())
    shape = jnp.zeros((1, 4), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), shape, shape, shape)
    params = jax.tree.map(lambda leaf: leaf * 3, params)  # far from uniform routing

    def apply(tokens, segments, positions):
        hidden, _ = model.apply(params, tokens, segments, positions)
        return logits(config, params["params"], hidden)

    apply = jax.jit(apply)

    def run(tokens, segments):
        inputs = (tokens, segments, positions_of(segments))
        return np.asarray(apply(*(jnp.asarray(value, jnp.int32) for value in inputs)))

    return run


PACKED = np.array([[1] * 9 + [2] * 12 + [0] * 3, [1] * 24], np.int32)
TOKENS = np.random.default_rng(0).integers(0, 32, PACKED.shape)


@pytest.mark.parametrize("document", [1, 2, 0])
def test_packed_documents_have_independent_logits_through_the_decoder(document, decoder_logits):
    """Changed tokens of one document are routed differently; the others stay bit-identical."""
    is_changed = PACKED == document
    is_changed[1] = False
    before = decoder_logits(TOKENS, PACKED)
    after = decoder_logits(np.where(is_changed, (TOKENS + 7) % 32, TOKENS), PACKED)
    np.testing.assert_array_equal(before[~is_changed], after[~is_changed])
    assert not np.allclose(before[is_changed], after[is_changed])


def test_packed_document_has_the_logits_it_has_alone(decoder_logits):
    alone = np.zeros_like(PACKED)
    alone[0, :12] = 1
    tokens = np.zeros_like(TOKENS)
    tokens[0, :12] = TOKENS[0, 9:21]
    got = decoder_logits(TOKENS, PACKED)[0, 9:21]
    np.testing.assert_allclose(got, decoder_logits(tokens, alone)[0, :12], atol=1e-5)
