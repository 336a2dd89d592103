"""Changes ranks: at events between steps, and by a profile of the training data before step 1.

The policy decides on the host of process 0, and the other processes receive its decision. The step
receives new values of its mask, never new shapes.
"""

from collections.abc import Callable

import jax
import numpy as np

from drlora_jax.allocation import CapacityState, Event
from drlora_jax.parallel import mesh as mesh_lib
from drlora_jax.parallel import processes
from drlora_jax.training.agreement import check_processes_agree
from drlora_jax.training.program import Run, place_mask, shardings_of
from drlora_jax.training.state import Position, start
from drlora_jax.training.step import TrainState


def start_profiled(run: Run, params, done: Callable[[], None] = lambda: None) -> Position:
    """Returns the start of a new run: as initialised, or as the policy decides from its profile."""
    position, wanted = start(run), run.job.policy.profile
    if wanted is None:
        return position
    capacity, event = wanted.decide(profile(run, params, position.state, done))
    log_event(run, 0, capacity, event)
    state = position.state._replace(mask_LER=place_mask(run, capacity))
    return Position(state, capacity, 0)


def profile(
    run: Run, params, state: TrainState, done: Callable[[], None] = lambda: None
) -> dict[str, np.ndarray]:
    """Returns what the policy's profile measures, by name, summed over the first rows of the
    training data in whole batches. B is still zero, so the base model is measured. `done` is called
    after each batch.
    """
    section, wanted = run.job.config.train, run.job.policy.profile
    rows = section.batch_size // section.micro_batches
    totals = dict.fromkeys(wanted.measures, 0.0)
    for first in range(0, wanted.rows, rows):
        batch = run.job.loader.batch(first)
        micro = jax.tree.map(lambda array: array[:rows], batch)
        micro = processes.place(micro, mesh_lib.rows(run.mesh))
        for name in wanted.measures:
            totals[name] = totals[name] + PROFILE_PASSES[name](run, params, state, micro)
        done()
    return totals


def choices(run: Run, params, state: TrainState, batch) -> np.ndarray:
    """Counts how often valid tokens choose each expert in a forward pass, f64 [L, E]."""
    _, _, stats = run.eval_step(params, state.lora, state.mask_LER, batch)
    return np.asarray(stats.count_E, np.float64)


# What a profile can measure: passes over a batch, (run, params, state, batch) -> array.
PROFILE_PASSES = {"choices": choices}


def grow(run: Run, position: Position, step: int, routing: dict | None = None) -> Position:
    """Applies an event: copies the statistics to the host, lets the policy decide the new ranks,
    and places the new mask.

    All processes hold the same statistics; process 0 decides.
    """
    check_processes_agree(run, f"at the event after step {step}", step, position)
    state, policy = position.state, run.job.policy
    stats = processes.to_host(state.stats)
    decided = processes.from_main(policy.update(position.capacity, stats, step))
    capacity, stats, event = decided
    mask_LER = place_mask(run, capacity)
    if event.order_LER is not None:
        state = reordered(run, state, event.order_LER, mask_LER)
    stats = processes.place(stats, shardings_of(run.abstract_state.stats))
    state = state._replace(mask_LER=mask_LER, stats=stats)
    log_event(run, step, capacity, event, routing)
    return Position(state, capacity, position.tokens)


def reordered(run: Run, state: TrainState, order_LER: np.ndarray, mask_LER) -> TrainState:
    """Returns the state with its rank rows reordered, on the same shardings."""
    order_LER = processes.place(order_LER, mask_LER.sharding)
    lora, opt_state = run.reorder(
        state.lora, state.opt_state, run.first_lora(), order_LER, mask_LER
    )
    return state._replace(lora=lora, opt_state=opt_state)


def log_event(
    run: Run, step: int, capacity: CapacityState, event: Event, routing: dict | None = None
) -> None:
    layers, budget = run.job.expert_layers, run.job.policy.budget
    run.job.run_dir.log_ranks(step, layers, capacity.ranks_LE, event.saliency_LE, budget, routing)
