"""Ranks graded by use: against exact arithmetic, and what must hold for any counts."""

import json
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from policies import make_policy
from test_step import Stepper

from drlora_jax.allocation import CapacityShapes
from drlora_jax.allocation.usage import graded
from drlora_jax.config import AllocationSection
from drlora_jax.errors import UserError
from drlora_jax.training.growth import profile
from drlora_jax.training.state import start

SHAPES = CapacityShapes(layers=2, projections=2, experts=5, max_rank=8)
POWERS = {0.0: np.ones_like, 0.5: np.sqrt, 1.0: np.copy, 2.0: np.square}


def stated_shares(weights, total, least, most):
    """Divides what is left in proportion, and fixes the experts on the side that is further out of
    bounds, until nobody is.
    """
    fixed = {}
    while free := [expert for expert in range(len(weights)) if expert not in fixed]:
        left, weight = total - sum(fixed.values()), sum(weights[expert] for expert in free)
        due = {e: left * weights[e] / weight if weight else Fraction(left, len(free)) for e in free}
        kept = {e: min(max(share, Fraction(least)), Fraction(most)) for e, share in due.items()}
        excess = sum(kept.values()) - left
        fixed |= {e: kept[e] for e in free if excess == 0 or (kept[e] - due[e]) * excess > 0}
    return [fixed[expert] for expert in range(len(weights))]


def stated_ranks(use, total, *, power, least, most):
    weights = [Fraction(float(each)) for each in POWERS[power](use / (use.max() or 1.0))]
    shares = stated_shares(weights, total, least, most)
    ranks = [share.numerator // share.denominator for share in shares]
    order = sorted(range(len(shares)), key=lambda e: (ranks[e] - shares[e], e))
    return [rank + (e in order[: total - sum(ranks)]) for e, rank in enumerate(ranks)]


@settings(max_examples=300, deadline=None)
@given(
    use=st.lists(st.integers(0, 200), min_size=1, max_size=9),
    power=st.sampled_from(list(POWERS)),
    least=st.integers(0, 4),
    above=st.integers(0, 6),
    room=st.integers(0, 8),
)
@example(use=[0, 0, 9], power=0.5, least=1, above=3, room=2)  # the used one is full
@example(use=[0, 0, 0], power=0.5, least=0, above=2, room=2)  # nobody was used
@example(use=[1, 100, 100], power=2.0, least=2, above=0, room=5)  # nothing to share out
def test_ranks_are_those_of_exact_arithmetic(use, power, least, above, room):
    mean = max(least + above, 1)
    bounds = dict(least=min(least, mean), most=mean + room)
    use_E, total = np.array(use, np.float64), mean * len(use)
    got = graded(use_E, total, power=power, **bounds)
    assert got.dtype == np.int32 and got.sum() == total
    assert got.min() >= bounds["least"] and got.max() <= bounds["most"]
    assert (np.diff(got[np.argsort(use_E, kind="stable")]) >= -1).all()  # up to a remainder
    assert got.tolist() == stated_ranks(use_E, total, power=power, **bounds)


def test_ranks_by_hand():
    use_E = np.array([16.0, 4.0, 1.0, 0.0])
    # Shares of 28 by 4 : 2 : 1 : 0.
    assert graded(use_E, 28, power=0.5, least=0, most=28).tolist() == [16, 8, 4, 0]
    # The unused one has 1, and 27 are 15.43, 7.71, 3.86.
    assert graded(use_E, 28, power=0.5, least=1, most=28).tolist() == [15, 8, 4, 1]
    # 12 for the first, 1 for the last, and 15 are 10 and 5.
    assert graded(use_E, 28, power=0.5, least=1, most=12).tolist() == [12, 10, 5, 1]
    assert graded(use_E, 28, power=0.0, least=1, most=12).tolist() == [7, 7, 7, 7]
    # A power without bounds of its own: 3 times r_max, and the rest to the unused one.
    assert graded(use_E, 28, power=1e30, least=0, most=8).tolist() == [8, 7, 7, 6]


def test_a_profile_decides_the_ranks():
    policy = make_policy("usage", SHAPES, r_init=1, r_target=3, power=1.0, profile_rows=5)
    assert policy.profile.rows == 5 and policy.budget == 15
    assert not any(policy.is_event(step) for step in range(100))
    choices_LE = np.array([[6.0, 3.0, 3.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0, 9.0]])
    capacity, event = policy.profile.decide({"choices": choices_LE})
    # 14 besides the unused one's: 5.6 and 2.8 each; 8 for the used one, and 7 for four.
    assert capacity.ranks_LE.tolist() == [[5, 3, 3, 3, 1], [2, 2, 2, 1, 8]]
    np.testing.assert_allclose(event.saliency_LE.sum(axis=1), 1.0, rtol=1e-6)


def test_a_run_has_them_from_its_first_step(tmp_path):
    section = dict(kind="usage", r_init=1, r_target=2, r_max=5, power=2.0, profile_rows=16)
    stepper = Stepper(tmp_path, allocation=section)
    choices_LE = profile(stepper.run, stepper.params, start(stepper.run).state)["choices"]
    expected = [stated_ranks(use_E, 8, power=2.0, least=1, most=5) for use_E in choices_LE]
    assert stepper.position.capacity.ranks_LE.tolist() == expected != [[2] * 4] * 2
    (row,) = map(json.loads, stepper.job.run_dir.ranks_file.read_text().splitlines())
    assert (row["step"], row["ranks"], row["budget"]) == (0, expected, 8)
    state = stepper.position.state
    np.testing.assert_array_equal(np.asarray(state.mask_LER).sum(axis=-1), expected)
    assert np.isfinite(float(stepper.step()["loss"]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(power=-0.5), "allocation.power must be 0 or more, got -0.5"),
        (dict(r_init=20), "usage needs 0 <= r_init <= r_target <= r_max, got 20, 16, 32"),
        (dict(profile_rows=0), "allocation.profile_rows must be greater than 0"),
        (dict(share=0.5), "allocation.share=0.5 is for kind=moe_sieve, got kind=usage"),
    ],
)
def test_what_cannot_be(fields, message):
    with pytest.raises(UserError, match=message):
        AllocationSection(kind="usage", **fields)
