"""The processes of a run: how they find each other, exchange values, and end together.

One process drives the devices of one host. `join` connects it with its peers before jax is used:
without arguments on TPU pods, under Slurm and Open MPI, else by the environment variables

    JAX_COORDINATOR_ADDRESS=host:port  JAX_NUM_PROCESSES=N  JAX_PROCESS_ID=i

Every process computes the same; process 0 decides what ranks grow, writes the run directory and
speaks. Nobody waits for ever: jax ends a process whose peer gives no sign of life for
`run.heartbeat_timeout` seconds, and `parallel.watchdog` one whose peers are alive but stuck.
"""

import contextlib
import ctypes
import importlib.util
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from drlora_jax.errors import EXIT_RESUMABLE, UserError
from drlora_jax.system import early
from drlora_jax.system.text import first_line

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# Seconds for all processes to start, and for all to end after the first that has done its work.
START_TIMEOUT, END_TIMEOUT = 300, 300
LAST_AFTER = 2  # seconds that process 0 leaves the others to end
# How collectives and the coordination service name a peer that has gone.
_LOSS_WORDS = ("gloo", "nccl", "connection", "peer", "coordination", "heartbeat", "socket closed")
_LOSS_STATUS = ("UNKNOWN", "UNAVAILABLE", "INTERNAL", "ABORTED", "DEADLINE_EXCEEDED", "CANCELLED")


# -------------------------------------------------------------------------------------- setting up


def join(heartbeat_timeout: int, *, hears_sigterm: bool = True) -> None:
    """Connects this process with its peers, if the environment says that there are any.

    Args:
      heartbeat_timeout: seconds without a sign of life after which a process counts as lost.
      hears_sigterm: whether the caller asks after every step if one has come; jax's own handler
        does no more than note it. Otherwise SIGTERM ends the process.
    """
    arguments = cluster_arguments(os.environ)
    if arguments is None or jax.distributed.is_initialized():
        return
    _end_resumably_on_abort()
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=START_TIMEOUT,
            heartbeat_timeout_seconds=heartbeat_timeout,
            shutdown_timeout_seconds=END_TIMEOUT,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"The processes of this run do not find each other ({first_line(error)}); check "
            f"{ADDRESS}, or set {COUNT}=1 to run one process alone."
        ) from error
    if not hears_sigterm:
        signal.signal(signal.SIGTERM, early.handler() or signal.SIG_DFL)
    if not is_main():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (for good)


def cluster_arguments(environment: Mapping[str, str]) -> dict | None:
    """What `jax.distributed.initialize` is to be told; None where there is one process only."""
    if environment.get(COUNT) == "1":
        return None
    explicit = [name for name in (ADDRESS, COUNT, INDEX) if name in environment]
    if len(explicit) == 3:
        return _explicit_arguments(environment)
    if COUNT in explicit or INDEX in explicit:
        missing = [name for name in (ADDRESS, COUNT, INDEX) if name not in environment]
        raise UserError(
            f"{' and '.join(explicit)} are set, {' and '.join(missing)} not: give all three, or "
            "none."
        )
    # A batch script has SLURM_NTASKS and SLURM_PROCID, too; only what srun starts has a step.
    if _is_many(environment, "SLURM_NTASKS") and "SLURM_STEP_NODELIST" in environment:
        return _slurm_arguments(environment)
    if _is_many(environment, "OMPI_COMM_WORLD_SIZE") or _is_tpu_host(environment):
        return {}  # jax asks the cluster
    return None


def _explicit_arguments(environment) -> dict:
    try:
        count, index = int(environment[COUNT]), int(environment[INDEX])
    except ValueError:
        count, index = 0, 0
    if not 0 <= index < count:
        raise UserError(
            f"{INDEX} must be a whole number from 0 to {COUNT} - 1, got {environment[INDEX]} of "
            f"{environment[COUNT]}."
        )
    address = environment[ADDRESS]
    return {"coordinator_address": address, "num_processes": count, "process_id": index}


def _slurm_arguments(environment) -> dict:
    # jax takes one GPU a task for granted; one task a node is to have all of the node's.
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE"))
    gpus = environment.get("SLURM_GPUS_ON_NODE", "0")
    if tasks is not None and tasks.split("(")[0] == "1" and gpus.isdigit() and int(gpus) > 1:
        return {"local_device_ids": list(range(int(gpus)))}
    return {}


def _is_many(environment, name: str) -> bool:
    value = environment.get(name, "1")
    return value.isdigit() and int(value) > 1


def _is_tpu_host(environment) -> bool:
    if environment.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu":
        return False
    has_chips = any(pathlib.Path("/dev").glob("accel[0-9]*"))
    has_chips = has_chips or any(pathlib.Path("/dev/vfio").glob("[0-9]*"))
    return has_chips and importlib.util.find_spec("libtpu") is not None


_SIGNAL_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)


@_SIGNAL_HANDLER
def _aborted(_):
    message = (
        "failed: a process of this run is lost, or gave no sign of life in time (the lines above "
        "say which). The same command, started on all hosts, goes on from the last checkpoint (an "
        "evaluation begins anew).\n"
    )
    os.write(2, message.encode())
    os._exit(EXIT_RESUMABLE)


def _end_resumably_on_abort() -> None:
    """jax calls abort() in a thread of its own when a peer is lost. A handler written in Python
    would wait for the main thread, which waits for the peer; this one runs at once.
    """
    ctypes.CDLL(None).signal(int(signal.SIGABRT), _aborted)


def is_main() -> bool:
    """Whether this is the process that decides, writes and speaks."""
    return jax.process_index() == 0


@contextlib.contextmanager
def leaving_with_peers(before: Callable[[], None]) -> Iterator[None]:
    """Inside, an error that means that another process has gone ends this one, after `before`, with
    one message: the usual way out would wait for the process that is gone.
    """
    try:
        yield
    except Exception as error:
        if is_lost_peer(error):
            before()
            reason = first_line(error)
            print(
                f"failed: process {jax.process_index()} has lost another process of this run "
                f"({reason}). The same command, started on all hosts, goes on from the last "
                "checkpoint.",
                file=sys.stderr,
            )
            leave(EXIT_RESUMABLE)
        raise


def leave(code: int) -> None:
    """Ends this process at once; on the usual way out jax waits for all others to end as well.

    Process 0 is the last: with it goes the coordination service, and others that are about to say
    why they end would be ended as having lost a peer.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if is_main():
        time.sleep(LAST_AFTER)
    os._exit(code)


def is_lost_peer(error: Exception) -> bool:
    """Whether what a step raised means that another process has gone."""
    text = str(error)
    named = any(word in text.lower() for word in _LOSS_WORDS)
    return jax.process_count() > 1 and named and text.lstrip().startswith(_LOSS_STATUS)


# ------------------------------------------------------------------------------------------ values


def place(tree: Any, shardings: Any) -> Any:
    """Host arrays, the same on every process, as device arrays; each process copies its parts.

    Args:
      shardings: one sharding (None: wherever jax puts it), or a tree of them like `tree`.
    """

    def leaf(value, sharding):
        if sharding is None or sharding.is_fully_addressable:
            return jax.device_put(value, sharding)
        value = np.asarray(value)
        return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

    if shardings is None or isinstance(shardings, jax.sharding.Sharding):
        return jax.tree.map(lambda value: leaf(value, shardings), tree)
    return jax.tree.map(leaf, tree, shardings)


def to_host(tree: Any) -> Any:
    """Device arrays, whole, as NumPy arrays on every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def from_main(tree: Any) -> Any:
    """The NumPy arrays of process 0, on every process."""
    if jax.process_count() == 1:
        return tree
    shapes = jax.tree.map(lambda value: np.asarray(value).dtype, tree)
    sent = multihost_utils.broadcast_one_to_all(tree)
    return jax.tree.map(lambda value, dtype: np.asarray(value, dtype), sent, shapes)


def all_texts(text: str) -> list[str]:
    """The texts of all processes, on every process."""
    if jax.process_count() == 1:
        return [text]
    own = np.frombuffer(text.encode(), np.uint8)
    lengths = np.ravel(multihost_utils.process_allgather(np.array([own.size], np.int32)))
    padded = np.zeros(max(lengths.max(), 1), np.uint8)
    padded[: own.size] = own
    texts = np.asarray(multihost_utils.process_allgather(padded))
    return [
        bytes(row[:length]).decode()
        for row, length in zip(texts.reshape(lengths.size, -1), lengths, strict=True)
    ]
