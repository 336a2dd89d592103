"""What a policy may declare: measurements, a profile and the axes of its statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from drlora_jax import train as train_lib
from drlora_jax.allocation import CapacityShapes, CapacityState, Event, Profile
from drlora_jax.allocation.base import static_policy, zero_stats
from drlora_jax.allocation.measurements import Measurement
from drlora_jax.interop.hf_read import load_params
from drlora_jax.parallel import mesh as mesh_lib
from drlora_jax.training import growth
from drlora_jax.training.job import prepare
from drlora_jax.training.state import start
from tests.support.policies import make_policy
from tests.support.stepper import Stepper, expert_leaves
from tests.support.tiny import tiny_config

SHAPES = CapacityShapes(layers=2, projections=3, experts=4, max_rank=6)
SIZE_OF_A = Measurement(
    "size_of_a", lambda view: view.each_role(lambda own, *_: jnp.sum(own["a"] ** 2, axis=-1))
)


@pytest.mark.parametrize("kind", ["dr_lora", "random", "adalora", "uniform"])
def test_statistics_are_what_their_axes_say(kind):
    policy = make_policy(kind, SHAPES, r_target=2, total_steps=1000, **FIRST.get(kind, {}))
    stats, axes = jax.tree.leaves(policy.init_stats()), jax.tree.leaves(policy.stat_axes)
    sizes = dict(zip("LPER", SHAPES, strict=True))
    for leaf, letters in zip(stats, axes, strict=True):
        assert leaf.shape == tuple(sizes[letter] for letter in letters) and leaf.dtype == "f4"
    assert jax.tree.structure(policy.init_stats()) == jax.tree.structure(policy.stat_axes)
    assert bool(stats) == (kind != "uniform")


FIRST = {"dr_lora": dict(r_init=1), "random": dict(r_init=1), "adalora": dict(r_init=4)}


def test_statistics_are_sharded_by_their_axes_and_by_no_name():
    mesh = mesh_lib.make_mesh((1, 2, 2, 2))
    axes = {"plain": "LE", "gates_LE": "LR", "other": "EL", "few": "E"}
    shapes = SHAPES._replace(layers=3)
    tree = zero_stats(axes, shapes) | {"few": jnp.zeros(3)}
    shardings = mesh_lib.shardings_by_axes(mesh, tree, axes)
    experts = ("expert", "tensor")
    specs = {name: tuple(sharding.spec) for name, sharding in shardings.items()}
    assert specs == {
        "plain": (None, experts),
        "gates_LE": (None, None),
        "other": (experts, None),
        "few": (None,),  # three experts do not divide
    }
    undeclared = mesh_lib.shardings_by_axes(mesh, {"frequency_LE": tree["plain"]}, None)
    assert undeclared["frequency_LE"].is_fully_replicated
    placed = mesh_lib.with_shardings(tree, shardings)
    _, *lines = mesh_lib.partition_lines(mesh, {"stats": placed}, axes)
    words = {line[:32].strip(): line[34:].split() for line in lines}
    assert words["stats [L, E]"][:3] == ["-,", "expert+tensor", "1"]
    assert words["stats [E]"][-1] == "stats/few"


@pytest.fixture(scope="module")
def stepper(tmp_path_factory):
    return Stepper(tmp_path_factory.mktemp("interface"), train=dict(micro_batches=2))


def with_policy(stepper, **changes):
    """The job of a stepper with a policy of its own, and its base weights."""
    policy = static_policy(
        "own", np.full((2, 4), 2), budget=8, describe="a policy of this test"
    )._replace(**changes)
    job = stepper.job._replace(policy=policy)
    return train_lib.build(job), stepper.params


def test_a_step_measures_what_a_policy_declares(stepper):
    """A measurement that no file of the package knows, next to gates and routing."""
    run, params = with_policy(
        stepper,
        measures=(SIZE_OF_A,),
        stat_axes="LPER",
        init_stats=lambda: jnp.zeros((2, 2, 4, 4), jnp.float32),
        accumulate=lambda stats, step: stats + step.measured["size_of_a"],
    )
    state = start(run).state
    before = expert_leaves(jax.device_get(state.lora))
    state, _ = run.step(params, state, stepper.batch(0))
    for index, role in enumerate(("up", "down")):
        expected = (before[role, "a"] ** 2).sum(axis=-1)
        np.testing.assert_allclose(state.stats[:, index], expected, rtol=1e-5)


def test_what_a_measurement_opens_is_not_trained(stepper):
    """All ranks are let through, and the same two train."""
    everything = Measurement(
        "nothing",
        lambda view: view.each_role(lambda own, grads, _: jnp.abs(grads["b"]).max(axis=-1)),
        opens=lambda mask_LER, has_base_experts: jnp.ones_like(mask_LER),
    )
    seen = {
        "stat_axes": "LPER",
        "init_stats": lambda: jnp.zeros((2, 2, 4, 4), jnp.float32),
        "accumulate": lambda stats, step: step.measured["nothing"],
    }
    states = []
    for changes in ({}, {"measures": (everything,), **seen}):
        run, params = with_policy(stepper, **changes)
        state = start(run).state
        states.append(jax.device_get(run.step(params, state, stepper.batch(0))[0]))
    plain, opened = states
    assert (opened.stats[..., 2:] > 0).any()  # of ranks that are inactive
    for key, value in expert_leaves(opened.lora).items():
        np.testing.assert_allclose(value, expert_leaves(plain.lora)[key], rtol=1e-4, atol=1e-7)
        np.testing.assert_array_equal(value[:, :, 2:], expert_leaves(plain.lora)[key][:, :, 2:])


def test_a_profile_may_measure_anything_that_has_a_pass(tmp_path, monkeypatch):
    """Sums by name over whole batches of the first rows."""
    seen = []

    def tokens(run, params, state, batch):
        seen.append(int(np.asarray(batch.segment_ids_BT > 0).sum()))
        return np.float64(seen[-1])

    def decide(measured):
        assert measured.keys() == {"choices", "tokens"} and measured["tokens"] == sum(seen)
        np.testing.assert_array_equal(measured["choices"].sum(axis=1), 2 * sum(seen))
        return CapacityState(np.eye(2, 4, dtype=np.int32)), Event(np.zeros((2, 4), np.float32))

    monkeypatch.setitem(growth.PROFILE_PASSES, "tokens", tokens)
    job = prepare(tiny_config(tmp_path, allocation=dict(kind="uniform")))
    wanted = Profile(12, ("choices", "tokens"), decide)
    run = train_lib.build(job._replace(policy=job.policy._replace(profile=wanted)))
    params = load_params(job.model_config, job.directory, run.abstract_params)
    job.run_dir.create(job.config, job.origin, 0)
    position = growth.start_profiled(run, params)
    assert len(seen) == 2  # of eight rows each
    np.testing.assert_array_equal(position.state.mask_LER[..., 0], np.eye(2, 4))
