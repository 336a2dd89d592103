"""Summed negative log-likelihood against the formula, written out in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drlora_jax.ops import cross_entropy
from drlora_jax.ops.cross_entropy import summed_nll

WIDTH, VOCABULARY = 6, 17


def make_inputs(tokens, seed=0):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(tokens, WIDTH)), jnp.float32)
    head = jnp.asarray(rng.normal(size=(WIDTH, VOCABULARY)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, VOCABULARY, tokens), jnp.int32)
    mask = jnp.asarray(rng.random(tokens) < 0.6, jnp.float32)
    return hidden, head, targets, mask


def formula(hidden, head, targets, mask, soft_cap=None):
    """(loss, gradient of the hidden states, gradient of the head)."""
    hidden, head, mask = (np.asarray(value, np.float64) for value in (hidden, head, mask))
    logits = hidden @ head
    slope = np.ones_like(logits)
    if soft_cap is not None:
        slope = 1 - np.tanh(logits / soft_cap) ** 2
        logits = soft_cap * np.tanh(logits / soft_cap)
    probability = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    rows = np.arange(len(hidden))
    loss = np.sum(-np.log(probability[rows, targets]) * mask)
    probability[rows, targets] -= 1
    d_logits = probability * mask[:, None] * slope
    return loss, d_logits @ head.T, hidden.T @ d_logits


def value_and_grads(inputs, **options):
    hidden, head, targets, mask = inputs

    def loss(hidden, head):
        return summed_nll(hidden, head, targets, mask, **options)

    value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(hidden, head)
    return value, *grads


@pytest.mark.parametrize("soft_cap", [None, 1.5])
@pytest.mark.parametrize("head_grad", [False, True])
@pytest.mark.parametrize("tokens", [1, 8, 16, 21])  # less than a chunk, one, two, and a rest
def test_loss_and_gradients(tokens, head_grad, soft_cap, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_TOKENS", 8)
    inputs = make_inputs(tokens, seed=tokens)
    loss, d_hidden, d_head = formula(*inputs, soft_cap)
    got = value_and_grads(inputs, head_grad=head_grad, soft_cap=soft_cap)
    np.testing.assert_allclose(got[0], loss, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got[1], d_hidden, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got[2], d_head if head_grad else 0 * d_head, rtol=1e-5, atol=1e-5)


def test_real_chunk_size():
    inputs = make_inputs(cross_entropy.CHUNK_TOKENS + 3)
    loss, d_hidden, _ = formula(*inputs)
    got_loss, got_d_hidden, _ = value_and_grads(inputs)
    np.testing.assert_allclose(got_loss, loss, rtol=1e-5)
    np.testing.assert_allclose(got_d_hidden, d_hidden, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head_grad", [False, True])
def test_all_masked_is_zero(head_grad, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_TOKENS", 8)
    hidden, head, targets, mask = make_inputs(11)
    inputs = (1e3 * hidden, head, targets, 0 * mask)
    for value in value_and_grads(inputs, head_grad=head_grad):
        assert not np.any(value)  # not NaN either


def test_scales_with_its_cotangent():
    hidden, head, targets, mask = make_inputs(11)

    def loss(hidden, weight):
        return weight * summed_nll(hidden, head, targets, mask)

    one, quarter = (jax.grad(loss)(hidden, weight) for weight in (1.0, 0.25))
    np.testing.assert_allclose(quarter, 0.25 * one, rtol=1e-6)


@pytest.mark.parametrize("head_grad", [False, True])
def test_bfloat16_hidden(head_grad, monkeypatch):
    """Logits and loss are f32; only the gradients are rounded, to the dtype of their arrays."""
    monkeypatch.setattr(cross_entropy, "CHUNK_TOKENS", 8)
    hidden, head, targets, mask = make_inputs(21)
    inputs = (hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16), targets, mask)
    loss, d_hidden, d_head = formula(*inputs)
    got_loss, got_d_hidden, got_d_head = value_and_grads(inputs, head_grad=head_grad)
    assert got_loss.dtype == jnp.float32 and got_d_hidden.dtype == jnp.bfloat16
    np.testing.assert_allclose(got_loss, loss, rtol=1e-5)
    for got, expected in ((got_d_hidden, d_hidden), (got_d_head, d_head * head_grad)):
        error = np.abs(np.asarray(got, np.float64) - expected).max()
        assert error <= 2**-7 * np.abs(d_hidden).max() * (4 if expected is not d_hidden else 1)


def array_shapes(jaxpr):
    """Shapes of everything computed in a jaxpr and in those inside it."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.shape for variable in equation.outvars)
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from array_shapes(inner)


@pytest.mark.parametrize("head_grad", [False, True])
def test_no_array_of_tokens_by_vocabulary(head_grad, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_TOKENS", 8)
    hidden, head, targets, mask = make_inputs(64)

    def loss(hidden, head):
        return summed_nll(hidden, head, targets, mask, head_grad=head_grad)

    for function in (loss, jax.value_and_grad(loss, argnums=(0, 1))):
        shapes = set(array_shapes(jax.make_jaxpr(function)(hidden, head).jaxpr))
        assert (8, VOCABULARY) in shapes  # a chunk's logits are found, so the walk goes deep enough
        assert max(np.prod(shape) for shape in shapes if VOCABULARY in shape) <= 8 * VOCABULARY


def test_chunks_without_targets_are_not_computed(monkeypatch):
    """What is not read can be anything: 16 tokens with targets, and the rest undefined."""
    monkeypatch.setattr(cross_entropy, "CHUNK_TOKENS", 8)
    hidden, head, targets, _ = make_inputs(40)
    mask = jnp.asarray(np.random.default_rng(0).permutation(40) < 16, jnp.float32)
    spoiled = jnp.where(mask[:, None] > 0, hidden, jnp.nan)
    loss, d_hidden, _ = formula(hidden, head, targets, mask)
    got = value_and_grads((spoiled, head, targets, mask))
    np.testing.assert_allclose(got[0], loss, rtol=1e-5)
    np.testing.assert_allclose(got[1], d_hidden, rtol=1e-5, atol=1e-6)


def test_no_target_at_all():
    hidden, head, targets, mask = make_inputs(21)
    loss, d_hidden, _ = value_and_grads((hidden, head, targets, 0 * mask))
    assert loss == 0 and not np.any(d_hidden)
