"""Creates the state of a run before step 1, and saves it to and restores it from checkpoints."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from drlora_jax.allocation import CapacityState
from drlora_jax.parallel import mesh as mesh_lib
from drlora_jax.parallel import processes
from drlora_jax.runs.checkpoint import Checkpoints
from drlora_jax.training.agreement import check_processes_agree
from drlora_jax.training.program import Run, initial_state, place_mask, shardings_of
from drlora_jax.training.step import TrainState


class Position(NamedTuple):
    """Holds the progress of a run: the state on its devices, and what the host tracks besides."""

    state: TrainState
    capacity: CapacityState
    # Non-padding tokens so far.
    tokens: int


class Checkpoint(NamedTuple):
    """Holds the arrays of a checkpoint. The mask is derived from the ranks, the data position is
    step * batch_size, and the dropout key is derived from seed and step.
    """

    step: Any
    lora: Any
    opt_state: Any
    stats: Any
    ranks_LE: Any


def start(run: Run) -> Position:
    """Returns the state before step 1, created on its shardings."""
    make = jax.jit(
        lambda: initial_state(run.job, run.tx, run.first_lora()),
        out_shardings=shardings_of(run.abstract_state),
    )
    return Position(make(), run.job.policy.init(), 0)


def restore(run: Run, checkpoints: Checkpoints, step: int) -> Position:
    """Returns the state after `step`, on this run's mesh."""
    return _placed(run, *checkpoints.restore(step, _wanted(run), host_names=("tokens",)))


def restore_newest(run: Run, checkpoints: Checkpoints) -> tuple[Position, int] | None:
    """Returns the newest undamaged state, on this run's mesh, and its step; None without one."""
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
