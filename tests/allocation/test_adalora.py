"""AdaLoRA over experts: statistics, budget and pruning against loops, and what a run keeps."""

import fractions

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drlora_jax import train as train_lib
from drlora_jax.allocation import CapacityShapes, CapacityState
from drlora_jax.allocation.adalora import Stats, keep_best
from drlora_jax.allocation.measurements import ELEMENTWISE
from drlora_jax.errors import UserError
from drlora_jax.reporting.progress import describe_ranks
from drlora_jax.runs.checkpoint import Checkpoints
from drlora_jax.training.growth import reordered
from drlora_jax.training.job import prepare
from drlora_jax.training.program import place_mask
from drlora_jax.training.state import restore
from tests.support import policies
from tests.support.dr_lora import make_steps, run_accumulate
from tests.support.stepper import Stepper, expert_leaves
from tests.support.tiny import tiny_config

SHAPES = CapacityShapes(layers=2, projections=3, experts=5, max_rank=6)
DEFAULTS = {
    "total_steps": 100,
    "r_init": 6,
    "r_target": 2,
    "interval": 10,
    "importance_decay": 0.8,
    "uncertainty_decay": 0.7,
    "warmup_ratio": 0.1,
}
EVENTS = {5: 10, 7: 8, 9: 8}  # of the tiny run: ranks of a layer after each, from 16 to 8


def make_policy(**options):
    return policies.make_policy("adalora", SHAPES, **(DEFAULTS | options))


# ---------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("importance", ["gate_abs", "gate_sq", "elementwise_product"])
def test_accumulate(importance):
    steps = list(make_steps())
    policy = make_policy(importance=importance)
    smooth, uncertain = np.zeros(SHAPES), np.zeros(SHAPES)
    for step in steps:
        for at in np.ndindex(*SHAPES):
            gradient = sum(part[at] for part in step["gate_grad"])
            now = {
                "gate_abs": abs(gradient),
                "gate_sq": gradient**2,
                "elementwise_product": step["elementwise"][at],
            }[importance]
            smooth[at] = 0.8 * smooth[at] + 0.2 * now
            uncertain[at] = 0.7 * uncertain[at] + 0.3 * abs(now - smooth[at])
    got = run_accumulate(policy, steps)
    is_asked_for = importance == "elementwise_product"
    assert policy.measures == ((ELEMENTWISE,) if is_asked_for else ())
    np.testing.assert_allclose(got.importance_LPER, smooth, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(got.uncertainty_LPER, uncertain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("seed", range(4))
def test_update_keeps_the_best_ranks_of_every_layer(seed):
    """By sorting lists: ranks, the order of rows, moved statistics and what is recorded."""
    draw = np.random.default_rng(seed)
    ranks_LE = draw.integers(0, 7, SHAPES[::2]).astype(np.int32)
    ranks_LE[:, 0] = 6
    mask_LPER = np.arange(6) < ranks_LE[:, None, :, None]
    drawn = (draw.integers(1, 4, SHAPES) * mask_LPER for _ in range(2))  # small integers: with ties
    stats, policy, step = Stats(*(x.astype(np.float32) for x in drawn)), make_policy(), 40
    new, moved, event = policy.update(CapacityState(ranks_LE), stats, step)
    budget = int(10 + 20 * fractions.Fraction(90 - step, 80) ** 3)
    for layer, ranks_E in enumerate(ranks_LE):
        score = {
            (expert, rank): np.mean(
                stats[0][layer, :, expert, rank] * stats[1][layer, :, expert, rank]
            )
            for expert, count in enumerate(ranks_E)
            for rank in range(count)
        }
        best = sorted(score, key=lambda place: (-score[place], place[1], place[0]))[:budget]
        for expert in range(SHAPES.experts):
            kept = sorted(rank for owner, rank in best if owner == expert)
            assert new.ranks_LE[layer, expert] == len(kept)
            order = event.order_LER[layer, expert].tolist()
            assert order[: len(kept)] == kept and sorted(order) == list(range(6))
            total = sum(score[expert, rank] for rank in kept)
            assert event.saliency_LE[layer, expert] == pytest.approx(total, rel=1e-6)
            for before, after in zip(stats, moved, strict=True):
                assert after.dtype == np.float32
                np.testing.assert_array_equal(
                    after[layer, :, expert, : len(kept)], before[layer, :, expert, kept].T
                )
                assert not after[layer, :, expert, len(kept) :].any()
        assert new.ranks_LE[layer].sum() == min(budget, ranks_E.sum())


def test_without_a_signal_experts_are_cut_alike():
    for nothing in (0.0, np.nan):
        kept_ER = keep_best(np.full((5, 6), nothing), np.full(5, 6), 12)
        assert kept_ER.sum(axis=1).tolist() == [3, 3, 2, 2, 2]
        assert (np.diff(kept_ER.astype(int), axis=1) <= 0).all()  # already a prefix
    one = np.zeros((5, 6))
    one[4, 5], one[2] = 1.0, np.nan
    kept_ER = keep_best(one, np.full(5, 6), 2)
    assert kept_ER[4, 5] and kept_ER[0, 0]


@pytest.mark.parametrize("last_event", [None, 67, 100])
def test_schedule(last_event):
    policy = make_policy(last_event=last_event)
    steps = [step for step in range(101) if policy.is_event(step)]
    end = {None: 90, 67: 60, 100: 100}[last_event]
    assert steps == list(range(20, end + 1, 10)) and policy.last_event == end
    assert policy.budget == 10
    state, stats = policy.init(), jax.device_get(policy.init_stats())
    assert (state.ranks_LE == 6).all()
    for step in steps:
        state, stats, _ = policy.update(state, stats, step)
        left = fractions.Fraction(end - step, end - 10) ** 3
        assert state.ranks_LE.sum(axis=1).tolist() == [int(10 + 20 * left)] * 2
    assert (state.ranks_LE == 2).all()


def test_schedules_that_can_not_be():
    match = "no pruning event fits: warm-up ends at step 10, .* last event may be at step 15 of 100"
    with pytest.raises(UserError, match=match):
        make_policy(last_event=15)
    with pytest.raises(UserError, match="last_event .101. must not be after .* .100."):
        make_policy(last_event=101)
    still = make_policy(r_target=6, last_event=15)  # nothing to prune: plain LoRA
    assert still.last_event == 0 and not any(map(still.is_event, range(101)))


# ------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("adalora")


SECTIONS = {
    "allocation": dict(kind="adalora", r_init=4, r_target=2, interval=2),
    "adapter": dict(dropout=0.0),
    "model": dict(remat="none"),
    "train": dict(weight_decay=0.1, bias_correction="per_rank", sequence_length=32),
}


@pytest.fixture(scope="module")
def pruned(folder):
    """A run over its three events, with the positions around each of them."""
    stepper = Stepper(folder, **SECTIONS)
    run = stepper.run
    inputs = run.abstract_params, run.abstract_state, run.abstract_batch
    # One program, ahead of time: it refuses other shapes, dtypes and shardings.
    step = run.step.lower(*inputs).compile()
    inputs = run.abstract_params, run.abstract_state.lora, run.abstract_state.mask_LER
    lowered = run.eval_step.lower(*inputs, stepper.job.eval_batches[0])
    eval_step = lowered.compile()
    stepper.run = run._replace(step=step, eval_step=eval_step)
    stepper.initial = expert_leaves(stepper.position.state.lora)
    stepper.around = {}
    update = stepper.job.policy.update

    def watched(capacity, stats, at):
        before = jax.tree.map(np.array, stepper.position)
        result = update(capacity, stats, at)
        stepper.around[at] = [before, result[2]]
        return result

    stepper.job = stepper.job._replace(policy=stepper.job.policy._replace(update=watched))
    stepper.run = stepper.run._replace(job=stepper.job)
    while stepper.position.state.step < 12:
        stepper.step()
        at = int(stepper.position.state.step)
        if at in stepper.around:
            stepper.around[at].append(jax.tree.map(np.array, stepper.position))
        if at == 6:
            checkpoints = Checkpoints(stepper.job.run_dir.checkpoints, keep_last=9)
            train_lib.save(stepper.run, checkpoints, stepper.position, 6, None)
            checkpoints.close()
    return stepper


def rows_of(state):
    """Every array [L, E, R, ...] of the expert factors: (what, role, side) -> array."""
    adam = next(part for part in state.opt_state if hasattr(part, "mu"))
    trees = {"lora": state.lora, "mu": adam.mu, "nu": adam.nu, "count": adam.count}
    return {
        (what, *key): x for what, tree in trees.items() for key, x in expert_leaves(tree).items()
    }


def test_the_budget_is_met(pruned):
    assert list(pruned.around) == list(EVENTS)
    for at, (_, _, after) in pruned.around.items():
        assert after.capacity.ranks_LE.sum(axis=1).tolist() == [EVENTS[at]] * 2
    assert np.unique(pruned.position.capacity.ranks_LE).size > 1


def test_kept_rows_move_bit_for_bit_and_pruned_ones_are_as_before_step_1(pruned):
    moved = False
    for before, event, after in pruned.around.values():
        ranks_LE, old = after.capacity.ranks_LE, rows_of(before.state)
        for (what, role, side), new in rows_of(after.state).items():
            for layer, expert in np.ndindex(*ranks_LE.shape):
                rank, order = ranks_LE[layer, expert], event.order_LER[layer, expert]
                expected = old[what, role, side][layer, expert][order]
                moved |= order[:rank].tolist() != list(range(rank))
                first = (
                    pruned.initial[role, side][layer, expert] if what == "lora" else 0 * expected
                )
                expected[rank:] = first[rank:]
                np.testing.assert_array_equal(new[layer, expert], expected)
        np.testing.assert_array_equal(after.state.mask_LER.sum(axis=-1), ranks_LE)
        same = [(part.lora["segment_0"]["layer_0"]["attention"]) for part in (before[0], after[0])]
        jax.tree.map(np.testing.assert_array_equal, *same)
    assert moved  # at least one expert lost a rank that was not its last


def test_inactive_ranks_stay_as_they_were(pruned):
    state = jax.device_get(pruned.position.state)
    is_inactive = state.mask_LER[..., None] == 0
    for (what, *key), value in rows_of(state).items():
        first = pruned.initial[tuple(key)] if what == "lora" else np.zeros_like(value)
        np.testing.assert_array_equal(np.where(is_inactive, value - first, 0), 0)
    for value in state.stats:
        assert not np.where(state.mask_LER[:, None], 0, value).any() and value.any()


def test_pruning_is_masking(pruned):
    """The held-out loss after an event is that of the state before it with the pruned ranks off."""
    batch, *_ = pruned.job.eval_batches
    for before, event, after in pruned.around.values():
        kept = np.zeros_like(before.state.mask_LER)
        np.put_along_axis(kept, event.order_LER, after.state.mask_LER, axis=-1)
        one, two = (
            float(pruned.run.eval_step(pruned.params, lora, mask, batch)[0])
            for lora, mask in ((before.state.lora, kept), (after.state.lora, after.state.mask_LER))
        )
        assert one == pytest.approx(two, rel=1e-6)


@pytest.mark.parametrize("piece", [None, "importance_LPER", "uncertainty_LPER"])
def test_a_resumed_run_is_the_same(pruned, piece):
    """From the checkpoint between the first two events; without a saved average it is another."""
    checkpoints = Checkpoints(pruned.job.run_dir.checkpoints, keep_last=9)
    position, end = restore(pruned.run, checkpoints, 6), pruned.position
    checkpoints.close()
    if piece:
        zero = jnp.zeros_like(getattr(position.state.stats, piece))
        stats = position.state.stats._replace(**{piece: zero})
        position = position._replace(state=position.state._replace(stats=stats))
    pruned.position = position
    try:
        while pruned.position.state.step < 12:
            pruned.step()
        same = jax.tree.map(np.array_equal, jax.device_get(pruned.position), jax.device_get(end))
    finally:
        pruned.position = end
    assert all(jax.tree.leaves(same)) == (piece is None)


def test_rows_move_where_they_lie_on_a_mesh(folder):
    """Random factors and moments on eight devices: the shardings stay, the values are NumPy's."""
    config = tiny_config(folder, "mesh", mesh=dict(data=2, fsdp=2, expert=2), **SECTIONS)
    run = train_lib.build(prepare(config))
    draw, shapes = np.random.default_rng(0), run.abstract_state
    values = jax.tree.map(
        lambda leaf: draw.normal(size=leaf.shape).astype(leaf.dtype),
        (shapes.lora, shapes.opt_state),
    )
    places = jax.tree.map(lambda leaf: leaf.sharding, (shapes.lora, shapes.opt_state))
    order_LER = np.stack([[draw.permutation(4) for _ in range(4)] for _ in range(2)]).astype("i4")
    ranks_LE = draw.integers(0, 5, (2, 4))
    state = shapes._replace(lora=jax.device_put(values, places)[0])
    state = state._replace(opt_state=jax.device_put(values, places)[1])
    mask_LER = place_mask(run, CapacityState(ranks_LE))
    after = reordered(run, state, order_LER, mask_LER)
    assert jax.tree.leaves(
        jax.tree.map(lambda leaf: leaf.sharding, (after.lora, after.opt_state))
    ) == jax.tree.leaves(places)
    assert "expert" in str(after.lora["segment_0"]["layer_0"]["moe"]["up_lora"]["a"].sharding.spec)
    old = rows_of(shapes._replace(lora=values[0], opt_state=values[1]))
    initial = expert_leaves(jax.device_get(run.first_lora()))
    for (what, role, side), new in rows_of(jax.device_get(after)).items():
        for layer, expert in np.ndindex(2, 4):
            rank = ranks_LE[layer, expert]
            expected = old[what, role, side][layer, expert][order_LER[layer, expert]]
            expected[rank:] = initial[role, side][layer, expert, rank:] if what == "lora" else 0
            np.testing.assert_array_equal(new[layer, expert], expected)


def test_a_note_says_that_ranks_shrink():
    before, after = np.full((1, 4), 4), np.array([[4, 2, 0, 2]])
    assert describe_ranks(5, before, after) == "step 5: mean rank 4.00 -> 2.00 (min 0, max 4)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(r_init=2, r_target=3), "r_target=3, r_init=2, r_max=4"),
        (dict(r_init=5), "0 < r_target <= r_init <= r_max"),
        (dict(importance="probe"), "probe scores the next inactive rank"),
        (dict(uncertainty_decay=1.0), "uncertainty_decay must be in"),
        (dict(interval=12), "no pruning event fits: warm-up ends at step 3"),
    ],
)
def test_configs_that_can_not_be(folder, changes, message):
    section = SECTIONS["allocation"] | changes
    with pytest.raises(UserError, match=message):
        prepare(tiny_config(folder, "refused", allocation=section))
