"""Eight simulated devices: the numbers do not depend on the mesh."""

import jax
import numpy as np
import pytest
from test_step import Stepper, expert_leaves
from tiny import tiny_config

from drlora_jax.config import MeshSection
from drlora_jax.errors import UserError
from drlora_jax.parallel.mesh import resolve_sizes
from drlora_jax.prepare import prepare

STEPS = 8  # over the growth events after steps 3 and 7


def take_steps(stepper):
    losses = [float(stepper.step()["loss"]) for _ in range(STEPS)]
    return losses, stepper.position.capacity.ranks_LE, jax.device_get(stepper.position.state)


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    return take_steps(Stepper(tmp_path_factory.mktemp("one")))


@pytest.mark.parametrize(
    "sizes",
    [(8, 1, 1), (1, 1, 4), (2, 2, 2), (1, 8, 1)],
    ids=lambda sizes: "x".join(map(str, sizes)),
)
def test_losses_and_ranks_are_those_of_one_device(tmp_path, one_device, sizes):
    mesh = dict(zip(("data", "fsdp", "expert"), sizes, strict=True))
    stepper = Stepper(tmp_path, mesh=mesh)
    losses, ranks_LE, state = take_steps(stepper)
    np.testing.assert_allclose(losses, one_device[0], rtol=1e-5)
    np.testing.assert_array_equal(ranks_LE, one_device[1])
    frequency, expected = state.stats.frequency_LE, one_device[2].stats.frequency_LE
    np.testing.assert_allclose(frequency, expected, rtol=1e-5, atol=1e-7)
    is_active = state.mask_LER[..., None] > 0
    for (_, side), value in expert_leaves(state.lora).items():
        if side == "b":
            assert not np.where(is_active, 0, value).any()
    assert stepper.run.step._cache_size() == 1


@pytest.mark.parametrize(
    "section, devices, expected",
    [
        (MeshSection(), 8, (8, 1, 1, 1)),
        (MeshSection(data=-1, expert=4), 8, (2, 1, 4, 1)),
        (MeshSection(data=2, fsdp=2, expert=2), 8, (2, 2, 2, 1)),
        (MeshSection(data=1), 8, (1, 1, 1, 1)),
    ],
)
def test_sizes(section, devices, expected):
    assert resolve_sizes(section, devices) == expected


@pytest.mark.parametrize("section", [MeshSection(expert=3), MeshSection(data=16)])
def test_a_mesh_that_does_not_fit_is_refused(section):
    with pytest.raises(UserError, match="does not fit the 8 devices"):
        resolve_sizes(section, 8)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(train=dict(batch_size=6), mesh=dict(data=4)), r"6 rows\) must be a multiple"),
        (dict(mesh=dict(expert=8)), r"mesh.expert=8 must divide the number of experts \(4\)"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        prepare(tiny_config(tmp_path, **changes))
