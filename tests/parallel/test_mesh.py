"""Eight simulated devices: the numbers do not depend on the mesh.

By default on a selection in which every axis occurs, and fsdp, expert and tensor together; with
`-m slow` on every factorisation of eight.
"""

import itertools
import math

import jax
import numpy as np
import pytest

from drlora_jax.config import MeshSection
from drlora_jax.errors import UserError
from drlora_jax.parallel import mesh as mesh_lib
from drlora_jax.parallel.mesh import AXES, resolve_sizes
from drlora_jax.training.job import prepare
from drlora_jax.training.state import start
from tests.support.stepper import Stepper, expert_leaves
from tests.support.tiny import OLMOE, tiny_config, write_rows, write_tiny_model

STEPS = 20  # over the growth events after steps 5 and 11
# tensor=8 is more than the key-value heads there are.
VALUES = OLMOE | {"hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4}
VALUES |= {"num_experts": 8}
EVERY = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=4) if math.prod(sizes) == 8]
SOME = [(8, 1, 1, 1), (1, 1, 1, 8), (1, 2, 2, 2)]
MESHES = [
    sizes if sizes in SOME else pytest.param(sizes, marks=pytest.mark.slow) for sizes in EVERY
]


def take_steps(folder, name, mesh):
    changes = dict(
        train=dict(steps=STEPS, sequence_length=32),
        allocation=dict(interval=6),
        adapter=dict(targets=("up", "down", "q", "k", "v", "o")),
    )
    stepper = Stepper(folder, name, mesh=mesh, **changes)
    return [float(stepper.step()["loss"]) for _ in range(STEPS)], stepper


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mesh")
    write_tiny_model(folder / "model", VALUES)
    write_rows(folder / "train.jsonl", 60)
    write_rows(folder / "heldout.jsonl", 12, seed=1)
    return folder


@pytest.fixture(scope="module")
def one_device(folder):
    losses, stepper = take_steps(folder, "one", {"data": 1})
    assert stepper.position.capacity.ranks_LE.mean() == 2  # both events have happened
    return losses, stepper.position.capacity.ranks_LE, jax.device_get(stepper.position.state)


def name_of(sizes):
    return "x".join(map(str, sizes))


@pytest.mark.parametrize("sizes", MESHES, ids=name_of)
def test_losses_and_ranks_are_those_of_one_device(folder, one_device, sizes):
    check_mesh_numbers(folder, one_device, sizes, "auto")


def test_tokens_may_be_sent_to_their_experts(folder, one_device):
    check_mesh_numbers(folder, one_device, (2, 1, 4, 1), "padded")


def check_mesh_numbers(folder, one_device, sizes, exchange):
    mesh = dict(zip(AXES, sizes, strict=True)) | {"exchange": exchange}
    losses, stepper = take_steps(folder, f"{name_of(sizes)}-{exchange}", mesh)
    state = jax.device_get(stepper.position.state)
    np.testing.assert_allclose(losses, one_device[0], rtol=1e-5)
    np.testing.assert_array_equal(stepper.position.capacity.ranks_LE, one_device[1])
    frequency, expected = state.stats.frequency_LE, one_device[2].stats.frequency_LE
    np.testing.assert_allclose(frequency, expected, rtol=1e-5, atol=1e-7)
    first = jax.device_get(start(stepper.run).state.lora)
    is_active = state.mask_LER[..., None] > 0
    for key, value in expert_leaves(state.lora).items():
        initial = 0.0 if key[1] == "b" else expert_leaves(first)[key]
        np.testing.assert_array_equal(np.where(is_active, 0, value - initial), 0)
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
        (dict(mesh=dict(expert=8)), r"\(8 x 1\) must divide the number of experts \(4\)"),
        (dict(mesh=dict(expert=2, tensor=4)), r"\(2 x 4\) must divide the number of experts"),
        (dict(mesh=dict(tensor=4)), "mesh.tensor=4 must divide the 2 attention heads"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        prepare(tiny_config(tmp_path, **changes))


class FakeDevice:
    """What `make_mesh` asks of a device of a slice of 2 x 2 chips."""

    device_kind = "TPU v4"

    def __init__(self, slice_index, index, platform="tpu"):
        self.platform = platform
        self.slice_index, self.id = slice_index, 4 * slice_index + index
        self.coords, self.core_on_chip = (index % 2, index // 2, 0), 0
        self.process_index = slice_index


@pytest.mark.parametrize("sizes, axis", [((2, 1, 4, 1), 0), ((1, 2, 2, 2), 1), ((4, 2, 1, 1), 0)])
def test_data_or_fsdp_goes_over_slices(monkeypatch, sizes, axis):
    monkeypatch.setattr(mesh_lib, "Mesh", lambda placed, *_, **__: placed)
    placed = mesh_lib.make_mesh(sizes, [FakeDevice(s, i) for s in range(2) for i in range(4)])
    parts = np.split(np.moveaxis(placed, axis, 0), 2)
    assert [{device.slice_index for device in part.flat} for part in parts] == [{0}, {1}]


def test_experts_stay_inside_a_slice():
    devices = [FakeDevice(s, i) for s in range(2) for i in range(4)]
    with pytest.raises(UserError, match="2 slices: mesh.data or mesh.fsdp must be a multiple"):
        mesh_lib.make_mesh((1, 1, 8, 1), devices)


def test_experts_may_lie_on_several_gpu_nodes(monkeypatch):
    monkeypatch.setattr(mesh_lib, "Mesh", lambda placed, *_, **__: placed)
    devices = [FakeDevice(s, i, "gpu") for s in range(2) for i in range(4)]
    assert mesh_lib.make_mesh((1, 1, 8, 1), devices).shape == (1, 1, 8, 1)
    across = mesh_lib.make_mesh((2, 1, 4, 1), devices)
    assert [{device.slice_index for device in part.flat} for part in across] == [{0}, {1}]


def test_every_process_has_a_part_of_the_mesh():
    assert resolve_sizes(MeshSection(data=4), 8) == (4, 1, 1, 1)
    assert resolve_sizes(MeshSection(data=2, expert=-1), 8, 2) == (2, 1, 4, 1)
    with pytest.raises(UserError, match="of the 8 devices of 2 processes; .* all must be used"):
        resolve_sizes(MeshSection(data=4), 8, 2)


def test_sending_rows_as_they_are_is_for_tpus(tmp_path):
    with pytest.raises(UserError, match="exchange=ragged is for TPUs, .* is cpu; .* padded"):
        prepare(tiny_config(tmp_path, mesh=dict(expert=2, exchange="ragged")))


def test_the_table_says_what_lies_where():
    mesh = mesh_lib.make_mesh((1, 2, 2, 2))
    shapes = {"embedding": (4097, 32), "segment_0": {"moe": {"down": (3, 8, 20, 32)}}}
    shapes["final_norm"] = {"scale": (32,)}
    tree = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, np.float32),
        shapes,
        is_leaf=lambda value: isinstance(value, tuple),
    )
    tree = mesh_lib.with_shardings(tree, mesh_lib.shardings_for(mesh, tree, "params"))
    _, *lines = mesh_lib.partition_lines(mesh, {"params": tree})
    words = {line.split()[0]: " ".join(line.split()[1:]) for line in lines}
    assert words["params/.*/moe/(gate_up|down)"] == "-, expert+tensor, fsdp 1 7.5 KiB"
    assert words["params/.*"] == "replicated 1 128 B"
    # 4,097 rows are odd: the table is cut along its width only.
    embedding = "tensor, fsdp 1 256.1 KiB not divisible: params/embedding"
    assert words["params/embedding"] == embedding
