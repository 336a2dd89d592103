"""Where a run is: its state before step 1, from a checkpoint, and into one."""

import hashlib
import json
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from drlora_jax.allocation import CapacityState, masks_from_ranks
from drlora_jax.config import to_dict
from drlora_jax.parallel import mesh as mesh_lib
from drlora_jax.parallel import processes
from drlora_jax.runs.checkpoint import Checkpoints
from drlora_jax.runs.provenance import versions
from drlora_jax.training.program import Run, initial_state, shardings_of
from drlora_jax.training.step import TrainState

# Of the config: where things are may differ by host, what they are may not and is compared.
PLACES = (
    ("run", "dir"),
    ("model", "path"),
    ("data", "path"),
    ("data", "eval_path"),
    ("allocation", "pattern"),
    ("allocation", "alpha_file"),
)
SHARED_WITHIN = 60  # seconds


class Position(NamedTuple):
    """Where a run is."""

    state: TrainState
    capacity: CapacityState
    tokens: int  # non-padding tokens so far


class Checkpoint(NamedTuple):
    """What a checkpoint holds: arrays and host values. The mask is derived from the ranks; the data
    position is step * batch_size and the dropout key is made of seed and step."""

    step: Any
    lora: Any
    opt_state: Any
    stats: Any
    ranks_LE: Any


def start(run: Run) -> Position:
    """The state before step 1, made on its shardings."""
    make = jax.jit(
        lambda: initial_state(run.job, run.tx, run.first_lora()),
        out_shardings=shardings_of(run.abstract_state),
    )
    return Position(make(), run.job.policy.init(), 0)


def restore(run: Run, checkpoints: Checkpoints, step: int) -> Position:
    """The state after `step`, on this run's mesh."""
    return _placed(run, *checkpoints.restore(step, _wanted(run), host_names=("tokens",)))


def restore_newest(run: Run, checkpoints: Checkpoints) -> tuple[Position, int] | None:
    """The newest state that is whole, on this run's mesh, and its step; None without any."""
    found = checkpoints.restore_newest(
        _wanted(run), host_names=("tokens",), step_of=lambda state: int(state.step)
    )
    return None if found is None else (_placed(run, found.state, found.host), found.step)


def _wanted(run: Run) -> Checkpoint:
    abstract = run.abstract_state
    ranks = jax.ShapeDtypeStruct(
        abstract.mask_LER.shape[:2], jnp.int32, sharding=mesh_lib.replicated(run.mesh)
    )
    return Checkpoint(abstract.step, abstract.lora, abstract.opt_state, abstract.stats, ranks)


def _placed(run: Run, saved: Checkpoint, host: dict) -> Position:
    capacity = CapacityState(np.array(processes.to_host(saved.ranks_LE)))
    mask_LER = place_mask(run, capacity)
    state = TrainState(saved.step, saved.lora, saved.opt_state, mask_LER, saved.stats)
    return Position(state, capacity, host["tokens"])


def save(
    run: Run, checkpoints: Checkpoints, position: Position, step: int, eval_loss: float | None
) -> None:
    check_processes_agree(run, f"before step {step} is saved", step, position)
    state = position.state
    ranks_LE = processes.place(position.capacity.ranks_LE, mesh_lib.replicated(run.mesh))
    arrays = Checkpoint(state.step, state.lora, state.opt_state, state.stats, ranks_LE)
    checkpoints.save(step, arrays, {"tokens": position.tokens}, eval_loss=eval_loss)


def place_mask(run: Run, capacity: CapacityState):
    # Same shape, dtype and sharding as ever: a new mask is new values, not a new program.
    mask_LER = masks_from_ranks(capacity.ranks_LE, run.job.adapter.max_rank)
    return processes.place(mask_LER, run.abstract_state.mask_LER.sharding)


def reordered(run: Run, state: TrainState, order_LER: np.ndarray, mask_LER) -> TrainState:
    """The state with its rank rows moved, on the same shardings."""
    order_LER = processes.place(order_LER, mask_LER.sharding)
    lora, opt_state = run.reorder(
        state.lora, state.opt_state, run.first_lora(), order_LER, mask_LER
    )
    return state._replace(lora=lora, opt_state=opt_state)


def check_run_dir_is_shared(run: Run) -> None:
    """Raises RunError when a process does not find the config.json that process 0 wrote: its part
    of a checkpoint would lie where nobody looks for it.
    """
    if jax.process_count() == 1:
        return
    file, limit = run.job.run_dir.config_file, time.monotonic() + SHARED_WITHIN
    written = processes.from_main(_file_digest(file))
    while not np.array_equal(_file_digest(file), written) and time.monotonic() < limit:
        time.sleep(1)  # network file systems show a new file late
    processes.check_agreement(
        "on run.dir, which must be one directory that all share",
        {"run.dir": processes.digest(_file_digest(file))},
        {"run.dir": processes.digest(written)},
    )


def _file_digest(file: pathlib.Path) -> np.ndarray:
    """sha256 of a file, u8 [32]; of nothing if it is not there."""
    content = file.read_bytes() if file.is_file() else b""
    return np.frombuffer(hashlib.sha256(content).digest(), np.uint8)


def check_processes_agree(run: Run, when: str, step: int, position: Position | None = None) -> None:
    """Raises RunError when the processes differ in what must be the same."""
    if jax.process_count() == 1:
        return
    config = to_dict(run.job.config)
    for section, name in PLACES:
        config[section].pop(name)
    fields = {
        "step": processes.digest(str(step)),
        "config": processes.digest(json.dumps(config)),
        "base": processes.digest(run.job.origin["base_fingerprint"]),
        "data": processes.digest(run.job.origin["data_fingerprint"]),
        "versions": processes.digest(json.dumps(versions())),
    }
    truths = {}
    if position is None:
        # What else decides how many steps, evaluations and collectives there are.
        fields |= {
            "schedule": processes.digest(f"{run.job.total_steps} {run.job.schedule_steps}"),
            "held-out data": processes.digest(*jax.tree.leaves(run.job.eval_batches)),
            "first ranks": processes.digest(run.job.policy.init().ranks_LE),
        }
    else:
        ranks_LE = position.capacity.ranks_LE
        expected_LER = masks_from_ranks(ranks_LE, run.job.adapter.max_rank)
        held = processes.digest_on_devices(position.state.mask_LER, expected_LER)
        fields |= {"ranks": processes.digest(ranks_LE), "mask": held}
        truths = {"mask": processes.digest(expected_LER)}
    processes.check_agreement(when, fields, truths)
