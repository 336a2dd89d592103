"""Experts over a mesh: whatever way tokens travel, the numbers are those of one device."""

import functools

import jax
import numpy as np
import pytest

from drlora_jax.ops import Ops
from drlora_jax.ops.experts.shared import Dropout, ExpertSpec
from drlora_jax.parallel.exchange import choose_exchange
from drlora_jax.parallel.mesh import make_mesh
from drlora_jax.parallel.sharded_ops import sharded_ops
from tests.support.expert_mlps import choose, make_inputs, random_like, relative_error

TOKENS, EXPERTS, DROPOUT = 32, 12, 0.25


def routings():
    """Slots [T, K]: as they come, with padding, which is nobody's; all to two experts, and to one;
    half of the experts idle.
    """
    spread_TK = choose(TOKENS, 2, EXPERTS)
    spread_TK[5:9] = EXPERTS
    two_TK = np.tile(np.array([[7, 3]], np.int32), (TOKENS, 1))
    return {
        "spread": spread_TK,
        "two": two_TK,
        "one": two_TK[:, :1],
        "half": choose(TOKENS, 2, EXPERTS // 2),
    }


@functools.partial(jax.jit, static_argnames="ops")
def value_and_pull(ops, inputs, dy):
    x_TD, expert_TK, weight_TK, gate_up, down, lora = inputs
    spec, key = ExpertSpec(scale=2.0, dropout=DROPOUT), jax.random.key(5)

    def run(x_TD, weight_TK, lora):
        rest = (gate_up, down, lora, spec)
        return ops.expert_mlp(x_TD, expert_TK, weight_TK, *rest, dropout=Dropout(key))

    y, pull = jax.vjp(run, x_TD, weight_TK, lora)
    return y, pull(dy)


@pytest.mark.parametrize("exchange", ["gather", "padded"])
@pytest.mark.parametrize("sizes", [(1, 1, 4, 1), (2, 1, 2, 2)], ids=str)
def test_experts_on_a_mesh_are_those_of_one_device(sizes, exchange):
    ops = sharded_ops(make_mesh(sizes), exchange=exchange)
    for name, expert_TK in routings().items():
        inputs = make_inputs(expert_TK, EXPERTS)
        dy = random_like(inputs[0])
        one, many = (value_and_pull(each, inputs, dy) for each in (Ops(), ops))
        for wanted, got in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
            assert relative_error(got, wanted) <= 1e-5, name


def test_exchange_is_chosen_by_sizes():
    assert choose_exchange("auto", "cpu", 8, 2) == "gather"
    assert choose_exchange("auto", "tpu", 8, 2) == "ragged"  # Mixtral: a token is on 23 % of 8
    assert choose_exchange("auto", "tpu", 8, 8) == "gather"  # OLMoE: on 66 %
    assert choose_exchange("auto", "tpu", 1, 2) == "gather"
    assert choose_exchange("padded", "tpu", 8, 8) == "padded"
