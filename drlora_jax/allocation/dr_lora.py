"""DR-LoRA (arXiv 2601.04823): the ranks of experts grow, layer by layer, where saliency is high.

Per layer l and expert i, over optimizer steps t:

    frequency    f <- beta f + (1 - beta) w,   w = combine weights of valid tokens / their number
    importance   I_k <- beta I_k + (1 - beta) |dL/dc_k|  for every rank k of an expert with tokens,
                 g = mean over projections of the mean over active ranks of I_k
    saliency     S = f g / (r + 1) ** gamma, with f and g divided by their sums over the layer

Events come every `interval` steps from the end of warm-up. At an event each layer hands out a quota
of ranks greedily by saliency, at most `cap` to one expert, until the layer's budget N * r_target is
met. Then the importance starts anew; the frequency goes on. A young average is divided by 1 - beta
** updates, expert by expert, so that an expert that was updated less often since the reset is not
scored lower for it.

With `importance="probe"` g is what one more rank would bring, instead of what the present ones
bring: the squared gradient of the B row of the expert's next inactive rank, which is what a small
gradient step on it would take off the loss. A row of B that is zero has no gate gradient, so new
ranks dilute the mean of the paper's g; the probe does not depend on the ranks there are.

`released` does what the authors' code does instead: ranks are counted in module slots (quota and
target times the projections, one step counted once per expert), frequency is a decayed sum of
counts, the importance EMA is applied twice a micro-batch and is not de-biased, and sums are floored
at 1e-6 absolute. It may end a little above the budget.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from drlora_jax.allocation.base import (
    CapacityShapes,
    CapacityState,
    Event,
    Policy,
    StepStats,
    rank_importance,
)
from drlora_jax.allocation.schedule import event_window, last_event_words
from drlora_jax.errors import UserError

RELEASED_FLOOR = 1e-6


class Stats(NamedTuple):
    frequency_LE: jax.Array  # f32, EMA
    importance_LPER: jax.Array  # f32, EMA since the last event
    updates_LE: jax.Array  # f32, importance updates since the last event


class Schedule(NamedTuple):
    first: int  # optimizer steps done at the first event
    interval: int
    count: int  # events there is room for
    quota: int  # per layer and event: expert ranks, or module slots if released
    cap: int  # ranks one expert may gain at an event

    @property
    def last(self) -> int:
        return self.first + (self.count - 1) * self.interval


def make_schedule(
    *,
    total_steps: int,
    warmup_ratio: float,
    interval: int,
    last_event: int | None,
    slots: int,
    r_init: int,
    r_target: int,
    r_max: int,
    p_grow: float,
) -> Schedule:
    """When events happen and what one hands out; `slots` = experts, or experts * projections if
    released.

    Raises UserError when no event fits into the run although ranks are to grow.
    """
    first, last = event_window(
        total_steps=total_steps,
        warmup_ratio=warmup_ratio,
        interval=interval,
        last_event=last_event,
    )
    count = max(0, (last - first) // interval + 1)
    needed = slots * (r_target - r_init)
    if needed and not count:
        raise UserError(
            f"allocation: no growth event fits: warm-up ends at step {first}, "
            f"{last_event_words(last, total_steps, interval)}. Lower allocation.interval "
            f"({interval}) or raise train.steps."
        )
    quota = math.ceil(needed / count) if count else 0
    return Schedule(first, interval, count, quota, max(1, math.ceil(p_grow * (r_max - r_init))))


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
    """One layer's event: greedy by saliency, ties by expert index. Returns the new ranks.

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


def saliency(frequency_LE, importance_LE, ranks_LE, gamma: float, floor: float = 0.0):
    """f g / (r + 1) ** gamma with f and g as shares of their layer, [L, E].

    A layer whose f (or g) is all zero has no preference: equal shares. `floor` is the released
    code's absolute 1e-6.
    """
    frequency_LE, importance_LE = (
        _layer_shares(value, floor) for value in (frequency_LE, importance_LE)
    )
    return (frequency_LE + floor) * (importance_LE + floor) / (ranks_LE + 1.0) ** gamma


def _layer_shares(value_LE, floor):
    value_LE = np.asarray(value_LE, np.float64)
    total_L1 = value_LE.sum(axis=1, keepdims=True)
    if floor:
        return value_LE / np.maximum(total_L1, floor)
    equal = np.full_like(value_LE, 1.0 / value_LE.shape[1])
    return np.divide(value_LE, total_L1, out=equal, where=total_L1 > 0)


def dr_lora(
    shapes: CapacityShapes,
    *,
    total_steps: int,
    r_init: int,
    r_target: int,
    interval: int,
    p_grow: float,
    gamma: float,
    frequency_decay: float,
    importance_decay: float,
    warmup_ratio: float,
    last_event: int | None = None,
    frequency: str = "weight",
    importance: str = "gate_abs",
    score: str = "product",
    released: bool = False,
    seed: int = 0,
    prior_LE: np.ndarray | None = None,
    first_LE: np.ndarray | None = None,
) -> Policy:
    """The policy for `shapes`; arguments are the fields of the config section `allocation`, a
    factor of every expert's saliency (`alphalora.spectral_prior`), and ranks to start from,
    `r_init` on average in every layer (`alphalora.spectral_start`; None: `r_init` everywhere).

    Raises UserError when the schedule can not reach the budget.
    """
    slots_per_rank = shapes.projections if released else 1
    schedule = make_schedule(
        total_steps=total_steps,
        warmup_ratio=warmup_ratio,
        interval=interval,
        last_event=last_event,
        slots=shapes.experts * slots_per_rank,
        r_init=r_init,
        r_target=r_target,
        r_max=shapes.max_rank,
        p_grow=p_grow,
    )
    target = shapes.experts * r_target * slots_per_rank

    def grow_layer(ranks_E, saliency_E):
        return grow(
            ranks_E,
            saliency_E,
            quota=schedule.quota,
            target=target,
            cap=schedule.cap,
            max_rank=shapes.max_rank,
            slots_per_rank=slots_per_rank,
        )

    if first_LE is None:
        first_LE = np.full((shapes.layers, shapes.experts), r_init, np.int32)
    for first_E in np.unique(first_LE, axis=0):
        _check_reachable(schedule, first_E, shapes.max_rank, target, slots_per_rank)

    def init_stats():
        return Stats(
            frequency_LE=jnp.zeros((shapes.layers, shapes.experts), jnp.float32),
            importance_LPER=jnp.zeros(shapes, jnp.float32),
            updates_LE=jnp.zeros((shapes.layers, shapes.experts), jnp.float32),
        )

    def accumulate(stats: Stats, step: StepStats) -> Stats:
        if released:
            return _accumulate_released(stats, step, frequency_decay, importance_decay)
        use_LE = jnp.sum(step.weight_MLE if frequency == "weight" else step.count_MLE, axis=0)
        use_LE = use_LE / jnp.maximum(jnp.sum(step.tokens_M), 1.0)
        now_LPER = rank_importance(step, importance)
        is_used_LE = jnp.sum(step.count_MLE, axis=0) > 0
        updated = importance_decay * stats.importance_LPER + (1 - importance_decay) * now_LPER
        return Stats(
            frequency_LE=frequency_decay * stats.frequency_LE + (1 - frequency_decay) * use_LE,
            importance_LPER=jnp.where(is_used_LE[:, None, :, None], updated, stats.importance_LPER),
            updates_LE=stats.updates_LE + is_used_LE,
        )

    def score_experts(state: CapacityState, stats: Stats, step: int):
        ranks_LE = state.ranks_LE
        if score == "random":
            return np.random.default_rng([seed, step]).random(ranks_LE.shape)
        importance_LPER = np.asarray(stats.importance_LPER, np.float64)
        mean_LPE = importance_LPER.sum(axis=-1)  # inactive ranks hold 0; a probe is one rank
        if importance != "probe":
            mean_LPE = mean_LPE / np.maximum(ranks_LE, 1)[:, None, :]
        g_LE, f_LE = mean_LPE.mean(axis=1), np.asarray(stats.frequency_LE)
        if not released:
            bias_LE = 1.0 - importance_decay ** np.asarray(stats.updates_LE, np.float64)
            g_LE = np.divide(g_LE, bias_LE, out=np.zeros_like(g_LE), where=bias_LE > 0)
        if score == "frequency":
            g_LE = np.ones_like(g_LE)
        elif score == "importance":
            f_LE = np.ones_like(f_LE)
        score_LE = saliency(f_LE, g_LE, ranks_LE, gamma, RELEASED_FLOOR if released else 0.0)
        return score_LE if prior_LE is None else score_LE * prior_LE

    def update(state: CapacityState, stats: Stats, step: int):
        saliency_LE = score_experts(state, stats, step)
        ranks_LE = np.stack(
            [grow_layer(*layer) for layer in zip(state.ranks_LE, saliency_LE, strict=True)]
        )
        if (ranks_LE != state.ranks_LE).any():
            zeros = np.zeros_like
            stats = Stats(
                np.asarray(stats.frequency_LE),
                zeros(stats.importance_LPER),
                zeros(stats.updates_LE),
            )
        state = CapacityState(ranks_LE.astype(np.int32))
        return state, stats, Event(saliency_LE.astype(np.float32))

    last, name = schedule.last, "random" if score == "random" else "dr_lora"
    return Policy(
        name=name,
        init=lambda: CapacityState(first_LE.copy()),
        init_stats=init_stats,
        accumulate=accumulate,
        is_event=lambda step: (
            schedule.first <= step <= last and (step - schedule.first) % interval == 0
        ),
        update=update,
        budget=shapes.experts * r_target,
        last_event=schedule.last if schedule.count else 0,
        needs_elementwise=importance == "elementwise_product",
        needs_probe=importance == "probe",
        describe=(
            f"{name}: rank {_range(first_LE, r_init)} to a mean of {r_target} (at most "
            f"{shapes.max_rank}), {schedule.count} events at "
            f"steps {schedule.first} to {last}, {schedule.quota} "
            f"{'slots' if released else 'ranks'} a layer and event, "
            f"at most {schedule.cap} an expert"
            + (", times a spectral prior" if prior_LE is not None else "")
            + (" (as released: may end a little above the budget)" if released else "")
        ),
    )


def _range(ranks_LE: np.ndarray, mean: int) -> str:
    least, most = ranks_LE.min(initial=mean), ranks_LE.max(initial=mean)
    return f"{mean}" if least == most else f"{mean} ({least} to {most}, by exponents)"


def _accumulate_released(
    stats: Stats, step: StepStats, frequency_decay: float, importance_decay: float
) -> Stats:
    """Counts without (1 - beta), and two EMA updates a micro-batch with the absolute value of its
    own gradient.
    """

    def micro_batch(carry, inputs):
        importance_LPER, updates_LE = carry
        gate_grad_LPER, count_LE = inputs
        updated = importance_LPER
        for _ in range(2):  # once for the A side and once for the B side, which are equal
            updated = importance_decay * updated + (1 - importance_decay) * jnp.abs(gate_grad_LPER)
        is_used_LE = count_LE > 0
        return (
            jnp.where(is_used_LE[:, None, :, None], updated, importance_LPER),
            updates_LE + is_used_LE,
        ), None

    carry = (stats.importance_LPER, stats.updates_LE)
    carry, _ = jax.lax.scan(micro_batch, carry, (step.gate_grad_MLPER, step.count_MLE))
    frequency_LE = frequency_decay * stats.frequency_LE + jnp.sum(step.count_MLE, axis=0)
    return Stats(frequency_LE, *carry)


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
