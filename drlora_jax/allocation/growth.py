"""Ranks that grow, event by event, until every layer's budget is met: schedule, greedy growth and
the statistics that `dr_lora` and `random` share.

Events come every `interval` steps from the end of warm-up. At an event each layer shares out a
quota of ranks greedily by a score of its experts, at most `cap` to one expert, until the layer's
budget N * r_target is met. Per layer l and expert i, over optimizer steps t:

    frequency    f <- beta f + (1 - beta) w,   w = combine weights of valid tokens / their number
    importance   I_k <- beta I_k + (1 - beta) |dL/dc_k|  for every rank k of an expert with tokens

After growth the importance starts anew; the frequency goes on.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

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

if TYPE_CHECKING:
    import jax


class Stats(NamedTuple):
    frequency_LE: "jax.Array"  # f32, EMA
    importance_LPER: "jax.Array"  # f32, EMA since the last event
    updates_LE: "jax.Array"  # f32, importance updates since the last event


AXES = Stats("LE", "LPER", "LE")


@dataclass(frozen=True)
class GrowthFields(EventFields):
    """Fields of policies that grow ranks."""

    r_init: int = option(
        8, "active ranks of every expert at the start; from 0 it has no importance and grows late"
    )
    p_grow: float = option(
        0.1, "an expert gains at most ceil(p_grow * (r_max - r_init)) ranks per event"
    )
    frequency_decay: float = option(0.9, "of the moving average of the routing frequency, per step")
    importance_decay: float = option(0.9, "of the moving average of the rank importance, per step")
    frequency: Literal["weight", "count"] = option(
        "weight", "what counts as use of an expert: combine weights, or how often it is chosen"
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
                f"allocation.r_init=0 with adapter.kind={adapter.kind}: its experts without a "
                "rank are never chosen, so none could earn one; set allocation.r_init=1 or more."
            )
        return None

    @property
    def form(self) -> Importance:
        return IMPORTANCES[self.importance]


class Schedule(NamedTuple):
    first: int  # optimizer steps done at the first event
    interval: int
    count: int  # events there is room for
    quota: int  # per layer and event: expert ranks, or module slots if released
    cap: int  # ranks one expert may gain at an event

    @property
    def last(self) -> int:
        return self.first + (self.count - 1) * self.interval

    def is_event(self, step: int) -> bool:
        return self.first <= step <= self.last and (step - self.first) % self.interval == 0


class Growth(NamedTuple):
    """Where the ranks of a run's experts start, and how they grow."""

    fields: GrowthFields
    shapes: CapacityShapes
    schedule: Schedule
    first_LE: np.ndarray  # i32, ranks at the start, `r_init` on average
    r_target: int
    # 1; as released, the projections: what one rank counts when the layer is compared with `target`
    slots_per_rank: int

    @property
    def target(self) -> int:
        """Slots of a layer at the end."""
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
    """Returns when events happen and what one shares out of the `needed` slots of a layer.

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
      accumulate: of the statistics; None: `accumulate` of this file.
      notes: end of the line that describes the policy.
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
            f"{schedule.last}, {schedule.quota} {unit} a layer and event, at most {schedule.cap} "
            f"an expert{notes}"
        ),
    )


def _range(ranks_LE: np.ndarray, mean: int) -> str:
    least, most = ranks_LE.min(initial=mean), ranks_LE.max(initial=mean)
    return f"{mean}" if least == most else f"{mean} ({least} to {most}, by exponents)"


def _accumulate(fields: GrowthFields, stats: Stats, step: StepStats) -> Stats:
    """Moves the averages by one step; jnp, in the step."""
    import jax.numpy as jnp

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
    """An event: every layer grows by the scores of its experts."""
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
      ranks_E: i32 [E]. saliency_E: f32 [E]; NaN never wins.
      quota, target: what may be handed out, and the layer's goal, in slots.
      slots_per_rank: slots one rank counts for when the layer is compared with its target. What an
        expert gains is taken off the quota rank by rank; the released code mixes the two units,
        consistent units have 1.
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
    """Plays a layer's schedule from its first ranks against the worst preferences: the fewest ranks
    that any can hand out. A preference that comes to this may not exist, so the check errs on the
    strict side.
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
            f"allocation: the budget can not be reached: {schedule.count} events of "
            f"{schedule.quota} ranks, at most {cap} an expert and {max_rank} in all, "
            f"may give only {start + given} of {target / slots_per_rank:g} ranks a layer. "
            "Raise allocation.p_grow or r_max, or lower interval."
        )


def _least_handed_out(room_E: np.ndarray, event: int, cap: int, *, free: int) -> int:
    """The fewest ranks that an event can hand out, at most `cap` to an expert.

    After so many events an expert has at least `floor` = room - event * cap ranks free. The least
    is left to hand out when the other free ranks lie where they add least for their number: what an
    expert has free above `cap` adds nothing.
    """
    floor_E = np.maximum(0, room_E - event * cap)
    at_floor_E, size_E = np.minimum(cap, floor_E), room_E - floor_E
    cost_E = np.minimum(cap, room_E) - at_floor_E
    least, spare = int(at_floor_E.sum()), max(0, free - int(floor_E.sum()))
    is_alike = (room_E == room_E[:1]).all()
    for expert in np.argsort(cost_E / np.maximum(size_E, 1), kind="stable"):
        if spare < size_E[expert]:
            # A part of an expert's: exact where all are alike, else what it adds in proportion.
            part = min(cap, int(floor_E[expert]) + spare) - int(at_floor_E[expert])
            in_proportion = -(-int(cost_E[expert]) * spare // int(size_E[expert]))
            return least + (part if is_alike else in_proportion)
        least, spare = least + int(cost_E[expert]), spare - int(size_E[expert])
    return least
