"""Expert MLPs: a NumPy float64 loop with a backward pass of its own, inputs, and cases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from drlora_jax.ops.experts.api import expert_mlp
from drlora_jax.ops.experts.shared import ExpertSpec, RoleLora

SCALE = 2.0


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
