"""Expert MLPs of every CPU backend against a NumPy float64 loop with a backward pass of its own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

from drlora_jax.ops.experts import block
from drlora_jax.ops.experts.api import expert_mlp
from drlora_jax.ops.experts.shared import Dropout, ExpertSpec, RoleLora
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

BACKENDS = ("native", "block", "dense")
REPEATING = ("native", "block")  # the dense one leaves it to jax


# ------------------------------------------------------------------------------------- reference


# ---------------------------------------------------------------------------------------- inputs


# ----------------------------------------------------------------------------- values, gradients


@pytest.mark.parametrize("repeats", (False, True))
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, repeats):
    """With pre-activations that the backward pass finds, and that it computes again."""
    expert_TK, num_experts, roles, spec = CASES[name]
    spec = spec._replace(repeats=repeats)
    inputs = make_inputs(expert_TK, num_experts, roles)
    dy = random_like(inputs[0])
    y, grads = reference(inputs, np.asarray(dy, np.float64), spec.activation)
    for backend in REPEATING if repeats else BACKENDS:
        got_y, got_grads = value_and_pull(inputs, dy, spec, backend)
        assert relative_error(got_y, y) <= 1e-5, backend
        dx, dp, *d_weights, d_lora = grads
        got_dx, got_dp, *got_d_weights, got_d_lora = got_grads
        assert relative_error(got_dx, dx) <= 1e-5, backend
        assert relative_error(got_dp, dp) <= 1e-5, backend
        for got, expected in zip(got_d_weights, d_weights, strict=True):
            if spec.base_grad and backend != "native":
                assert relative_error(got, expected) <= 1e-5, backend
            else:
                assert not np.any(got), backend
        for role, factors in d_lora.items():
            for got, expected in zip(got_d_lora[role], factors, strict=True):
                assert relative_error(got, expected) <= 1e-5, (backend, role)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_computed_elsewhere(backend):
    """Slots outside [0, E) give nothing and get nothing; the other slots do not notice."""
    expert_TK = choose(70, 2, 4)
    expert_TK[5] = 4  # whole tokens
    expert_TK[40:60] = (4, -1)
    expert_TK[7, 1] = expert_TK[9, 0] = 4  # one of two experts
    inputs = make_inputs(expert_TK, 4, ("gate", "up", "down"))
    dy = random_like(inputs[0])
    y, grads = reference(inputs, np.asarray(dy, np.float64), "silu")
    got_y, got_grads = value_and_pull(inputs, dy, TRAINED, backend)
    if backend == "native":
        grads = (*grads[:2], *map(np.zeros_like, grads[2:4]), grads[4])
    for got, expected in zip(
        jax.tree.leaves((got_y, got_grads)), jax.tree.leaves((y, grads)), strict=True
    ):
        assert relative_error(got, expected) <= 1e-5
    is_elsewhere_TK = (expert_TK < 0) | (expert_TK >= 4)
    nowhere_T = is_elsewhere_TK.all(axis=1)
    assert nowhere_T.sum() == 21
    assert not np.any(np.asarray(got_y)[nowhere_T])
    assert not np.any(np.asarray(got_grads[0])[nowhere_T])
    assert not np.any(np.asarray(got_grads[1])[is_elsewhere_TK])


@pytest.mark.parametrize("backend", REPEATING)
def test_no_slot_computed_here(backend):
    inputs = make_inputs(np.full((9, 2), 3, np.int32), 3)
    y, grads = value_and_pull(inputs, random_like(inputs[0]), TRAINED, backend)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves((y, grads)))


# ------------------------------------------------------------------------------------- rank gates


@pytest.mark.parametrize("backend", BACKENDS)
def test_rank_gates(backend):
    """Inactive ranks have exactly zero gradients; of active ones the gate's cotangent is sum A dA
    and sum B dB.
    """
    inputs = make_inputs(choose(50, 2, 7), 7, ("gate", "up", "down"))
    _, (*_, d_lora) = value_and_pull(inputs, random_like(inputs[0]), SPEC, backend)
    for role, factors in inputs[-1].items():
        inactive_ER = np.asarray(factors.gate_ER) == 0
        assert inactive_ER.any() and not inactive_ER.all()
        d_a, d_b, d_gate = (np.asarray(value) for value in d_lora[role])
        assert not d_a[inactive_ER].any()
        assert not d_b[inactive_ER].any()
        assert not d_gate[inactive_ER].any()
        assert d_gate[~inactive_ER].all()
        for factor, grad in ((factors.a_ERD, d_a), (factors.b_ERF, d_b)):
            total_ER = np.sum(np.asarray(factor, np.float64) * grad, axis=-1)
            assert relative_error(d_gate, total_ER) <= 1e-5


@pytest.mark.parametrize("ranks", (16, 17, 40))
@pytest.mark.parametrize("backend", REPEATING)
def test_pages_of_ranks(backend, ranks):
    """Whole pages, an overlapping last page; experts whose open ranks end in every page."""
    inputs = list(make_inputs(choose(90, 2, 7), 7, ("gate_up", "down"), ranks=ranks))
    open_E = np.array([0, 1, 15, 16, 17, 33, 40]).clip(max=ranks)
    mask_ER = jnp.asarray(np.arange(ranks) < open_E[:, None], jnp.float32)
    inputs[-1] = {
        role: RoleLora(factors.a_ERD, random_like(factors.b_ERF) * mask_ER[..., None], mask_ER)
        for role, factors in inputs[-1].items()
    }
    dy = random_like(inputs[0])
    expected = reference(inputs, np.asarray(dy, np.float64), "silu")
    if backend == "native":
        y, (dx, dp, *d_weights, d_lora) = expected
        expected = (y, (dx, dp, *map(np.zeros_like, d_weights), d_lora))
    got = value_and_pull(tuple(inputs), dy, TRAINED, backend)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert relative_error(one, other) <= 1e-5


@pytest.mark.parametrize("backend", REPEATING)
def test_work_follows_the_last_open_gate(backend):
    """Factors behind it are not read: even NaN there changes nothing."""
    inputs = make_inputs(choose(50, 2, 3), 3, ("up", "down"), ranks=48)
    mask_ER = jnp.broadcast_to(jnp.arange(48) < 16, (3, 48)).astype(jnp.float32)
    dy, results = random_like(inputs[0]), []
    for filler in (0.0, jnp.nan):
        lora = {
            role: RoleLora(
                jnp.where(mask_ER[..., None] > 0, factors.a_ERD, filler),
                jnp.where(mask_ER[..., None] > 0, factors.b_ERF, filler),
                mask_ER,
            )
            for role, factors in inputs[-1].items()
        }
        results.append(value_and_pull((*inputs[:-1], lora), dy, SPEC, backend))
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_growth_keeps_outputs_bit_equal():
    """A rank that opens with B = 0 changes nothing."""
    inputs = make_inputs(choose(50, 2, 7), 7, ("gate", "up", "down"))
    grown = {
        role: factors._replace(gate_ER=jnp.ones_like(factors.gate_ER))
        for role, factors in inputs[-1].items()
    }
    dy = random_like(inputs[0])
    for backend in BACKENDS:
        before, _ = value_and_pull(inputs, dy, SPEC, backend)
        after, _ = value_and_pull((*inputs[:-1], grown), dy, SPEC, backend)
        np.testing.assert_array_equal(before, after)


# ---------------------------------------------------------------------------------------- bfloat16


def products(jaxpr) -> list[tuple[str, ...]]:
    """Kinds of numbers that a traced program multiplies, in loops and custom gradients, too."""
    found = []
    for each in jaxpr.eqns:
        if each.primitive.name == "dot_general":
            found.append(
                tuple(str(operand.aval.dtype) for operand in (*each.invars, *each.outvars))
            )
        for value in jax.tree.leaves(list(each.params.values())):
            if inner := getattr(value, "jaxpr", None) or (
                value if hasattr(value, "eqns") else None
            ):
                found += products(inner)
    return found


@pytest.mark.parametrize("spec", (SPEC, TRAINED))
def test_gradients_multiply_what_the_tokens_are(spec):
    """No product of the dense backend or of its gradients is in float32 where tokens are not."""
    inputs = list(make_inputs(choose(24, 2, 4), 4, ("gate", "up", "down")))
    for index in (0, 3, 4):
        inputs[index] = inputs[index].astype(jnp.bfloat16)
    run = functools.partial(value_and_pull.__wrapped__, spec=spec, backend="dense")
    found = products(jax.make_jaxpr(run)(tuple(inputs), inputs[0]).jaxpr)
    assert len(found) > 16 and set(found) == {("bfloat16",) * 3}


def test_bfloat16_is_as_good_as_a_plain_dense_computation():
    inputs = list(make_inputs(choose(96, 1, 2), 2, width=32, hidden=48, ranks=4))
    for index in (0, 3, 4):
        inputs[index] = inputs[index].astype(jnp.bfloat16)
    dy = random_like(inputs[0])
    y, (dx, dp, _, _, d_lora) = reference(inputs, np.asarray(dy, np.float64), "silu")
    expected = jax.tree.leaves((y, dx, dp, d_lora))

    def errors(y, grads):
        dx, dp, _, _, d_lora = grads
        got = jax.tree.leaves((y, dx, dp, d_lora))
        return [
            np.linalg.norm(np.asarray(g, np.float64) - e) / np.linalg.norm(e)
            for g, e in zip(got, expected, strict=True)
        ]

    @jax.jit
    def plain_and_pull(x_TD, expert_TK, *rest):
        y_TD, pull = jax.vjp(lambda x_TD, *rest: plain_dense(x_TD, expert_TK, *rest), x_TD, *rest)
        return y_TD, pull(dy)

    plain = errors(*plain_and_pull(*inputs))
    for backend in ("block", "dense"):
        got = errors(*value_and_pull(tuple(inputs), dy, SPEC, backend))
        assert all(g <= 1.5 * p for g, p in zip(got, plain, strict=True)), (got, plain)


# ----------------------------------------------------------------------------------------- dropout


def make_transparent(tokens, width, rate):
    """A model whose output is drop(h) of a constant h: identity factors on `down`, no base."""
    eye_ERF = jnp.eye(width)[None]
    inputs = (
        jnp.ones((tokens, width)) / width,
        jnp.zeros((tokens, 1), jnp.int32),
        jnp.ones((tokens, 1)),
        jnp.ones((1, width, 2 * width)),
        jnp.zeros((1, width, width)),
        {"down": RoleLora(eye_ERF, eye_ERF, jnp.ones((1, width)))},
    )
    return inputs, ExpertSpec(dropout=rate), float(jax.nn.silu(1.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_rate_and_scale(backend):
    rate, tokens, width = 0.3, 300, 16
    inputs, spec, full = make_transparent(tokens, width, rate)

    @jax.jit
    def run(key):
        dropout = None if key is None else Dropout(key)
        return expert_mlp(*inputs, spec, dropout=dropout, backend=backend)

    y_TD = np.asarray(run(jax.random.key(7)))
    is_kept = y_TD != 0
    np.testing.assert_allclose(y_TD[is_kept], full / (1 - rate), rtol=1e-5)
    deviation = np.sqrt(rate * (1 - rate) / y_TD.size)
    assert abs((~is_kept).mean() - rate) < 4 * deviation
    # Every column and every token has its own draws.
    assert np.all(np.abs((~is_kept).mean(axis=0) - rate) < 5 * deviation * np.sqrt(width))
    assert len({row.tobytes() for row in is_kept}) > 0.95 * tokens
    np.testing.assert_allclose(run(None), full, rtol=1e-5)


def test_dropout_is_the_same_in_all_backends():
    spec = SPEC._replace(dropout=0.25)
    inputs = make_inputs(choose(45, 2, 5), 5)
    dy, dropout = random_like(inputs[0]), Dropout(jax.random.key(3), 11 + 2 * jnp.arange(45))
    dense = value_and_pull(inputs, dy, spec, "dense", dropout)
    for backend in REPEATING:
        got = value_and_pull(inputs, dy, spec, backend, dropout)
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(dense), strict=True):
            assert relative_error(one, other) <= 1e-5
    other = Dropout(jax.random.key(4), dropout.first_slot_T)
    other_key, _ = value_and_pull(inputs, dy, spec, "dense", other)
    assert relative_error(other_key, dense[0]) > 0.01


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_does_not_depend_on_where_a_token_lies(backend):
    """Slots are numbered in the whole batch, so a shard sees the draws that the batch sees."""
    spec = SPEC._replace(dropout=0.25)
    inputs = make_inputs(choose(24, 2, 5), 5)
    key, rest = jax.random.key(3), inputs[3:]

    @jax.jit
    def run(x_TD, expert_TK, weight_TK, first_token):
        dropout = Dropout(key, 2 * (first_token + jnp.arange(len(x_TD))))
        per_token = (x_TD, expert_TK, weight_TK)
        return expert_mlp(*per_token, *rest, spec, dropout=dropout, backend=backend)

    whole = run(*inputs[:3], 0)
    for first in (16, 0, 8):
        shard = [value[first : first + 8] for value in inputs[:3]]
        assert relative_error(run(*shard, first), whole[first : first + 8]) <= 1e-6
        assert relative_error(run(*shard, first + 50), whole[first : first + 8]) > 0.01


# ------------------------------------------------------------------------------------------- shape


def test_block_backend_has_no_ragged_dot_and_no_dense_expansion():
    """`lax.ragged_dot` is a dense expansion on CPU; so is any array over tokens and experts."""
    tokens, experts = 200, 9
    inputs = make_inputs(choose(tokens, 2, experts), experts)
    text = str(
        jax.make_jaxpr(lambda *args: value_and_pull.__wrapped__(*args, TRAINED, "block"))(
            inputs, inputs[0]
        )
    )
    assert "ragged_dot" not in text
    assert f"[{experts},{tokens}," not in text and f"[{tokens},{experts}," not in text


@pytest.mark.parametrize("backend", REPEATING)
def test_what_a_policy_may_keep(backend, capsys):
    """The pre-activations of all slots have a name, unless the backward pass repeats them."""
    inputs = make_inputs(choose(40, 2, 3), 3)

    def saved(spec, **options):
        def run(x_TD):
            return jnp.sum(expert_mlp(x_TD, *inputs[1:], spec, backend=backend, **options))

        policy = jax.checkpoint_policies.save_only_these_names("moe_gu")
        print_saved_residuals(jax.checkpoint(run, policy=policy), inputs[0])
        lines = capsys.readouterr().out.splitlines()
        return [line.split()[0] for line in lines if "moe_gu" in line]

    tail = block.block_rows(40 * 2, 3)[1] if backend == "block" else 0
    rows = 40 * 2 + tail
    assert saved(SPEC) == [f"f32[{rows},{inputs[3].shape[2]}]"]
    assert saved(SPEC._replace(repeats=True)) == []
    assert saved(SPEC, keeps_hidden=False) == []


def test_auto_is_native_on_cpu_or_block():
    inputs = make_inputs(choose(9, 2, 3), 3)
    for spec, backend in ((SPEC, "native"), (TRAINED, "block")):
        auto = expert_mlp(*inputs, spec)
        np.testing.assert_array_equal(auto, expert_mlp(*inputs, spec, backend=backend))
    with pytest.raises(ValueError, match="native: its kernels have no gradients of the base"):
        expert_mlp(*inputs, TRAINED, backend="native")


@pytest.mark.parametrize("num_experts", [7, 2**28])  # packed into one number, and as pairs
def test_slots_are_sorted_by_expert_and_number(num_experts):
    expert_P = np.random.default_rng(0).integers(0, 8, 1000).astype(np.int32)
    order_P = block._order(jnp.asarray(expert_P), num_experts)
    assert order_P.dtype == jnp.int32
    assert order_P.tolist() == sorted(range(1000), key=lambda slot: (expert_P[slot], slot))
