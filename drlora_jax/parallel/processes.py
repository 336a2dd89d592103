"""Connects the processes of a run, exchanges values between them, and ends them together.

One process drives the devices of one host. `join` connects it with its peers before jax is used:
without arguments on TPU pods, under Slurm and Open MPI, otherwise by the environment variables

    JAX_COORDINATOR_ADDRESS=host:port  JAX_NUM_PROCESSES=N  JAX_PROCESS_ID=i

Every process computes the same; process 0 decides which ranks grow, writes the run directory and
prints. No process waits forever: jax ends a process whose peer sends no heartbeat for
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
# Seconds for all processes to start, and for all to end after the first has finished.
START_TIMEOUT, END_TIMEOUT = 300, 300
LAST_AFTER = 2  # seconds that process 0 waits for the others to end
# Words by which collectives and the coordination service report a lost peer.
_LOSS_WORDS = ("gloo", "nccl", "connection", "peer", "coordination", "heartbeat", "socket closed")
_LOSS_STATUS = ("UNKNOWN", "UNAVAILABLE", "INTERNAL", "ABORTED", "DEADLINE_EXCEEDED", "CANCELLED")


# ------------------------------------------------------------------------------------- setting up


def join(heartbeat_timeout: int, *, hears_sigterm: bool = True) -> None:
    """Connects this process with its peers, if the environment describes any.

    Args:
      heartbeat_timeout: Seconds without a heartbeat after which a process counts as lost.
      hears_sigterm: Whether the caller checks for SIGTERM after every step; jax's own handler only
        records it. Otherwise SIGTERM ends the process.
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
            f"The processes of this run cannot connect to each other ({first_line(error)}); check "
            f"{ADDRESS}, or set {COUNT}=1 to run a single process."
        ) from error
    if not hears_sigterm:
        signal.signal(signal.SIGTERM, early.handler() or signal.SIG_DFL)
    if not is_main():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (for good)


def cluster_arguments(environment: Mapping[str, str]) -> dict | None:
    """Returns the arguments of `jax.distributed.initialize`; None for a single process."""
    if environment.get(COUNT) == "1":
        return None
    explicit = [name for name in (ADDRESS, COUNT, INDEX) if name in environment]
    if len(explicit) == 3:
        return _explicit_arguments(environment)
    if COUNT in explicit or INDEX in explicit:
        missing = [name for name in (ADDRESS, COUNT, INDEX) if name not in environment]
        raise UserError(
            f"{' and '.join(explicit)} are set, but {' and '.join(missing)} not: set all three or "
            "none."
        )
    # A batch script has SLURM_NTASKS and SLURM_PROCID too; only what srun starts has a step.
    if _is_many(environment, "SLURM_NTASKS") and "SLURM_STEP_NODELIST" in environment:
        return _slurm_arguments(environment)
    if _is_many(environment, "OMPI_COMM_WORLD_SIZE") or _is_tpu_host(environment):
        return {}  # jax detects the cluster
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
    # jax assumes one GPU per task; a single task per node shall have all GPUs of the node.
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
        "failed: a process of this run is lost or sent no heartbeat in time (the lines above say "
        "which). The same command, started on all hosts, resumes from the last checkpoint (an "
        "evaluation starts over).\n"
    )
    os.write(2, message.encode())
    os._exit(EXIT_RESUMABLE)


def _end_resumably_on_abort() -> None:
    """Installs a handler that ends this process as resumable when jax aborts it.

    jax calls abort() in a thread of its own when a peer is lost. A handler written in Python would
    wait for the main thread, which waits for the peer; a C handler runs at once.
    """
    ctypes.CDLL(None).signal(int(signal.SIGABRT), _aborted)


def is_main() -> bool:
    """Returns whether this is the process that decides, writes and prints."""
    return jax.process_index() == 0


@contextlib.contextmanager
def leaving_with_peers(before: Callable[[], None]) -> Iterator[None]:
    """Ends this process with one message, after `before`, when an error inside the context means
    that another process is lost: a normal exit would wait for the lost process.
    """
    try:
        yield
    except Exception as error:
        if is_lost_peer(error):
            before()
            reason = first_line(error)
            print(
                f"failed: process {jax.process_index()} has lost another process of this run "
                f"({reason}). The same command, started on all hosts, resumes from the last "
                "checkpoint.",
                file=sys.stderr,
            )
            leave(EXIT_RESUMABLE)
        raise


def leave(code: int) -> None:
    """Ends this process at once; on a normal exit jax waits for all others to end as well.

    Process 0 ends last: the coordination service ends with it, and other processes that are about
    to report why they end would be terminated for having lost a peer.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if is_main():
        time.sleep(LAST_AFTER)
    os._exit(code)


def is_lost_peer(error: Exception) -> bool:
    """Returns whether an error of a step means that another process is lost."""
    text = str(error)
    named = any(word in text.lower() for word in _LOSS_WORDS)
    return jax.process_count() > 1 and named and text.lstrip().startswith(_LOSS_STATUS)


# ----------------------------------------------------------------------------------------- values


def place(tree: Any, shardings: Any) -> Any:
    """Places host arrays, the same on every process, on devices; each process copies its shards.

    Args:
      shardings: One sharding (None: jax's default), or a pytree of them in the structure of `tree`.
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
    """Returns whole device arrays as NumPy arrays, on every process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def from_main(tree: Any) -> Any:
    """Returns the NumPy arrays of process 0, on every process."""
    if jax.process_count() == 1:
        return tree
    shapes = jax.tree.map(lambda value: np.asarray(value).dtype, tree)
    sent = multihost_utils.broadcast_one_to_all(tree)
    return jax.tree.map(lambda value, dtype: np.asarray(value, dtype), sent, shapes)


def all_texts(text: str) -> list[str]:
    """Returns the texts of all processes, on every process."""
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
