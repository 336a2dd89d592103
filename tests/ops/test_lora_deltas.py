"""What experts add to a product, side by side and sorted, against a formula in which every slot has
its own copy of the factors.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drlora_jax.ops import lora_deltas
from drlora_jax.ops.experts.shared import RoleLora
from drlora_jax.ops.lora_deltas import SideBySide, Sorted, deltas_of, sort_slots

WIDTH, FEATURES, RANK, SCALE = 6, 5, 3, 1.5


def choices(tokens, experts, slots, how):
    rng = np.random.default_rng(0)
    if how == "one":
        return np.full((tokens, slots), experts - 1)
    used = experts if how == "all" else max(slots, experts // 2)
    return np.stack([rng.permutation(used)[:slots] for _ in range(tokens)])


CASES = [  # tokens, experts, slots, how, size of a block
    (1, 1, 1, "all", 4),
    (7, 5, 2, "all", 4),
    (13, 12, 3, "some", 2),
    (9, 4, 1, "one", 2),
    (16, 8, 8, "all", 64),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("way", ["side by side", "sorted"])
def test_both_ways_are_the_formula(case, way):
    tokens, experts, slots, how, block = case
    expert_TK = choices(tokens, experts, slots, how)
    keys = iter(jax.random.split(jax.random.key(0), 9))

    def draw(*shape):
        return jax.random.normal(next(keys), shape)

    arguments = (
        draw(tokens, WIDTH),
        draw(slots, tokens, WIDTH),
        draw(tokens, slots),
        RoleLora(
            draw(experts, RANK, WIDTH),
            draw(experts, RANK, FEATURES),
            (draw(experts, RANK) > -0.5).astype(jnp.float32),
        ),
    )
    pull = draw(slots, tokens, FEATURES), draw(tokens, FEATURES)

    def gathered(x_TD, rows_KTD, weight_TK, factors):
        """Every slot with its own copy of its expert's factors."""
        a_TKRD, b_TKRF = factors.a_ERD[expert_TK], factors.b_ERF[expert_TK]
        gate_TKR = SCALE * factors.gate_ER[expert_TK]
        of_tokens = jnp.einsum("TD,TKRD,TKR,TKRF->KTF", x_TD, a_TKRD, gate_TKR, b_TKRF)
        products = "KTD,TK,TKRD,TKR,TKRF->TF"
        return of_tokens, jnp.einsum(products, rows_KTD, weight_TK, a_TKRD, gate_TKR, b_TKRF)

    def ours(x_TD, rows_KTD, weight_TK, factors):
        if way == "sorted":
            deltas = Sorted(sort_slots(jnp.asarray(expert_TK), experts, block), SCALE)
        else:
            deltas = SideBySide(jnp.asarray(expert_TK), experts, SCALE)
        of_slots = deltas.of_slots(list(rows_KTD), weight_TK, factors)
        return jnp.stack(deltas.of_tokens(x_TD, factors)), of_slots

    values, back = jax.vjp(jax.jit(ours), *arguments)
    expected, expected_back = jax.vjp(jax.jit(gathered), *arguments)
    for got, want in ((values, expected), (back(pull), expected_back(pull))):
        jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5), got, want)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_slot_has_one_place_in_a_block_of_its_expert(case):
    tokens, experts, slots, how, block = case
    expert_TK = choices(tokens, experts, slots, how)
    found = jax.jit(lambda chosen: sort_slots(chosen, experts, block))(jnp.asarray(expert_TK))
    taken = np.asarray(found.is_taken_NS)
    slot_NS = np.asarray(found.slot_NS)
    assert sorted(slot_NS[taken]) == list(range(tokens * slots))
    owner_NS = np.broadcast_to(np.asarray(found.expert_N)[:, None], taken.shape)
    np.testing.assert_array_equal(owner_NS[taken], expert_TK.reshape(-1)[slot_NS[taken]])
    np.testing.assert_array_equal(slot_NS.reshape(-1)[found.place_P], np.arange(tokens * slots))


def test_the_way_depends_on_experts_and_ranks(monkeypatch):
    def way(experts, ranks):
        factors = RoleLora(None, None, jnp.ones((experts, ranks)))
        return type(deltas_of(jnp.zeros((4, 2), int), factors, 1.0))

    assert way(8, 16) is SideBySide
    assert way(64, 64) is Sorted
    monkeypatch.setattr(lora_deltas, "SORTED_FROM", 0)
    assert way(8, 16) is Sorted
