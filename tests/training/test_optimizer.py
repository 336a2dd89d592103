"""Schedules against their formula, and AdamW against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from drlora_jax.config import TrainSection
from drlora_jax.training.optimizer import (
    RankAdamState,
    label_leaves,
    make_optimizer,
    make_schedule,
    scale_by_rank_adam,
)
from tests.support.stepper import Stepper, expert_leaves

PEAK = 3e-4


def stated_rate(step, *, total, warmup, schedule, peak=PEAK):
    """The rate of the step after `step` steps are done."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = min(1.0, (step - warmup) / (total - warmup))
    if schedule == "linear":
        return peak * (1 - done)
    return peak if schedule == "constant" else peak * 0.5 * (1 + np.cos(np.pi * done))


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("total", "ratio", "warmup"), [(40, 0.25, 10), (7, 0.2, 1), (9, 0.0, 0)])
def test_schedules(schedule, total, ratio, warmup):
    section = TrainSection(steps=total, schedule=schedule, warmup_ratio=ratio)
    rate = make_schedule(section, total, PEAK)
    got = [float(rate(step)) for step in range(total + 3)]
    options = {"total": total, "warmup": warmup, "schedule": schedule}
    expected = [stated_rate(step, **options) for step in range(total + 3)]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-9 * PEAK)
    assert got[0] > 0 and max(got) <= PEAK * (1 + 1e-6)
    assert (got[total] == pytest.approx(0, abs=1e-9)) == (schedule != "constant")


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_a_prolonged_run_does_not_warm_up_again(schedule):
    """Its warm-up is that of the steps it was created with; a decay follows the new length."""
    section = TrainSection(steps=20, schedule=schedule, warmup_ratio=0.2)
    short, long = make_schedule(section, 20, PEAK), make_schedule(section, 40, PEAK, first_total=20)
    assert [float(long(step)) for step in range(5)] == [float(short(step)) for step in range(5)]
    rates = [float(long(step)) for step in range(4, 40)]
    options = {"total": 40, "warmup": 4, "schedule": schedule}
    expected = [stated_rate(step, **options) for step in range(4, 40)]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_a_run_that_keeps_its_length_keeps_its_rates_bit_for_bit(schedule):
    section = TrainSection(steps=33, schedule=schedule, warmup_ratio=0.1)
    first, again = (
        make_schedule(section, 33, PEAK),
        make_schedule(section, 33, PEAK, first_total=33),
    )
    assert [float(first(step)) for step in range(35)] == [float(again(step)) for step in range(35)]


def stated_adamw(section, params, grads_per_step, rates):
    """Clip by the norm over all leaves, Adam with bias correction, decoupled decay; float64."""
    params = {name: np.asarray(value, np.float64) for name, value in params.items()}
    first, second = ({name: 0 * value for name, value in params.items()} for _ in range(2))
    for count, grads in enumerate(grads_per_step, start=1):
        norm = np.sqrt(sum(np.sum(np.asarray(g, np.float64) ** 2) for g in grads.values()))
        limit = section.max_grad_norm
        clip = 1.0 if limit is None or norm < limit else limit / norm
        for name, grad in grads.items():
            grad = clip * np.asarray(grad, np.float64)
            first[name] = section.beta1 * first[name] + (1 - section.beta1) * grad
            second[name] = section.beta2 * second[name] + (1 - section.beta2) * grad**2
            mean = first[name] / (1 - section.beta1**count)
            root = np.sqrt(second[name] / (1 - section.beta2**count))
            step = mean / (root + section.epsilon) + section.weight_decay * params[name]
            params[name] = params[name] - rates[name](count - 1) * step
    return params


@pytest.mark.parametrize("max_grad_norm", [1.0, 1e3, None])
@pytest.mark.parametrize(("router_rate", "ratio"), [(None, 1), (5e-2, 1), (None, 16), (5e-2, 4)])
def test_adamw(max_grad_norm, router_rate, ratio):
    steps = 6
    section = TrainSection(
        steps=steps,
        learning_rate=1e-2,
        warmup_ratio=0.34,
        weight_decay=0.1,
        beta1=0.8,
        beta2=0.95,
        epsilon=1e-6,
        max_grad_norm=max_grad_norm,
        b_learning_rate_ratio=ratio,
    )
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 4), "b": (5,), "router_delta": (2, 3)}

    def draw(scale):
        return {n: jnp.asarray(scale * rng.normal(size=s), jnp.float32) for n, s in shapes.items()}

    params, grads_per_step = draw(1.0), [draw(10.0 ** (i % 3 - 1)) for i in range(steps)]
    tx, schedule = make_optimizer(section, steps, router_learning_rate=router_rate)

    @jax.jit
    def run(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    got, state = params, tx.init(params)
    for grads in grads_per_step:
        got, state = run(got, state, grads)

    def rate(peak):
        options = {"total": steps, "warmup": 2, "schedule": "linear", "peak": peak}
        return lambda step: stated_rate(step, **options)

    rates = {"a": rate(1e-2), "b": rate(ratio * 1e-2), "router_delta": rate(router_rate or 1e-2)}
    expected = stated_adamw(section, params, grads_per_step, rates)
    for name in shapes:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-5, atol=1e-6)
    assert float(schedule(2)) == pytest.approx(1e-2)


def test_labels():
    tree = {"segment_0": {"layer_0": {"moe": {"router_delta": 0, "up_lora": {"a": 0, "b": 0}}}}}
    labels = label_leaves(tree)["segment_0"]["layer_0"]["moe"]
    assert labels == {"router_delta": "router", "up_lora": {"a": "lora", "b": "b"}}


def test_rank_adam_starts_every_row_anew():
    """Row by row Adam's own recursion, from the first step that brought the row a gradient."""
    draw, (b1, b2, eps) = np.random.default_rng(0), (0.9, 0.999, 1e-8)
    grads = draw.normal(size=(6, 3, 4)).astype(np.float32)
    grads[:4, 1] = 0  # activated late
    grads[3, 0] = 0  # no gradient for once: its moments decay, its count stays
    tx = scale_by_rank_adam(b1, b2, eps)
    params = {"b": jnp.zeros((3, 4))}
    state, steps = tx.init(params), []
    for grad in grads:
        update, state = tx.update({"b": jnp.asarray(grad)}, state, params)
        steps.append(np.asarray(update["b"]))
    for row in range(3):
        mu, nu, count = np.zeros(4), np.zeros(4), 0
        for index, grad in enumerate(grads[:, row].astype(np.float64)):
            count += bool(grad.any())
            mu, nu = b1 * mu + (1 - b1) * grad, b2 * nu + (1 - b2) * grad**2
            expected = 0.0
            if count:
                expected = mu / (1 - b1**count) / (np.sqrt(nu / (1 - b2**count)) + eps)
            np.testing.assert_allclose(steps[index][row], expected, rtol=1e-4, atol=1e-6)
    plain = optax.scale_by_adam(b1, b2, eps)
    update, _ = plain.update({"b": jnp.asarray(grads[0])}, plain.init(params))
    np.testing.assert_allclose(steps[0][[0, 2]], update["b"][jnp.array([0, 2])], rtol=1e-6)
    # The first update of the late row is as long as any first update.
    np.testing.assert_allclose(np.abs(steps[4][1]), 1.0, rtol=1e-3)


def test_rank_adam_in_a_run(tmp_path):
    """Over growth events: inactive rows keep zero moments and counts, and the run learns."""
    stepper = Stepper(tmp_path, train=dict(bias_correction="per_rank"))
    losses = [float(stepper.step()["loss"]) for _ in range(9)]
    assert losses[-1] < losses[0] - 0.1
    state = stepper.position.state
    found = [
        s for s in jax.tree.leaves(state.opt_state, is_leaf=_is_rank_state) if _is_rank_state(s)
    ]
    mask_LER = np.asarray(state.mask_LER) > 0
    count_LER = np.asarray(expert_leaves(found[0].count)["up", "b"])[..., 0]
    assert (count_LER[~mask_LER] == 0).all() and (count_LER[mask_LER] > 0).all()
    assert len(np.unique(count_LER[mask_LER])) > 1  # ranks of several ages


def _is_rank_state(value):
    return isinstance(value, RankAdamState)
