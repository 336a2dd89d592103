"""What processes find out about each other."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from drlora_jax.errors import EXIT_RESUMABLE, UserError
from drlora_jax.parallel import agreement
from drlora_jax.parallel import processes as processes_lib
from drlora_jax.parallel.mesh import make_mesh

EXPLICIT = {
    "JAX_COORDINATOR_ADDRESS": "host:1234",
    "JAX_NUM_PROCESSES": "4",
    "JAX_PROCESS_ID": "3",
}
BATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
SLURM = BATCH | {"SLURM_PROCID": "1", "SLURM_STEP_NODELIST": "node[1-2]"}


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
        (BATCH, None),  # a line of the batch script itself, without srun
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
    assert processes_lib.cluster_arguments(environment | {"JAX_PLATFORMS": "cpu"}) == expected


@pytest.mark.parametrize(
    "environment, message",
    [
        (
            {"JAX_PROCESS_ID": "1"},
            "JAX_PROCESS_ID are set, but JAX_COORDINATOR_ADDRESS and JAX_NUM",
        ),
        (EXPLICIT | {"JAX_PROCESS_ID": "4"}, "from 0 to JAX_NUM_PROCESSES - 1, got 4 of 4"),
        (EXPLICIT | {"JAX_PROCESS_ID": "one"}, "got one of 4"),
    ],
)
def test_half_an_address_is_refused(environment, message):
    with pytest.raises(UserError, match=message):
        processes_lib.cluster_arguments(environment)


def test_the_process_that_differs_is_named():
    same = {"step": "aa", "mask": "bb"}
    assert agreement.disagreements([same, same], {"mask": "bb"}) == []
    other = same | {"mask": "cc"}
    # Of two, nobody is in the majority: what the mask must be says who is wrong.
    assert agreement.disagreements([other, same], {"mask": "bb"}) == ["mask differs on process 0"]
    assert agreement.disagreements([same, other, same | {"step": "dd"}, same], {}) == [
        "step differs on process 2",
        "mask differs on process 1",
    ]


def test_one_wrong_bit_on_one_device_is_seen():
    mesh = make_mesh((2, 1, 4, 1))
    mask_LER = (np.arange(2 * 8 * 3).reshape(2, 8, 3) % 2).astype(np.float32)
    sharding = jax.sharding.NamedSharding(mesh, PartitionSpec(None, "expert"))
    good = processes_lib.place(mask_LER, sharding)
    assert agreement.digest_on_devices(good, mask_LER) == agreement.digest(mask_LER)
    parts = [np.array(shard.data) for shard in good.addressable_shards]
    parts[5][1, 0, 2] = 1 - parts[5][1, 0, 2]
    placed = [
        jax.device_put(part, shard.device)
        for part, shard in zip(parts, good.addressable_shards, strict=True)
    ]
    bad = jax.make_array_from_single_device_arrays(good.shape, sharding, placed)
    assert agreement.digest_on_devices(bad, mask_LER) != agreement.digest(mask_LER)


def test_a_lost_peer_is_told_from_an_error_of_ours(monkeypatch):
    gone = ValueError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer [::1]:80")
    assert not processes_lib.is_lost_peer(gone)  # there are no peers
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert processes_lib.is_lost_peer(gone)
    assert not processes_lib.is_lost_peer(ValueError("the connection of peer and Gloo"))
    assert not processes_lib.is_lost_peer(RuntimeError("RESOURCE_EXHAUSTED: Out of memory"))


STUCK = """
import time
import jax
from drlora_jax.parallel import processes
from drlora_jax.parallel.watchdog import Watchdog

processes.join(heartbeat_timeout=20)
with Watchdog(timeout=2) as watchdog:
    for step in range(3):
        watchdog.beat(f"step {step}")
        time.sleep(0.5)
    watchdog.beat(f"reading rows of process {jax.process_index()}")
    time.sleep(60)
"""


def test_stuck_processes_end_and_say_where_all_are():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    environment = os.environ | {
        "PYTHONPATH": str(pathlib.Path(__file__).parents[2]),
        "JAX_PLATFORMS": "cpu",
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", STUCK],
            env=environment | {"JAX_PROCESS_ID": str(index)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    errors = [process.communicate(timeout=50)[1] for process in processes]
    assert [process.returncode for process in processes] == [EXIT_RESUMABLE] * 2, errors
    where = "process 0: reading rows of process 0, process 1: reading rows of process 1"
    # One may end the coordinator under the other, which then is ended by jax.
    assert any(where in text and 'File "<string>"' in text for text in errors), errors
    assert all("last checkpoint" in text for text in errors), errors
