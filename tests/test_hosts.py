"""What processes find out about each other, without starting any."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from drlora_jax.errors import UserError
from drlora_jax.parallel import hosts
from drlora_jax.parallel.mesh import make_mesh

EXPLICIT = {
    "JAX_COORDINATOR_ADDRESS": "host:1234",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}
SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, None),
        (
            EXPLICIT,
            {"coordinator_address": "host:1234", "num_processes": 4, "process_id": 3},
        ),
        (SLURM | {"JAX_NUM_PROCESSES": "1"}, None),  # one alone, inside an allocation
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_GPUS_ON_NODE": "4"}, {}),
        # One task a node drives all of its GPUs; jax by itself would give it one.
        (
            SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_GPUS_ON_NODE": "4"},
            {"local_device_ids": [0, 1, 2, 3]},
        ),
        ({"OMPI_COMM_WORLD_SIZE": "8"}, {}),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
    ],
)
def test_peers_are_found_in_the_environment(environment, expected):
    assert hosts.cluster_arguments(environment | {"JAX_PLATFORMS": "cpu"}) == expected


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"JAX_PROCESS_ID": "1"}, "JAX_PROCESS_ID are set, JAX_COORDINATOR_ADDRESS and JAX_NUM"),
        (EXPLICIT | {"JAX_PROCESS_ID": "4"}, "from 0 to JAX_NUM_PROCESSES - 1, got 4 of 4"),
        (EXPLICIT | {"JAX_PROCESS_ID": "one"}, "got one of 4"),
    ],
)
def test_half_an_address_is_refused(environment, message):
    with pytest.raises(UserError, match=message):
        hosts.cluster_arguments(environment)


def test_the_process_that_differs_is_named():
    same = {"step": "aa", "mask": "bb"}
    assert hosts.disagreements([same, same], {"mask": "bb"}) == []
    other = same | {"mask": "cc"}
    # Of two, nobody is in the majority: what the mask must be says who is wrong.
    assert hosts.disagreements([other, same], {"mask": "bb"}) == ["mask of process 0"]
    assert hosts.disagreements([same, other, same | {"step": "dd"}, same], {}) == [
        "step of process 2",
        "mask of process 1",
    ]


def test_one_wrong_bit_on_one_device_is_seen():
    mesh = make_mesh((2, 1, 4, 1))
    mask_LER = (np.arange(2 * 8 * 3).reshape(2, 8, 3) % 2).astype(np.float32)
    sharding = jax.sharding.NamedSharding(mesh, PartitionSpec(None, "expert"))
    good = hosts.place(mask_LER, sharding)
    assert hosts.digest_on_devices(good, mask_LER) == hosts.digest(mask_LER)
    parts = [np.array(shard.data) for shard in good.addressable_shards]
    parts[5][1, 0, 2] = 1 - parts[5][1, 0, 2]
    placed = [
        jax.device_put(part, shard.device)
        for part, shard in zip(parts, good.addressable_shards, strict=True)
    ]
    bad = jax.make_array_from_single_device_arrays(good.shape, sharding, placed)
    assert hosts.digest_on_devices(bad, mask_LER) != hosts.digest(mask_LER)


def test_a_lost_peer_is_told_from_an_error_of_ours(monkeypatch):
    gone = ValueError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer [::1]:80")
    assert not hosts.is_lost_peer(gone)  # there are no peers
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert hosts.is_lost_peer(gone)
    assert not hosts.is_lost_peer(ValueError("the connection of peer and Gloo"))
    assert not hosts.is_lost_peer(RuntimeError("RESOURCE_EXHAUSTED: Out of memory"))
