"""DR-LoRA: statistics, saliency and growth against NumPy, and what must hold for any saliency."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drlora_jax.allocation import CapacityShapes, CapacityState, masks_from_ranks
from drlora_jax.allocation.dr_lora import saliency
from drlora_jax.allocation.growth import Stats, grow
from drlora_jax.allocation.measurements import ELEMENTWISE
from drlora_jax.errors import UserError
from tests.support.dr_lora import (
    RANKS_LE,
    SHAPES,
    make_policy,
    make_stats,
    make_steps,
    measured,
    run_accumulate,
    stated_saliency,
)

# -------------------------------------------------------------------------------------- accumulate


def stated_statistics(steps, *, frequency, importance, frequency_decay, importance_decay):
    """The definition, expert by expert."""
    f = np.zeros(SHAPES[::2])
    i, n = np.zeros(SHAPES), np.zeros(SHAPES[::2])
    for step in steps:
        total = step["gate_grad"].sum(axis=0)
        measured = {
            "gate_abs": np.abs(total),
            "gate_sq": total**2,
            "elementwise_product": step["elementwise"],
        }[importance]
        for layer, expert in np.ndindex(*f.shape):
            share = step[frequency][:, layer, expert].sum() / step["tokens"].sum()
            f[layer, expert] *= frequency_decay
            f[layer, expert] += (1 - frequency_decay) * share
            if step["count"][:, layer, expert].sum() > 0:
                i[layer, :, expert] *= importance_decay
                i[layer, :, expert] += (1 - importance_decay) * measured[layer, :, expert]
                n[layer, expert] += 1
    return f, i, n


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"frequency": "count"},
        {"importance": "gate_sq", "frequency_decay": 0.0},
        {"importance": "elementwise_product", "importance_decay": 0.0},
    ],
)
def test_accumulate(options):
    steps = list(make_steps())
    options = {
        "frequency": "weight",
        "importance": "gate_abs",
        "frequency_decay": 0.9,
        "importance_decay": 0.7,
    } | options
    policy = make_policy(**options)
    got = run_accumulate(policy, steps)
    is_asked_for = options["importance"] == "elementwise_product"
    assert policy.measures == ((ELEMENTWISE,) if is_asked_for else ())
    for value, expected in zip(got, stated_statistics(steps, **options), strict=True):
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-7)
    assert not np.any(got.importance_LPER[:, :, 0]) and not np.any(got.updates_LE[:, 0])


def test_sign_is_dropped_after_the_sum_over_micro_batches():
    """Gate gradients add up like any gradient: how a batch is cut does not matter."""
    steps = list(make_steps(steps=3))
    merged = [
        {
            name: value if name == "elementwise" else value.sum(axis=0)[None]
            for name, value in s.items()
        }
        for s in steps
    ]
    whole, cut = run_accumulate(make_policy(), merged), run_accumulate(make_policy(), steps)
    for one, other in zip(whole, cut, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)


def test_accumulate_as_released():
    """Decayed sum of counts; two EMA updates a micro-batch in which the expert got tokens."""
    steps = list(make_steps())
    got = run_accumulate(make_policy(released=True), steps)
    f, i = np.zeros(SHAPES[::2]), np.zeros(SHAPES)
    for step in steps:
        f = 0.9 * f + step["count"].sum(axis=0)
        for gradient, count in zip(step["gate_grad"], step["count"], strict=True):
            for layer, expert in np.argwhere(count > 0):
                for _ in range(2):
                    new = 0.2 * np.abs(gradient[layer, :, expert])
                    i[layer, :, expert] = 0.8 * i[layer, :, expert] + new
    np.testing.assert_allclose(got.frequency_LE, f, rtol=1e-5)
    np.testing.assert_allclose(got.importance_LPER, i, rtol=1e-5, atol=1e-7)


def test_no_tokens_at_all_is_not_nan():
    step = {name: 0 * value for name, value in next(make_steps()).items()}
    assert not any(np.any(value) for value in run_accumulate(make_policy(), [step]))


# ---------------------------------------------------------------------------------------- saliency


def test_saliency():
    updates = np.array([[1, 2, 3, 0, 30], [2, 2, 1, 5, 5]])
    stats = make_stats(1, RANKS_LE, updates=updates)
    _, _, event = make_policy().update(CapacityState(RANKS_LE), stats, 10)
    expected = stated_saliency(stats, RANKS_LE, gamma=1.2, decay=0.8)
    np.testing.assert_allclose(event.saliency_LE, expected, rtol=1e-5)
    assert event.saliency_LE[0, 3] == 0  # no update since the reset: nothing is known of it


def test_saliency_as_released():
    """Not de-biased, and with the absolute floor: tiny importances count for almost nothing."""
    policy = make_policy(released=True)
    for scale in (1.0, 1e-9):
        stats = make_stats(1, RANKS_LE, scale)
        _, _, event = policy.update(CapacityState(RANKS_LE), stats, 10)
        expected = stated_saliency(stats, RANKS_LE, gamma=1.2, decay=None, floor=1e-6)
        np.testing.assert_allclose(event.saliency_LE, expected, rtol=1e-5)


def test_saliency_does_not_depend_on_the_size_of_the_importances():
    """No absolute floor: importances of 1e-15 rank the experts as those of 1 do. As released, they
    leave little more than the frequency.
    """
    large, small = make_stats(2), make_stats(2, scale=1e-15)
    state = CapacityState(np.full(SHAPES[::2], 2, np.int32))
    grown = [make_policy().update(state, stats, 10) for stats in (large, small)]
    np.testing.assert_array_equal(grown[0][0].ranks_LE, grown[1][0].ranks_LE)
    np.testing.assert_allclose(grown[0][2].saliency_LE, grown[1][2].saliency_LE, rtol=1e-5)
    _, _, released = make_policy(released=True).update(state, small, 10)
    order = np.argsort(released.saliency_LE, axis=1)
    np.testing.assert_array_equal(order, np.argsort(small.frequency_LE, axis=1))
    assert not np.array_equal(order, np.argsort(grown[1][2].saliency_LE, axis=1))


def test_rarely_updated_experts_are_not_scored_lower():
    """The same gradient once or nine times since the reset gives the same importance."""
    policy = make_policy(frequency="count")
    stats = policy.init_stats()
    for index in range(9):
        count_MLE = np.ones((1, *SHAPES[::2]))
        count_MLE[..., 1] = index == 4
        step = {"gate_grad": np.ones((1, *SHAPES)), "elementwise": np.zeros(SHAPES)}
        step |= {"count": count_MLE, "weight": count_MLE, "tokens": np.ones(1)}
        stats = policy.accumulate(stats, measured(step))
    equal = stats._replace(frequency_LE=jnp.ones(SHAPES[::2]))
    mask = jnp.arange(SHAPES.max_rank) < 2
    equal = equal._replace(importance_LPER=equal.importance_LPER * mask[None, None, None])
    state = CapacityState(np.full(SHAPES[::2], 2, np.int32))
    _, _, event = policy.update(state, equal, 10)
    np.testing.assert_allclose(event.saliency_LE, event.saliency_LE[0, 0], rtol=1e-5)


@pytest.mark.parametrize("score", ["frequency", "importance", "random"])
def test_ablations(score):
    state = CapacityState(RANKS_LE)
    chosen = dict(kind="random") if score == "random" else dict(saliency=score)
    policy = make_policy(**chosen)
    one, other = make_stats(1, RANKS_LE), make_stats(2, RANKS_LE)
    same_f = other._replace(frequency_LE=one.frequency_LE)
    same_g = other._replace(importance_LPER=one.importance_LPER)

    def scores(stats, policy=policy, step=10):
        return policy.update(state, stats, step)[2].saliency_LE

    assert np.array_equal(scores(one), scores(same_f)) == (score != "importance")
    assert np.array_equal(scores(one), scores(same_g)) == (score != "frequency")
    assert np.array_equal(scores(one), scores(other)) == (score == "random")
    if score == "random":
        assert not np.array_equal(scores(one), scores(one, step=20))
        assert not np.array_equal(scores(one), scores(one, make_policy(**chosen, seed=1)))
        return
    expected = one.frequency_LE
    if score == "importance":
        expected = one.importance_LPER.sum(axis=-1).mean(axis=1) / np.maximum(RANKS_LE, 1)
    expected = expected / (RANKS_LE + 1.0) ** 1.2
    got, expected = (x / x.sum(axis=1, keepdims=True) for x in (scores(one), expected))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_reset_after_growth():
    """Importance starts anew when anything grew, the frequency goes on."""
    state, stats = CapacityState(np.full(SHAPES[::2], 2, np.int32)), make_stats()
    new_state, new_stats, _ = make_policy().update(state, stats, 10)
    assert not np.any(new_stats.importance_LPER) and not np.any(new_stats.updates_LE)
    np.testing.assert_array_equal(new_stats.frequency_LE, stats.frequency_LE)
    assert (state.ranks_LE == 2).all() and np.any(
        stats.importance_LPER
    )  # arguments stay as they are
    full = CapacityState(np.full(SHAPES[::2], 4, np.int32))
    same_state, same_stats, _ = make_policy().update(full, stats, 10)
    np.testing.assert_array_equal(same_state.ranks_LE, 4)
    for one, other in zip(same_stats, stats, strict=True):
        np.testing.assert_array_equal(one, other)


# ---------------------------------------------------------------------------------- greedy growth


def grow_some(ranks, scores, quota=5, target=99, cap=3, max_rank=8, **options):
    ranks, scores = np.array(ranks, np.int32), np.array(scores, np.float32)
    limits = {"quota": quota, "target": target, "cap": cap, "max_rank": max_rank}
    return grow(ranks, scores, **limits, **options).tolist()


def test_grow():
    assert grow_some([1, 1, 1], [0.1, 0.3, 0.2]) == [1, 4, 3]  # the best its cap, the next the rest
    assert grow_some([1, 7, 1], [0.1, 0.3, 0.2]) == [2, 8, 4]  # no more than max_rank
    assert grow_some([1, 1, 1], [0.1, 0.3, 0.2], target=5) == [1, 3, 1]  # no more than the budget
    assert grow_some([1, 1, 1], [0.1, 0.3, 0.2], target=3) == [1, 1, 1]
    assert grow_some([1, 1, 1], [0.1, 0.3, 0.2], quota=99) == [4, 4, 4]
    assert grow_some([1, 1, 1], [0.5, 0.5, 0.5]) == [4, 3, 1]  # ties by expert index
    assert grow_some([8, 8, 8], [0.1, 0.3, 0.2]) == [8, 8, 8]


def test_grow_in_slots():
    """As released: the way to the target counts every projection, what is handed out does not."""
    assert grow_some([1, 1], [2, 1], quota=5, target=14, slots_per_rank=2) == [4, 3]
    assert grow_some([1, 1], [2, 1], quota=9, target=6, slots_per_rank=2) == [3, 1]
    assert grow_some([3, 3], [2, 1], quota=5, target=12, slots_per_rank=2) == [3, 3]


@pytest.mark.parametrize("bad", [np.nan, 0.0, 0.25])
def test_saliency_that_says_nothing(bad):
    assert grow_some([1, 1, 1], [bad] * 3) == [4, 3, 1]


def test_nan_never_wins_and_infinity_does():
    assert grow_some([1, 1, 1], [np.nan, 0.0, -1.0]) == [1, 4, 3]
    assert grow_some([1, 1, 1], [0.5, np.inf, -np.inf], quota=3) == [1, 4, 1]


def test_layers_without_a_signal_have_equal_shares():
    zero, ranks = np.zeros((2, 4)), np.ones((2, 4))
    zero[1] = [0, 3, 1, 0]
    got = saliency(np.ones((2, 4)), zero, ranks, 1.0)
    np.testing.assert_allclose(got, [[1 / 32] * 4, [0, 3 / 32, 1 / 32, 0]])
    poisoned = np.array([[1.0, np.nan, 2.0, 3.0]])
    assert np.all(np.isfinite(saliency(np.ones((1, 4)), poisoned, np.ones((1, 4)), 1.0)))


# -------------------------------------------------------------------------------------- properties


def adversary(kind, rng, ranks_E, max_rank, protected):
    """Scores of one layer that make an event hard: noise, ties, nothing, or free ranks kept in few
    experts, which then can not take them fast enough.
    """
    experts = len(ranks_E)
    if kind == "random":
        return rng.random(experts)
    if kind == "ties":
        return rng.integers(0, 2, experts).astype(float)
    if kind == "nothing":
        return np.full(experts, rng.choice([0.0, np.nan]))
    if kind == "same":
        return np.arange(experts, 0, -1.0)
    # Everything goes to the unprotected experts, to those with the most free ranks first.
    return 1.0 + (max_rank - ranks_E) - 1000.0 * (np.arange(experts) < protected)


SCHEDULES = st.fixed_dictionaries(
    {
        "experts": st.integers(1, 9),
        "r_init": st.integers(0, 3),
        "growth": st.integers(0, 6),
        "room": st.integers(0, 4),
        "total_steps": st.integers(3, 40),
        "interval": st.integers(1, 6),
        "p_grow": st.floats(0.05, 1.0),
        "warmup_ratio": st.floats(0.0, 0.5),
    }
)
KINDS = st.sampled_from(["random", "ties", "nothing", "same", "protect", "protect"])


@settings(max_examples=400, deadline=None)
@given(schedule=SCHEDULES, kinds=st.lists(KINDS, min_size=2, max_size=2), data=st.data())
def test_budget_is_exact_whatever_the_saliency(schedule, kinds, data):
    """An accepted schedule reaches its budget exactly and is never above it; ranks only grow."""
    experts, r_init = schedule.pop("experts"), schedule.pop("r_init")
    r_target = r_init + schedule.pop("growth")
    r_max = max(1, r_target + schedule.pop("room"))
    shapes = CapacityShapes(layers=2, projections=1, experts=experts, max_rank=r_max)
    chosen = {"gamma": 0.0, "saliency": "frequency"}  # saliency is then the frequency
    try:
        policy = make_policy(shapes, r_init=r_init, r_target=r_target, **schedule, **chosen)
    except UserError:
        return
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    protected = data.draw(st.integers(1, experts))
    state = policy.init()
    empty = Stats(*(np.asarray(value) for value in policy.init_stats()))
    for step in range(1, schedule["total_steps"] + 1):
        if not policy.is_event(step):
            continue
        scores = [
            adversary(kind, rng, ranks_E, r_max, protected)
            for kind, ranks_E in zip(kinds, state.ranks_LE, strict=True)
        ]
        # Shares need a positive sum; the order is what matters.
        scores_LE = np.array([values - min(0.0, np.nanmin(values, initial=0)) for values in scores])
        before = state.ranks_LE
        state, _, _ = policy.update(state, empty._replace(frequency_LE=scores_LE), step)
        assert (state.ranks_LE >= before).all() and (state.ranks_LE <= r_max).all()
        assert (state.ranks_LE.sum(axis=1) <= policy.budget).all()
    assert state.ranks_LE.sum(axis=1).tolist() == [policy.budget] * 2
    assert policy.budget == experts * r_target


def test_budget_that_only_some_orders_reach_is_refused():
    """Four experts from rank 0 to 2, one rank an expert and two ranks an event, four events: after
    the orders (0, 1), (0, 2), (1, 2) the last expert has two ranks to go and may take one.
    """
    ranks = np.zeros(4, np.int32)
    for first, second in ((0, 1), (0, 2), (1, 2), (3, 0)):
        scores = np.zeros(4)
        scores[[first, second]] = 2, 1
        ranks = grow(ranks, scores, quota=2, target=8, cap=1, max_rank=2)
    assert ranks.tolist() == [2, 2, 2, 1]
    shapes = CapacityShapes(1, 1, 4, 2)
    options = {"r_init": 0, "r_target": 2, "interval": 1, "warmup_ratio": 0.0, "p_grow": 0.5}
    with pytest.raises(UserError, match="budget cannot be reached: 4 events of 2 ranks, at most 1"):
        make_policy(shapes, total_steps=5, **options)


@settings(max_examples=150, deadline=None)
@given(
    ranks=st.lists(st.integers(0, 6), min_size=1, max_size=9),
    seed=st.integers(0, 999),
    quota=st.integers(0, 20),
    cap=st.integers(1, 4),
)
def test_experts_are_treated_alike(ranks, seed, quota, cap):
    """With distinct scores a permutation of the experts permutes the result."""
    rng = np.random.default_rng(seed)
    ranks, order = np.array(ranks, np.int32), rng.permutation(len(ranks))
    scores = rng.permutation(len(ranks)).astype(float)
    limits = {"quota": quota, "target": 40, "cap": cap, "max_rank": 6}
    got = grow(ranks, scores, **limits)
    np.testing.assert_array_equal(grow(ranks[order], scores[order], **limits), got[order])
    # Nobody got anything while a better expert could still have taken more.
    gain = got - ranks
    can_take_more = gain < np.minimum(cap, 6 - ranks)
    for expert in np.flatnonzero(gain):
        assert not can_take_more[scores > scores[expert]].any()


@given(st.lists(st.integers(0, 5), min_size=1, max_size=7))
def test_masks_from_ranks(ranks):
    masks = masks_from_ranks(np.array([ranks], np.int32), 5)
    assert masks.dtype == np.float32 and masks.shape == (1, len(ranks), 5)
    for mask, rank in zip(masks[0], ranks, strict=True):
        assert mask.tolist() == [1.0] * rank + [0.0] * (5 - rank)
