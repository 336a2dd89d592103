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

BACKENDS = ("native", "block", "dense")
REPEATING = ("native", "block")  # the dense one leaves it to jax
SCALE = 2.0


# ------------------------------------------------------------------------------------- reference


def _silu(x):
    sigmoid = 1 / (1 + np.exp(-x))
    return x * sigmoid, sigmoid * (1 + x * (1 - sigmoid))


def _gelu_tanh(x):
    inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    tanh = np.tanh(inner)
    slope = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)
    return 0.5 * x * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * slope


ACTIVATION_AND_SLOPE = {"silu": _silu, "gelu_tanh": _gelu_tanh}


def _part(role, hidden):
    """Which columns of [gate | up] a role writes."""
    return {
        "gate": slice(0, hidden),
        "up": slice(hidden, None),
        "gate_up": slice(0, None),
    }[role]


def reference(inputs, dy, activation):
    """(y, gradients of everything) of sum(y * dy), one token and one of its experts at a time."""
    x, expert, p, w_gate_up, w_down, lora = jax.tree.map(
        lambda v: np.asarray(v, np.float64), inputs
    )
    hidden, y = w_down.shape[1], np.zeros_like(x)
    dx, dp, d_gate_up, d_down = map(np.zeros_like, (x, p, w_gate_up, w_down))
    d_lora = {role: [np.zeros_like(v) for v in factors] for role, factors in lora.items()}

    def pull_low_rank(role, e, inputs, cotangent):
        """Adds the factors' gradients and returns the input's."""
        a, b, gate = (value[e] for value in lora[role])
        z, back = a @ inputs, SCALE * (b @ cotangent)
        d_a, d_b, d_gate = d_lora[role]
        d_a[e] += np.outer(back * gate, inputs)
        d_b[e] += SCALE * np.outer(gate * z, cotangent)
        d_gate[e] += back * z
        return (back * gate) @ a

    for t, k in np.ndindex(*p.shape):
        e = int(expert[t, k])
        if not 0 <= e < len(w_down):
            continue
        gate_up = x[t] @ w_gate_up[e]
        for role in lora:
            if role != "down":
                a, b, gate = (value[e] for value in lora[role])
                gate_up[_part(role, hidden)] += SCALE * (gate * (a @ x[t])) @ b
        act, slope = ACTIVATION_AND_SLOPE[activation](gate_up[:hidden])
        up = gate_up[hidden:]
        h = p[t, k] * act * up
        y[t] += h @ w_down[e]
        dh = w_down[e] @ dy[t]
        if "down" in lora:
            a, b, gate = (value[e] for value in lora["down"])
            y[t] += SCALE * (gate * (a @ h)) @ b
            dh = dh + pull_low_rank("down", e, h, dy[t])
        d_down[e] += np.outer(h, dy[t])
        dp[t, k] = np.sum(dh * act * up)
        d_out = p[t, k] * np.concatenate([dh * up * slope, dh * act])
        d_gate_up[e] += np.outer(x[t], d_out)
        dx[t] += w_gate_up[e] @ d_out
        for role in lora:
            if role != "down":
                dx[t] += pull_low_rank(role, e, x[t], d_out[_part(role, hidden)])
    d_lora = {role: RoleLora(*grads) for role, grads in d_lora.items()}
    return y, (dx, dp, d_gate_up, d_down, d_lora)


# ---------------------------------------------------------------------------------------- inputs


def make_inputs(
    expert_TK, num_experts, roles=("up", "down"), *, width=8, hidden=6, ranks=4, seed=0
):
    """Random inputs; experts have 0, 1, ..., `ranks` active ranks, inactive rows of B are 0."""
    rng = np.random.default_rng(seed)

    def normal(*shape, fan_in=1):
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(fan_in), jnp.float32)

    shapes = {"gate": (width, hidden), "up": (width, hidden)}
    shapes |= {"gate_up": (width, 2 * hidden), "down": (hidden, width)}
    active_E = np.arange(num_experts)[::-1] % (ranks + 1)
    mask_ER = jnp.asarray(np.arange(ranks) < active_E[:, None], jnp.float32)
    lora = {}
    for role in roles:
        d_in, d_out = shapes[role]
        b_ERF = normal(num_experts, ranks, d_out, fan_in=ranks) * mask_ER[..., None]
        lora[role] = RoleLora(normal(num_experts, ranks, d_in, fan_in=d_in), b_ERF, mask_ER)
    weight_TK = jnp.asarray(rng.uniform(0.1, 1.0, expert_TK.shape), jnp.float32)
    x_TD = normal(len(expert_TK), width)
    w_gate_up_EDF = normal(num_experts, width, 2 * hidden, fan_in=width)
    w_down_EFD = normal(num_experts, hidden, width, fan_in=hidden)
    return x_TD, jnp.asarray(expert_TK), weight_TK, w_gate_up_EDF, w_down_EFD, lora


def choose(tokens, per_token, experts, seed=1):
    """Distinct experts for every token, i32 [T, K]."""
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(experts)[:per_token] for _ in range(tokens)]
    return np.array(rows, np.int32)


def groups(*sizes):
    """One expert a token, groups of the given sizes in a mixed order."""
    experts = np.repeat(np.arange(len(sizes)), sizes)
    return np.random.default_rng(2).permutation(experts)[:, None].astype(np.int32)


@functools.partial(jax.jit, static_argnames=("spec", "backend"))
def value_and_pull(inputs, dy, spec, backend, dropout=None):
    """(y, gradients) in the order of `reference`."""
    x_TD, expert_TK, *rest = inputs

    if backend == "native":  # it has no gradients of the base; what has none is zero
        spec = spec._replace(base_grad=False)

    def run(x_TD, *rest):
        return expert_mlp(x_TD, expert_TK, *rest, spec, dropout=dropout, backend=backend)

    y_TD, pull = jax.vjp(run, x_TD, *rest)
    return y_TD, pull(dy)


def random_like(x_TD, seed=3):
    return jnp.asarray(np.random.default_rng(seed).normal(size=x_TD.shape), x_TD.dtype)


def relative_error(got, expected):
    expected = np.asarray(expected, np.float64)
    largest = np.abs(expected).max() if expected.size else 0.0
    return np.abs(np.asarray(got, np.float64) - expected).max() / (largest or 1.0)


# ----------------------------------------------------------------------------- values, gradients

SPEC = ExpertSpec(scale=SCALE)
TRAINED = SPEC._replace(base_grad=True)
CASES = {
    "one_expert": (choose(7, 1, 1), 1, ("up", "down"), TRAINED),
    "one_expert_blocks_of_128": (choose(531, 1, 1), 1, ("down",), SPEC),
    "all_to_one_of_5": (np.full((131, 1), 3, np.int32), 5, ("gate", "up", "down"), TRAINED),
    # Experts 1 and 3 get nothing.
    "empty_groups": (np.array([0, 2, 4], np.int32)[choose(33, 2, 3)], 5, ("up", "down"), SPEC),
    "at_block_borders": (groups(64, 128, 63, 65, 1, 0), 6, ("gate", "up", "down"), TRAINED),
    # Blocks of 128 and of 64 rows; the last is of either.
    "two_block_sizes": (groups(300, 129, 40, 190, 0), 5, ("gate_up", "down"), TRAINED),
    "60_experts_gelu": (
        choose(37, 4, 60),
        60,
        ("gate_up", "down"),
        SPEC._replace(activation="gelu_tanh"),
    ),
    "128_experts_top_8": (choose(41, 8, 128), 128, ("up", "down"), SPEC),
    "no_lora_gelu": (choose(29, 2, 5), 5, (), TRAINED._replace(activation="gelu_tanh")),
}


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


def plain_dense(x_TD, expert_TK, weight_TK, w_gate_up_EDF, w_down_EFD, lora):
    """The textbook computation in the dtype of the tokens, every expert on every token."""
    y_TD = jnp.zeros_like(x_TD)
    for e in range(len(w_down_EFD)):
        gate_TF, up_TF = jnp.split(x_TD @ w_gate_up_EDF[e], 2, axis=-1)

        def delta(role, inputs, e=e):
            a_RD, b_RF, gate_R = (value[e].astype(x_TD.dtype) for value in lora[role])
            return SCALE * ((inputs @ a_RD.T) * gate_R[None]) @ b_RF

        h_TF = jax.nn.silu(gate_TF) * (up_TF + delta("up", x_TD))
        out_TD = h_TF @ w_down_EFD[e] + delta("down", h_TF)
        p_T = jnp.sum(weight_TK * (expert_TK == e), axis=1).astype(x_TD.dtype)
        y_TD = y_TD + p_T[:, None] * out_TD
    return y_TD


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
