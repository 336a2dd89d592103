"""Expert MLPs with `lax.ragged_dot` against the NumPy float64 loop and the block backend."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drlora_jax.ops.experts import ragged as ragged_lib
from drlora_jax.ops.experts.shared import Dropout
from tests.support.expert_mlps import (
    CASES,
    SPEC,
    TRAINED,
    choose,
    make_inputs,
    plain_dense,
    random_like,
    reference,
    relative_error,
    value_and_pull,
)


def ragged(inputs, dy, spec, dropout=None):
    return value_and_pull(inputs, dy, spec, "ragged", dropout)


# One expert, all rows in one group, empty groups, odd counts, many experts; ranks 0 to the maximum.
NAMES = ("one_expert", "all_to_one_of_5", "empty_groups", "60_experts_gelu")


@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients(name):
    expert_TK, num_experts, roles, spec = CASES[name]
    inputs = make_inputs(expert_TK, num_experts, roles)
    dy = random_like(inputs[0])
    y, (dx, dp, *d_weights, d_lora) = reference(inputs, np.asarray(dy, np.float64), spec.activation)
    if not spec.base_grad:
        d_weights = [np.zeros_like(grad) for grad in d_weights]
    expected = jax.tree.leaves((y, (dx, dp, *d_weights, d_lora)))
    for got, wanted in zip(jax.tree.leaves(ragged(inputs, dy, spec)), expected, strict=True):
        assert relative_error(got, wanted) <= 1e-5


def test_slots_of_other_devices_and_padding():
    """They give nothing and get nothing, whatever a kernel leaves in their rows."""
    expert_TK = choose(70, 2, 4)
    expert_TK[5] = 4
    expert_TK[40:60] = (4, -1)
    expert_TK[7, 1] = expert_TK[9, 0] = 4
    inputs = make_inputs(expert_TK, 4, ("gate", "up", "down"))
    dy = random_like(inputs[0])
    expected = reference(inputs, np.asarray(dy, np.float64), "silu")
    clean = ragged(inputs, dy, TRAINED)
    for got, wanted in zip(jax.tree.leaves(clean), jax.tree.leaves(expected), strict=True):
        assert relative_error(got, wanted) <= 1e-5


def test_undefined_rows_do_not_leak(monkeypatch):
    expert_TK = choose(70, 2, 4)
    expert_TK[40:60] = (4, -1)
    inputs = make_inputs(expert_TK, 4, ("gate", "up", "down"))
    dy, real = random_like(inputs[0]), jax.lax.ragged_dot

    def leaves_nan(rows, weights, sizes, **options):
        is_tail = (jnp.arange(len(rows)) >= jnp.sum(sizes))[:, None]
        return spoil(real(rows, weights, sizes, **options), is_tail)

    @jax.custom_vjp
    def spoil(out, is_tail):
        return jnp.where(is_tail, jnp.nan, out)

    # A kernel's own backward products leave such rows, too: the cotangent of the rows' side.
    spoil.defvjp(
        lambda out, is_tail: (jnp.where(is_tail, jnp.nan, out), is_tail),
        lambda is_tail, cotangent: (cotangent, None),
    )
    expected = ragged(inputs, dy, TRAINED)
    monkeypatch.setattr(ragged_lib.lax, "ragged_dot", leaves_nan)
    got = value_and_pull.__wrapped__(inputs, dy, TRAINED, "ragged")
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert relative_error(one, other) <= 1e-6


def test_inactive_ranks_and_growth():
    """Ranks with B = 0 have zero gradients behind a closed gate; opening it changes no output."""
    inputs = make_inputs(choose(50, 2, 7), 7, ("gate_up", "down"))
    dy = random_like(inputs[0])
    y, (*_, d_lora) = ragged(inputs, dy, SPEC)
    for role, factors in inputs[-1].items():
        inactive_ER = np.asarray(factors.gate_ER) == 0
        assert inactive_ER.any()
        assert not any(np.asarray(grad)[inactive_ER].any() for grad in d_lora[role])
        assert np.asarray(d_lora[role].gate_ER)[~inactive_ER].all()
    grown = {
        role: factors._replace(gate_ER=jnp.ones_like(factors.gate_ER))
        for role, factors in inputs[-1].items()
    }
    np.testing.assert_array_equal(y, ragged((*inputs[:-1], grown), dy, SPEC)[0])


def test_dropout_draws_what_the_block_backend_draws():
    spec = SPEC._replace(dropout=0.25)
    inputs = make_inputs(choose(45, 2, 5), 5)
    dy, dropout = random_like(inputs[0]), Dropout(jax.random.key(3), 11 + 2 * jnp.arange(45))
    block = value_and_pull(inputs, dy, spec, "block", dropout)
    got = ragged(inputs, dy, spec, dropout)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(block), strict=True):
        assert relative_error(one, other) <= 1e-5
    assert relative_error(ragged(inputs, dy, SPEC)[0], block[0]) > 0.01


def test_bfloat16_is_as_good_as_a_plain_dense_computation():
    inputs = list(make_inputs(choose(96, 1, 2), 2, width=32, hidden=48, ranks=4))
    for index in (0, 3, 4):
        inputs[index] = inputs[index].astype(jnp.bfloat16)
    dy = random_like(inputs[0])
    y, (dx, dp, _, _, d_lora) = reference(inputs, np.asarray(dy, np.float64), "silu")
    expected = jax.tree.leaves((y, dx, dp, d_lora))

    def errors(y, grads):
        dx, dp, _, _, d_lora = grads
        pairs = zip(jax.tree.leaves((y, dx, dp, d_lora)), expected, strict=True)
        return [np.linalg.norm(np.asarray(g, np.float64) - e) / np.linalg.norm(e) for g, e in pairs]

    def plain(x_TD, expert_TK, *rest):
        y_TD, pull = jax.vjp(lambda x_TD, *rest: plain_dense(x_TD, expert_TK, *rest), x_TD, *rest)
        return y_TD, pull(dy)

    bound = errors(*jax.jit(plain)(*inputs))
    got = errors(*ragged(tuple(inputs), dy, SPEC))
    assert got[0] > 1e-4  # it is bfloat16
    assert all(g <= 1.5 * b for g, b in zip(got, bound, strict=True)), (got, bound)


def test_a_frozen_base_gets_no_weight_gradient():
    inputs = make_inputs(choose(20, 2, 4), 4, ("up", "down"))
    counts = []
    for spec in (SPEC, TRAINED):
        text = str(
            jax.make_jaxpr(
                lambda *args, spec=spec: value_and_pull.__wrapped__(*args, spec, "ragged")
            )(inputs, inputs[0])
        )
        counts.append(text.count("ragged_dot_general["))
    assert counts[1] - counts[0] == 2  # gate_up and down
