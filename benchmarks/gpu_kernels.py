"""Checks the grouped kernels that training uses on Hopper, for `gpu.py`, and times the experts of a
layer with them and with every expert on every token.

`right` compares products and both gradients with float64, expert by expert, for groups with any
borders: empty ones, single rows, full and partial tiles, nearly all rows in one group. On a CPU the
kernels run in jax's interpreter.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
from gpu_setting import Setting, attempt, rate_shares
from timing import median_seconds

from drlora_jax.ops.experts import mosaic
from drlora_jax.ops.experts.api import expert_mlp
from drlora_jax.ops.experts.backends import Call, cannot
from drlora_jax.ops.experts.shared import ExpertSpec, RoleLora

ROUNDING = 0.006  # of products of bfloat16 numbers
AGREEMENT = 0.02  # of a layer's results in bfloat16 by two ways
GROUPS = {
    "aligned": (128, 256, 0, 384, 128, 128),
    "unaligned": (37, 99, 120, 1, 513, 200),
    "single rows": (1, 63, 1, 64, 127, 1),
    "empty": (0, 0, 700, 0, 7, 0),
    "skewed": (3, 1001, 0, 1, 5, 2),
}
ROWS, WIDTHS = 1024, (256, 128)
TINY_GROUPS = {"unaligned": (37, 0, 20), "skewed": (1, 100, 3)}
TINY_ROWS, TINY_WIDTHS = 128, (64, 64)


def kernels(setting: Setting, case: str):
    """Measures `right` or `layer`."""
    yield from {"right": right, "layer": layer}[case](setting)


def right(setting: Setting):
    """Yields a row for each kind of groups and layout of weights."""
    groups, rows, widths = (
        (TINY_GROUPS, TINY_ROWS, TINY_WIDTHS) if setting.tiny else (GROUPS, ROWS, WIDTHS)
    )
    for name, sizes in groups.items():
        for is_transposed in (False, True):
            row = {"backend": "mosaic", "groups": name, "transposed": is_transposed}
            if reason := _why_not(widths):
                yield row | {"skipped": reason}
                continue
            measure = functools.partial(_errors, sizes, rows, widths, is_transposed)
            yield attempt(row, measure)


def _why_not(widths: tuple[int, ...]) -> str | None:
    device = jax.devices()[0]
    if device.platform != "cpu":
        return cannot("mosaic", Call(device.platform, jnp.bfloat16, widths, device))
    if mosaic.jax_version() < mosaic.OLDEST_JAX:
        return f"no interpreter in jax {jax.__version__}"
    return None


def _interpreted_on_cpu():
    if jax.default_backend() != "cpu":
        return contextlib.nullcontext()
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu.force_gpu_interpret_mode()


def _errors(sizes, rows: int, widths: tuple[int, int], is_transposed: bool) -> dict:
    """Returns ||error|| / ||float64|| for the product and its row gradient, and for the weight
    gradient.
    """
    draw, size_E = np.random.default_rng(0), np.array(sizes, np.int32)
    sides = widths[::-1] if is_transposed else widths
    shapes = ((rows, widths[0]), (len(sizes), *sides), (rows, widths[1]))
    x_PI, weights, dy_PO = (jnp.asarray(draw.normal(size=size), jnp.bfloat16) for size in shapes)
    taken = int(size_E.sum())
    dy_PO = dy_PO * (jnp.arange(rows) < taken)[:, None].astype(dy_PO.dtype)

    @jax.jit
    def all_of(x_PI, weights, dy_PO):
        def product(x_PI, weights):
            return mosaic.product(x_PI, weights, jnp.asarray(size_E), is_transposed)

        out, pull = jax.vjp(product, x_PI, weights)
        return out, *pull(dy_PO)

    with _interpreted_on_cpu():
        got = [np.asarray(array, np.float64) for array in all_of(x_PI, weights, dy_PO)]
    exact = [np.asarray(array, np.float64) for array in (x_PI, weights, dy_PO)]
    wanted = _in_f64(*exact, size_E, is_transposed)
    found = {
        "product": _error(got[0][:taken], wanted[0][:taken]),
        "rows_gradient": _error(got[1][:taken], wanted[1][:taken]),
        "weights_gradient": max(map(_error, got[2], wanted[2])),
    }
    if not max(found.values()) <= ROUNDING:
        found["error"] = f"more than rounding ({ROUNDING}) from float64"
    return found


def _in_f64(x_PI, weights, dy_PO, size_E, is_transposed: bool):
    out, dx_PI, d_weights, start = np.zeros(dy_PO.shape), np.zeros(x_PI.shape), [], 0
    for weights_e, size in zip(weights, size_E, strict=True):
        own = slice(start, start + size)
        matrix_IO = weights_e.T if is_transposed else weights_e
        out[own], dx_PI[own] = x_PI[own] @ matrix_IO, dy_PO[own] @ matrix_IO.T
        d_matrix_IO = x_PI[own].T @ dy_PO[own]
        d_weights.append(d_matrix_IO.T if is_transposed else d_matrix_IO)
        start += size
    return out, dx_PI, np.stack(d_weights)


def _error(got, wanted) -> float:
    return float(np.linalg.norm(got - wanted) / (np.linalg.norm(wanted) or 1.0))


# -------------------------------------------------------------------------------------------- layer


def layer(setting: Setting):
    """Yields rows about one layer's experts of the OLMoE shape with LoRA matrices of 32 ranks on up
    and down, forward and backward.
    """
    sizes = (96, 2, 4, 64, 64, 4) if setting.tiny else (16384, 8, 64, 2048, 1024, 32)
    device, exact = jax.devices()[0], {}
    call = Call(device.platform, setting.dtype, sizes[3:5], device)
    for routing in ("uniform", "skewed"):
        for backend in ("mosaic", "dense", "tokamax"):
            row = {"backend": backend, "routing": routing, "tokens": sizes[0]}
            if reason := cannot(backend, call):
                yield row | {"skipped": reason}
                continue
            run = functools.partial(_measure_layer, setting, sizes, routing, backend, exact)
            yield attempt(row, run)


def _measure_layer(setting, sizes, routing: str, backend: str, found_first: dict) -> dict:
    tokens, per_token, experts, width, hidden, _ = sizes
    inputs, dy_TD = _layer_inputs(setting, sizes, routing)

    @jax.jit
    def both(inputs, dy_TD):
        x_TD, expert_TK, weight_TK, w_gate_up_EDF, w_down_EFD, lora = inputs

        def run(x_TD, weight_TK, lora):
            arrays = (x_TD, expert_TK, weight_TK, w_gate_up_EDF, w_down_EFD, lora)
            return expert_mlp(*arrays, ExpertSpec(scale=2.0), backend=backend)

        y_TD, pull = jax.vjp(run, x_TD, weight_TK, lora)
        return y_TD, pull(dy_TD)

    got = jax.tree.leaves(both(inputs, dy_TD))
    seconds = median_seconds(both, inputs, dy_TD, repeats=setting.repeats)
    # Forward and the rows' gradients of three matrices of every slot.
    operations = 2 * 2 * tokens * per_token * 3 * width * hidden
    found = {"ms": 1e3 * seconds} | rate_shares(setting, operations / seconds)
    first = found_first.setdefault(routing, got)
    if first is got:
        return found
    apart = [
        float(jnp.linalg.norm((one - other).astype(jnp.float32)) / jnp.linalg.norm(other))
        for one, other in zip(first, (leaf.astype(jnp.float32) for leaf in got), strict=True)
    ]
    found["first_way_apart"] = max(apart)
    if not found["first_way_apart"] <= AGREEMENT:
        found["error"] = f"the ways are more than {AGREEMENT} apart"
    return found


def _layer_inputs(setting: Setting, sizes, routing: str):
    tokens, per_token, experts, width, hidden, ranks = sizes
    keys = iter(jax.random.split(jax.random.key(0), 9))

    def normal(*shape, dtype=setting.dtype):
        return jax.random.normal(next(keys), shape, dtype) * shape[-2] ** -0.5

    logits_E = jnp.where(jnp.arange(experts) % 8 == 0, 3.0, 0.0) * (routing == "skewed")
    noise_TE = jax.random.gumbel(next(keys), (tokens, experts))
    weight_TK, expert_TK = jax.lax.top_k(logits_E[None] + noise_TE, per_token)
    gate_ER = jnp.ones((experts, ranks), jnp.float32)
    lora = {
        role: RoleLora(
            normal(experts, ranks, d_in, dtype="float32"),
            normal(experts, ranks, d_out, dtype="float32"),
            gate_ER,
        )
        for role, d_in, d_out in (("up", width, hidden), ("down", hidden, width))
    }
    x_TD = jax.random.normal(next(keys), (tokens, width), setting.dtype)
    weights = (normal(experts, width, 2 * hidden), normal(experts, hidden, width))
    inputs = (x_TD, expert_TK, jax.nn.softmax(weight_TK, axis=1), *weights, lora)
    return inputs, jnp.ones_like(x_TD) * (jnp.arange(width) % 3 - 1).astype(x_TD.dtype)[None]
