"""Compares the rate of the expert operation on CPU with that of its bare products.

    python benchmarks/expert_rate.py [--rounds 12]

One layer's experts (64 of 256, 8 active, width 512, 2,048 tokens, float32) with LoRA of rank 16 on
gate_up and down, forward, and forward with gradients of tokens and LoRA matrices; with tokens
spread evenly, at random, and so that some experts have many times the tokens of others. In turns
with them run XLA's products of those shapes, each jitted separately: gate_up and down of every
expert for its rows when tokens are spread evenly, and their input gradients. Prints GFLOP/s of
useful work, including LoRA and excluding padding rows, and its share of the bare products' rate.
"""

import argparse
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from timing import in_turns

from drlora_jax.ops.experts.api import expert_mlp
from drlora_jax.ops.experts.shared import ExpertSpec, RoleLora
from drlora_jax.system.host_memory import keep_freed_memory, run_on_calling_thread

TOKENS, EXPERTS, PER_TOKEN, WIDTH, HIDDEN, RANK = 2048, 64, 8, 512, 256, 16
SLOTS = TOKENS * PER_TOKEN
BASE = 2 * SLOTS * 3 * WIDTH * HIDDEN  # floating-point operations of the base, forward
FACTORS = 2 * SLOTS * RANK * (2 * WIDTH + 3 * HIDDEN)
# A frozen base adds its input gradient, as much again; LoRA matrices add their own gradients too.
OPERATIONS = {"forward": BASE + FACTORS, "with gradients": 2 * BASE + 3 * FACTORS}


def normal(draw: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(draw.normal(size=shape) * 0.05, jnp.float32)


def routings(draw: np.random.Generator) -> dict[str, jax.Array]:
    """Returns name -> experts of every token, i32 [TOKENS, PER_TOKEN]."""
    order_TK = np.arange(SLOTS).reshape(TOKENS, PER_TOKEN)
    logits_TE = draw.normal(size=(TOKENS, EXPERTS))
    skewed_TE = logits_TE + draw.normal(size=EXPERTS)
    tops = {"random": logits_TE, "skewed": skewed_TE}
    found = {name: np.argsort(-x_TE, axis=1)[:, :PER_TOKEN] for name, x_TE in tops.items()}
    found = {"even": order_TK % EXPERTS} | found
    return {name: jnp.asarray(expert_TK, jnp.int32) for name, expert_TK in found.items()}


def operations(draw: np.random.Generator) -> dict[tuple[str, str], Callable]:
    """Returns (routing, one of OPERATIONS) -> a call that computes it."""
    base = (normal(draw, EXPERTS, WIDTH, 2 * HIDDEN), normal(draw, EXPERTS, HIDDEN, WIDTH))
    shapes = {"gate_up": (WIDTH, 2 * HIDDEN), "down": (HIDDEN, WIDTH)}
    lora = {
        role: RoleLora(
            normal(draw, EXPERTS, RANK, width_in),
            normal(draw, EXPERTS, RANK, width_out),
            jnp.ones((EXPERTS, RANK)),
        )
        for role, (width_in, width_out) in shapes.items()
    }
    x_TD = normal(draw, TOKENS, WIDTH)
    weight_TK = jnp.asarray(draw.random((TOKENS, PER_TOKEN)), jnp.float32)
    spec = ExpertSpec(scale=2.0)

    @jax.jit
    def forward(expert_TK, base, x_TD, lora):
        return expert_mlp(x_TD, expert_TK, weight_TK, *base, lora, spec)

    @jax.jit
    def with_gradients(expert_TK, base, x_TD, lora):
        y_TD, pull = jax.vjp(partial(forward, expert_TK, base), x_TD, lora)
        return y_TD, pull(y_TD)

    functions = {"forward": forward, "with gradients": with_gradients}
    return {
        (name, what): partial(function, expert_TK, base, x_TD, lora)
        for name, expert_TK in routings(draw).items()
        for what, function in functions.items()
    }


def bare_products(draw: np.random.Generator) -> dict[str, Callable]:
    """Computes the products of all experts one after another: forward, and input gradients."""
    rows = SLOTS // EXPERTS
    inputs = {size: normal(draw, rows, size) for size in (WIDTH, HIDDEN, 2 * HIDDEN)}
    weights = [normal(draw, *size) for size in ((WIDTH, 2 * HIDDEN), (HIDDEN, WIDTH))] * EXPERTS
    forward = jax.jit(jnp.matmul)
    # A gradient's product takes the weights as they lie, the other way around.
    backward = jax.jit(lambda left, right: jnp.einsum("PF,DF->PD", left, right))

    def all_of(product, axis: int):
        for weight in weights:
            jax.block_until_ready(product(inputs[weight.shape[axis]], weight))

    return {"forward": partial(all_of, forward, 0), "gradients": partial(all_of, backward, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    run_on_calling_thread()
    draw = np.random.default_rng(0)
    calls, bare = operations(draw), bare_products(draw)
    keep_freed_memory("cpu")
    seconds = in_turns(calls | bare, args.rounds)
    taken = {key: float(np.median(each)) for key, each in seconds.items()}
    both = taken["forward"] + taken["gradients"]
    rates = {"forward": BASE / taken["forward"], "with gradients": 2 * BASE / both}
    for what, rate in rates.items():
        print(f"bare products, {what}: {rate / 1e9:.0f} GFLOP/s")
    for name, what in calls:
        rate = OPERATIONS[what] / taken[name, what]
        line = f"{name}, {what}: {1e3 * taken[name, what]:.0f} ms, {rate / 1e9:.0f} GFLOP/s"
        print(f"{line}, {rate / rates[what]:.2f} of the bare products'")


if __name__ == "__main__":
    main()
