"""Measures grouped products on one device, for `gpu.py`: those of experts, and thin ones of LoRA.

Every product is compiled ahead of time, and arrays in the compiled text that hold every row once
per expert are listed as `dense_expansions`: a product that has them is not a grouped one. It is
timed with few rows only.
"""

import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from expansions import dense_expansions
from gpu_setting import Setting, attempt, rate_shares
from timing import median_seconds

from drlora_jax.ops.experts import mosaic
from drlora_jax.ops.experts import tokamax as tokamax_lib
from drlora_jax.ops.experts.backends import Call, cannot
from drlora_jax.ops.experts.ragged import ragged_dot

RANKS = {"olmoe": (16, 32, 64), "qwen3": (32,), "tiny": (16, 32, 64)}
CHECKED_ROWS = 16
RESULT = re.compile(r"= [a-z]+\d+\[([\d,]+)\]\S* (?:copy|transpose)\(")


class Shape(NamedTuple):
    """Of a grouped product."""

    rows: int
    experts: int
    width: int
    hidden: int

    @property
    def few_rows(self) -> int:
        """Of this shape where a dense expansion can be paid for."""
        return max(self.rows * 3 // 256, self.experts)


SHAPES = {"olmoe": Shape(131072, 64, 2048, 1024), "qwen3": Shape(131072, 128, 2048, 768)}
TINY_SHAPES = {"tiny": Shape(384, 8, 64, 32)}


class Product(NamedTuple):
    """A way to compute `function(rows, weights_EIO, size_E)`."""

    name: str
    function: Callable
    takes_many_rows: bool = True


def products(dtype, shape: Shape) -> Iterator[Product]:
    """Yields the ways in which a program can compute a grouped product here."""
    device = jax.devices()[0]
    if cannot("mosaic", Call(device.platform, dtype, (shape.width, shape.hidden), device)) is None:
        yield Product("mosaic", mosaic.product)
    yield Product("ragged_dot", ragged_dot, takes_many_rows=device.platform == "tpu")
    if tokamax_lib.is_installed() and jax.default_backend() == "gpu":
        import tokamax

        for implementation in ("mosaic", "triton"):
            product = functools.partial(tokamax.ragged_dot, implementation=implementation)
            yield Product(f"tokamax {implementation}", product)


def grouped(setting: Setting, case: str):
    """Measures products of experts by shape, groups, way and direction."""
    draw = np.random.default_rng(0)
    for name, shape in (TINY_SHAPES if setting.tiny else SHAPES).items():
        skewed_E = draw.multinomial(shape.rows, draw.dirichlet(np.full(shape.experts, 0.3)))
        for product in products(setting.dtype, shape):
            rows = shape.rows if product.takes_many_rows else shape.few_rows
            sizes = {"uniform": np.full(shape.experts, rows // shape.experts)}
            if product.takes_many_rows:
                sizes["skewed"] = skewed_E
            for groups, size_E in sizes.items():
                row = {"shape": name, "groups": groups, "backend": product.name}
                resized = shape._replace(rows=int(size_E.sum()))
                yield from directions(setting, row, product, resized, size_E)


def directions(setting: Setting, row: dict, product: Product, shape: Shape, size_E):
    """Yields a row each for the product, its input gradient and its weight gradient."""
    rows, experts, width, hidden = shape
    row = row | {"rows": rows, "experts": experts, "in": width, "out": hidden}
    keys = jax.random.split(jax.random.key(0), 3)
    x_PD = jax.random.normal(keys[0], (rows, width), setting.dtype)
    w_EDF = jax.random.normal(keys[1], (experts, width, hidden), setting.dtype) * width**-0.5
    dy_PF = jax.random.normal(keys[2], (rows, hidden), setting.dtype)
    inputs = (x_PD, w_EDF, jnp.asarray(size_E, jnp.int32), dy_PF)

    def forward(x_PD, w_EDF, size_E, dy_PF):
        return product.function(x_PD, w_EDF, size_E)

    def input_gradient(x_PD, w_EDF, size_E, dy_PF):
        y_PF, pull = jax.vjp(lambda x_PD: product.function(x_PD, w_EDF, size_E), x_PD)
        return pull(dy_PF.astype(y_PF.dtype))[0]

    def weight_gradient(x_PD, w_EDF, size_E, dy_PF):
        y_PF, pull = jax.vjp(lambda w_EDF: product.function(x_PD, w_EDF, size_E), w_EDF)
        return pull(dy_PF.astype(y_PF.dtype))[0]

    for function in (forward, input_gradient, weight_gradient):
        measure = functools.partial(_measure, setting, product, function, shape, inputs)
        yield attempt(row | {"direction": function.__name__}, measure)


def _measure(setting: Setting, product: Product, function, shape: Shape, inputs) -> dict:
    compiled = jax.jit(function).lower(*inputs).compile()
    text, (rows, experts, width, hidden) = compiled.as_text(), shape
    # Ranks of all experts together may be as many as an operand is wide: not an expansion.
    own = ((rows, width), (rows, hidden), (experts, width, hidden))
    expansions = dense_expansions(text, experts=experts, rows=rows, widths=(width, hidden), own=own)
    found = {"dense_expansions": expansions, "weight_copies": _copies(text, inputs[1].size)}
    if expansions and product.takes_many_rows and not setting.tiny:
        return found | {"skipped": "with these rows a dense expansion fills the device"}
    seconds = median_seconds(compiled, *inputs, repeats=setting.repeats)
    x_PD, w_EDF, _, dy_PF = inputs
    moved = sum(array.nbytes for array in (x_PD, w_EDF, dy_PF))
    found |= {"ms": 1e3 * seconds} | rate_shares(setting, 2 * rows * width * hidden / seconds)
    found |= {"gb_s": moved / seconds / 1e9, "of_measured_copy": moved / seconds / setting.copy}
    if function.__name__ == "forward":
        found["error_to_f32"] = _error(compiled(*inputs), *inputs[:3])
    return found


def _copies(text: str, size: int) -> int:
    """Copies and transpositions in a compiled module that are as large as the weights."""
    return sum(math.prod(map(int, match[1].split(","))) == size for match in RESULT.finditer(text))


def _error(y_PF, x_PD, w_EDF, size_E) -> float:
    """Returns ||y - y64|| / ||y64|| over some first and last rows of groups."""
    y_PF, ends_E = np.asarray(y_PF, np.float64), np.cumsum(np.asarray(size_E))
    rows = np.unique(np.concatenate([ends_E - 1, ends_E[:-1], [0]]).clip(0, len(y_PF) - 1))
    rows = rows[np.linspace(0, len(rows) - 1, CHECKED_ROWS).astype(int)]
    owner = np.searchsorted(ends_E, rows, side="right")
    expected = np.stack(
        [
            np.asarray(x_PD[row], np.float64) @ np.asarray(w_EDF[expert], np.float64)
            for row, expert in zip(rows, owner, strict=True)
        ]
    )
    return float(np.linalg.norm(y_PF[rows] - expected) / np.linalg.norm(expected))


# --------------------------------------------------------------------------------------------- thin


def thin(setting: Setting, case: str):
    """Measures products with LoRA matrices and both gradients: into the ranks and out of them.

    As the library computes them here, where that is a grouped product, with ranks of whole tiles;
    else `lax.ragged_dot`. And, `dense`, all experts' factors side by side as one product of all
    tokens, which multiplies each with every expert's ranks.
    """
    for name, shape in (TINY_SHAPES if setting.tiny else SHAPES).items():
        size_E = np.full(shape.experts, shape.rows // shape.experts)
        for rank in RANKS[name]:
            row = {"shape": name, "rank": rank}
            product, *_ = products(setting.dtype, shape)
            wide = -(-rank // mosaic.TILE) * mosaic.TILE
            wide = wide if product.name == "mosaic" else rank
            sides = {"into ranks": (shape.width, wide), "out of ranks": (wide, shape.hidden)}
            for side, (width, hidden) in sides.items():
                each = row | {"backend": product.name, "side": side}
                sized = Shape(shape.rows, shape.experts, width, hidden)
                yield from directions(setting, each, product, sized, size_E)
            each = row | {"backend": "dense", "side": "into ranks"}
            tokens = shape.rows // 8  # slots of a token
            ranks = shape.experts * rank
            yield attempt(
                each | {"rows": tokens, "in": shape.width, "out": ranks},
                functools.partial(_side_by_side, setting, tokens, shape.width, ranks),
            )


def _side_by_side(setting: Setting, tokens: int, width: int, ranks: int) -> dict:
    keys = jax.random.split(jax.random.key(0))
    x_TD = jax.random.normal(keys[0], (tokens, width), setting.dtype)
    a_DR = jax.random.normal(keys[1], (width, ranks), setting.dtype)
    seconds = median_seconds(jax.jit(jnp.matmul), x_TD, a_DR, repeats=setting.repeats)
    return {"ms": 1e3 * seconds} | rate_shares(setting, 2 * tokens * width * ranks / seconds)
