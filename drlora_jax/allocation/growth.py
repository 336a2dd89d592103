"""Grows ranks, event by event, until every layer's budget is met: the schedule, the greedy growth
and the statistics that `dr_lora` and `random` share.

Events happen every `interval` steps from the end of warm-up. At an event each layer distributes a
quota of ranks greedily by a score of its experts, at most `cap` per expert, until the layer's
budget E * r_target is met. Per layer l and expert i, over optimizer steps t:

    frequency    f <- beta f + (1 - beta) w,   w = combine weights of valid tokens / their number
    importance   I_k <- beta I_k + (1 - beta) |dL/dc_k|  for every rank k of an expert with tokens

After an event that grows ranks the importance is reset; the frequency is kept.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from drlora_jax.allocation.base import (
    CapacityShapes,
    CapacityState,
    Context,
    Event,
    Policy,
    StepStats,
    zero_stats,
)
from drlora_jax.allocation.measurements import IMPORTANCES, Importance, ImportanceName
from drlora_jax.allocation.schedule import EventFields, last_event_words
from drlora_jax.errors import UserError
from drlora_jax.system.fields import fraction, option, positive, require


class Stats(NamedTuple):
    frequency_LE: jax.Array  # f32, EMA
    importance_LPER: jax.Array  # f32, EMA since the last event
    updates_LE: jax.Array  # f32, importance updates since the last event


AXES = Stats("LE", "LPER", "LE")


@dataclass(frozen=True)
class GrowthFields(EventFields):
    """Fields of policies that grow ranks."""

    r_init: int = option(
        8, "active ranks of every expert at the start; with 0 it has no importance and grows late"
    )
    p_grow: float = option(
        0.1, "an expert gains at most ceil(p_grow * (r_max - r_init)) ranks per event"
    )
    frequency_decay: float = option(0.9, "decay per step of the routing frequency's average")
    importance_decay: float = option(0.9, "decay per step of the rank importance's average")
    frequency: Literal["weight", "count"] = option(
        "weight", "how the use of an expert is measured: by combine weights, or by assignments"
    )
    importance: ImportanceName = option(
        "gate_abs", "how the importance of a rank is measured; probe: of the next inactive rank"
    )

    def check(self, section) -> None:
        r_init, r_target, r_max = self.r_init, section.r_target, section.r_max
        require(
            0 <= r_init <= r_target <= r_max and r_max > 0,
            "allocation needs 0 <= r_init <= r_target <= r_max, "
            f"got {r_init}, {r_target}, {r_max}.",
        )
        self.check_events()
        fraction("allocation", {"importance_decay": self.importance_decay})
        positive("allocation", {"p_grow": self.p_grow})
        fraction("allocation", {"frequency_decay": self.frequency_decay})

    def refuses(self, section, adapter) -> str | None:
        if adapter.makes_experts and self.r_init == 0:
            return (
                f"allocation.r_init=0 with adapter.kind={adapter.kind}: experts without ranks are "
                "never chosen, so none could gain one; set allocation.r_init=1 or more."
            )
        return None

    @property
    def form(self) -> Importance:
        return IMPORTANCES[self.importance]


class Schedule(NamedTuple):
    first: int  # optimizer steps done at the first event
    interval: int
    count: int  # number of events that fit into the run
    # Per layer per event: ranks, or module slots as in the released code.
    quota: int
    cap: int  # the most ranks that one expert gains at an event

    @property
    def last(self) -> int:
        return self.first + (self.count - 1) * self.interval

    def is_event(self, step: int) -> bool:
        return self.first <= step <= self.last and (step - self.first) % self.interval == 0


class Growth(NamedTuple):
    """Describes where the ranks of a run start, and how they grow."""

    fields: GrowthFields
    shapes: CapacityShapes
    schedule: Schedule
    first_LE: np.ndarray  # i32, initial ranks, `r_init` on average
    r_target: int
    # Slots that one rank counts for when a layer is compared with `target`: 1, or the number of
    # projections as in the released code.
    slots_per_rank: int

    @property
    def target(self) -> int:
        """Returns the slots of a layer at the end."""
        return self.shapes.experts * self.r_target * self.slots_per_rank


def plan_growth(
    context: Context,
    fields: GrowthFields,
    first_LE: np.ndarray | None = None,
    *,
    slots_per_rank: int = 1,
) -> Growth:
    """Plans growth from `first_LE` (None: `r_init` everywhere) to `r_target`.

    Raises UserError when the schedule cannot reach the budget.
    """
    shapes = context.shapes
    slots = shapes.experts * slots_per_rank
    schedule = make_schedule(context, fields, slots * (context.r_target - fields.r_init))
    if first_LE is None:
        first_LE = np.full((shapes.layers, shapes.experts), fields.r_init, np.int32)
    plan = Growth(fields, shapes, schedule, first_LE, context.r_target, slots_per_rank)
    for first_E in np.unique(first_LE, axis=0):
        _check_reachable(schedule, first_E, shapes.max_rank, plan.target, slots_per_rank)
    return plan


def make_schedule(context: Context, fields: GrowthFields, needed: int) -> Schedule:
    """Returns when events happen, and how many of a layer's `needed` slots each distributes.

    Raises UserError when no event fits into the run although ranks are to grow.
    """
    first, last = fields.event_window(context)
    count = max(0, (last - first) // fields.interval + 1)
    if needed and not count:
        raise UserError(
            f"allocation: no growth event fits: warm-up ends at step {first}, "
            f"{last_event_words(last, context.total_steps, fields.interval)}. Lower "
            f"allocation.interval ({fields.interval}) or raise train.steps."
        )
    quota = math.ceil(needed / count) if count else 0
    room = context.shapes.max_rank - fields.r_init
    return Schedule(first, fields.interval, count, quota, max(1, math.ceil(fields.p_grow * room)))


def growing_policy(
    plan: Growth,
    name: str,
    score: Callable[[CapacityState, Stats, int], np.ndarray],
    *,
    accumulate: Callable[[Stats, StepStats], Stats] | None = None,
    notes: str = "",
) -> Policy:
    """Returns the policy that grows ranks by `score(state, stats, step)` [L, E].

    Args:
      accumulate: Updates the statistics in the step; None: as in the paper.
      notes: End of the line that describes the policy.
    """
    fields, shapes, schedule, target = plan.fields, plan.shapes, plan.schedule, plan.r_target
    unit = "slots" if plan.slots_per_rank > 1 else "ranks"
    return Policy(
        name=name,
        init=lambda: CapacityState(plan.first_LE.copy()),
        init_stats=lambda: zero_stats(AXES, shapes),
        accumulate=accumulate or functools.partial(_accumulate, fields),
        is_event=schedule.is_event,
        update=functools.partial(_update, plan, score),
        budget=shapes.experts * target,
        stat_axes=AXES,
        last_event=schedule.last if schedule.count else 0,
        measures=fields.form.measures,
        describe=(
            f"{name}: rank {_range(plan.first_LE, fields.r_init)} to a mean of {target} (at most "
            f"{shapes.max_rank}), {schedule.count} events at steps {schedule.first} to "
            f"{schedule.last}, {schedule.quota} {unit} per layer per event, at most {schedule.cap} "
            f"per expert{notes}"
        ),
    )


def _range(ranks_LE: np.ndarray, mean: int) -> str:
    least, most = ranks_LE.min(initial=mean), ranks_LE.max(initial=mean)
    return f"{mean}" if least == most else f"{mean} ({least} to {most}, by exponents)"


def _accumulate(fields: GrowthFields, stats: Stats, step: StepStats) -> Stats:
    """Updates the moving averages; runs inside the jitted step."""
    beta_f, beta_i = fields.frequency_decay, fields.importance_decay
    use_MLE = step.weight_MLE if fields.frequency == "weight" else step.count_MLE
    use_LE = jnp.sum(use_MLE, axis=0)
    use_LE = use_LE / jnp.maximum(jnp.sum(step.tokens_M), 1.0)
    now_LPER = fields.form.of(step)
    is_used_LE = jnp.sum(step.count_MLE, axis=0) > 0
    updated = beta_i * stats.importance_LPER + (1 - beta_i) * now_LPER
    return Stats(
        frequency_LE=beta_f * stats.frequency_LE + (1 - beta_f) * use_LE,
        importance_LPER=jnp.where(is_used_LE[:, None, :, None], updated, stats.importance_LPER),
        updates_LE=stats.updates_LE + is_used_LE,
    )


def _update(plan: Growth, score: Callable, state: CapacityState, stats: Stats, step: int):
    """Applies an event: every layer grows by the scores of its experts."""
    saliency_LE = score(state, stats, step)
    layers = zip(state.ranks_LE, saliency_LE, strict=True)
    ranks_LE = np.stack([_grow_layer(plan, *layer) for layer in layers])
    if (ranks_LE != state.ranks_LE).any():
        stats = Stats(
            np.asarray(stats.frequency_LE),
            np.zeros_like(stats.importance_LPER),
            np.zeros_like(stats.updates_LE),
        )
    state = CapacityState(ranks_LE.astype(np.int32))
    return state, stats, Event(saliency_LE.astype(np.float32))


def _grow_layer(plan: Growth, ranks_E: np.ndarray, saliency_E: np.ndarray) -> np.ndarray:
    return grow(
        ranks_E,
        saliency_E,
        quota=plan.schedule.quota,
        target=plan.target,
        cap=plan.schedule.cap,
        max_rank=plan.shapes.max_rank,
        slots_per_rank=plan.slots_per_rank,
    )


def grow(
    ranks_E,
    saliency_E,
    *,
    quota: int,
    target: int,
    cap: int,
    max_rank: int,
    slots_per_rank: int = 1,
):
    """Returns the ranks of one layer after an event: greedy by saliency, ties by expert index.

    Args:
      ranks_E: i32 [E].
      saliency_E: f32 [E]; NaN ranks last.
      quota: The most slots to distribute.
      target: Slots of the layer at the end.
      slots_per_rank: Slots that one rank counts for when the layer is compared with its target. An
        expert's gain is subtracted from the quota in ranks: the released code mixes the two units;
        with 1 they are the same.
    """
    ranks_E = ranks_E.copy()
    left = min(quota, target - slots_per_rank * int(ranks_E.sum()))
    for expert in np.argsort(-np.nan_to_num(saliency_E, nan=-np.inf), kind="stable"):
        if left <= 0:
            break
        gain = min(cap, max_rank - int(ranks_E[expert]), left)
        ranks_E[expert] += gain
        left -= gain
    return ranks_E


def _check_reachable(
    schedule: Schedule, first_E: np.ndarray, max_rank: int, target: int, slots_per_rank: int
) -> None:
    """Raises UserError when the schedule may miss a layer's budget.

    Simulates the schedule from the layer's initial ranks under the worst preferences, with the
    fewest ranks that each event can distribute. No real sequence of scores may be that bad, so the
    check errs on the strict side.
    """
    start, room_E, cap = int(first_E.sum()), max_rank - first_E, schedule.cap
    given, needed = 0, -(-target // slots_per_rank) - start
    for event in range(schedule.count):
        left = target - slots_per_rank * (start + given)
        if left <= 0:
            break
        room = _least_handed_out(room_E, event, cap, free=int(room_E.sum()) - given)
        given += min(schedule.quota, left, room)
    if given < needed:
        raise UserError(
            f"allocation: the budget cannot be reached: {schedule.count} events of "
            f"{schedule.quota} ranks, at most {cap} per expert per event and {max_rank} per expert "
            f"in total, may give only {start + given} of {target / slots_per_rank:g} ranks per "
            "layer. Raise allocation.p_grow or r_max, or lower interval."
        )


def _least_handed_out(room_E: np.ndarray, event: int, cap: int, *, free: int) -> int:
    """Returns the fewest ranks that an event can distribute, at most `cap` per expert.

    After `event` events an expert has at least `floor` = room - event * cap free ranks. An event
    distributes least when the remaining free ranks belong to the experts where they add least per
    rank: free ranks of an expert beyond `cap` add nothing.
    """
    floor_E = np.maximum(0, room_E - event * cap)
    at_floor_E, size_E = np.minimum(cap, floor_E), room_E - floor_E
    cost_E = np.minimum(cap, room_E) - at_floor_E
    least, spare = int(at_floor_E.sum()), max(0, free - int(floor_E.sum()))
    is_alike = (room_E == room_E[:1]).all()
    for expert in np.argsort(cost_E / np.maximum(size_E, 1), kind="stable"):
        if spare < size_E[expert]:
            # Part of an expert's ranks: exact where all experts are alike, else in proportion.
            part = min(cap, int(floor_E[expert]) + spare) - int(at_floor_E[expert])
            in_proportion = -(-int(cost_E[expert]) * spare // int(size_E[expert]))
            return least + (part if is_alike else in_proportion)
        least, spare = least + int(cost_E[expert]), spare - int(size_E[expert])
    return least
