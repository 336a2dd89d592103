"""Growth schedules of DR-LoRA: whole runs with recorded statistics, and what is refused."""

import numpy as np
import pytest

from drlora_jax.allocation import CapacityShapes
from drlora_jax.allocation.growth import Stats
from drlora_jax.errors import UserError
from tests.support import policies

PUBLISHED = {
    "total_steps": 3750,
    "r_init": 8,
    "r_target": 16,
    "interval": 200,
    "p_grow": 0.1,
    "gamma": 1.2,
    "frequency_decay": 0.9,
    "importance_decay": 0.9,
    "warmup_ratio": 0.03,
}
R_MAX, PROJECTIONS = 32, 2


def make_policy(experts=16, **options):
    shapes = CapacityShapes(layers=1, projections=PROJECTIONS, experts=experts, max_rank=R_MAX)
    return policies.make_policy("dr_lora", shapes, **(PUBLISHED | options))


def record(experts):
    """Step -> (f, g) of every expert: skewed, and drifting over the run."""
    base = np.random.default_rng(0).lognormal(sigma=0.8, size=(2, experts))

    def recorded(step):
        drift = np.random.default_rng([0, step]).lognormal(sigma=0.4, size=(2, experts))
        return base * drift

    return recorded


def replay(policy, experts, recorded):
    """The policy's own functions, event by event: [(step, ranks after it)]."""
    state, events = policy.init(), []
    for step in range(1, PUBLISHED["total_steps"] + 1):
        if not policy.is_event(step):
            continue
        f, g = recorded(step)
        mask_ER = np.arange(R_MAX) < state.ranks_LE[0][:, None]
        importance_LPER = np.tile(g[:, None] * mask_ER, (1, PROJECTIONS, 1, 1))
        stats = Stats(f[None], importance_LPER, np.ones((1, experts)))
        state, _, _ = policy.update(state, stats, step)
        events.append((step, state.ranks_LE[0].copy()))
    return events


def simulate(experts, recorded, released, gamma=1.2):
    """The same from its description, in plain Python; one layer."""
    ranks, events = [8] * experts, []
    first = int(0.03 * 3750)
    count = (3750 - 200 - first) // 200 + 1
    slots = PROJECTIONS if released else 1
    quota = -(-experts * slots * (16 - 8) // count)
    floor = 1e-6 if released else 0.0
    for step in range(first, 3750 - 200 + 1, 200):
        f, g = recorded(step)
        if not released:
            assert f.sum() > 0 and g.sum() > 0
        scale = 1.0 if not released else max(g.sum(), 1e-6)
        score = [
            (f[i] / f.sum() + floor) * (g[i] / scale + floor) / (ranks[i] + 1) ** gamma
            for i in range(experts)
        ]
        left = min(quota, experts * slots * 16 - slots * sum(ranks))
        for i in sorted(range(experts), key=lambda i: -score[i]):
            gain = max(0, min(3, 32 - ranks[i], left))
            ranks[i], left = ranks[i] + gain, left - gain
        events.append((step, list(ranks)))
    return events


# experts, released -> events that grew, step of the last of them, final mean rank
TABLE = [
    (64, True, 9, 1712, 16.02),
    (16, True, 9, 1712, 16.44),
    (64, False, 18, 3512, 16.00),
    (16, False, 16, 3112, 16.00),
]


@pytest.mark.parametrize(("experts", "released", "used", "last", "mean"), TABLE)
def test_published_schedules(experts, released, used, last, mean):
    recorded = record(experts)
    events = replay(make_policy(experts, released=released), experts, recorded)
    assert [step for step, _ in events] == list(range(112, 3513, 200))
    totals = [experts * 8, *(int(ranks.sum()) for _, ranks in events)]
    grown = [step for (step, _), a, b in zip(events, totals, totals[1:], strict=False) if b > a]
    assert (len(grown), grown[-1]) == (used, last)
    assert round(totals[-1] / experts, 2) == mean
    assert events[-1][1].max() <= 32 and events[-1][1].min() >= 8
    assert len(set(events[-1][1].tolist())) > 3  # experts really differ
    for (step, ranks), (expected_step, expected) in zip(
        events, simulate(experts, recorded, released), strict=True
    ):
        assert step == expected_step
        assert ranks.tolist() == expected, step


def test_last_event():
    """An earlier last event makes the quota larger, so that the budget is met by then."""
    events = replay(make_policy(last_event=1800), 16, record(16))
    assert [step for step, _ in events] == list(range(112, 1713, 200))
    assert events[-1][1].sum() == 16 * 16
    late = make_policy(last_event=3750)
    assert late.is_event(3712) and not late.is_event(3912)


def test_warm_up_shorter_than_a_step():
    policy = make_policy(total_steps=10, interval=3, warmup_ratio=0.0, p_grow=1.0)
    assert [step for step in range(12) if policy.is_event(step)] == [1, 4, 7]


def test_nothing_to_grow_needs_no_event():
    policy = make_policy(r_init=16, total_steps=10)
    assert not any(policy.is_event(step) for step in range(11))
    assert policy.budget == 256 and policy.init().ranks_LE.tolist() == [[16] * 16]


def test_description():
    consistent, released = make_policy(64), make_policy(64, released=True)
    assert "18 events at steps 112 to 3512, 29 ranks per layer per event" in consistent.describe
    assert "57 slots" in released.describe and "above the budget" in released.describe
    assert "rank 8 to a mean of 16 (at most 32)" in consistent.describe
    assert "at most 3 per expert" in consistent.describe


REFUSED = {
    "last_event_in_warm_up": (
        {"last_event": 100},
        "no growth event fits: warm-up ends at step 112, the last event may be at step 100 of 3750",
    ),
    "too_few_events": (
        {"interval": 1500},
        "budget cannot be reached: 2 events of 64 ranks, at most 3 per expert per event and 32 per "
        "expert in total.* 224 of 256 ranks",
    ),
    "released": (
        {"released": True, "interval": 1700},
        "budget cannot be reached: 2 events of 128 ranks, at most 3 per expert.* 224 of 256 ranks",
    ),
    "last_event_after_the_run": ({"last_event": 5000}, r"last_event \(5000\).*\(3750\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    options, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        make_policy(**options)
