"""AdaLoRA (arXiv 2303.10512) over experts: all experts start with `r_init` ranks, and the least
important ranks of a layer are pruned, event by event, until its budget is met.

AdaLoRA writes an update as P diag(lambda) Q and prunes triplets: a column of P, a singular value
and a row of Q. Here a triplet is a rank of an expert: its column of B, its gate c_k and its row of
A. The gate plays the part of lambda; its value is 1, so its AdaLoRA sensitivity |w dL/dw| is

    I_k = |dL/dc_k| = |sum_j A_kj dL/dA_kj| = |sum_i B_ik dL/dB_ik|                            (1)

which already covers the whole triplet. The sums over the entries of P and Q that AdaLoRA adds are
therefore left out, and with them two running averages of the size of every LoRA matrix. Over
optimizer steps t, with beta1 = `importance_decay` and beta2 = `uncertainty_decay`:

    I-   <- beta1 I-  + (1 - beta1) I                 smoothed sensitivity
    U    <- beta2 U   + (1 - beta2) |I - I-|          its uncertainty
    S_k  =  mean over projections of I- U                                                      (2)

An expert without tokens in a step has a zero gradient, hence I = 0: rarely chosen experts score
low. From the end of warm-up t0 to the last event t1 a layer may keep

    b(t) = b1 + (b0 - b1) (1 - (t - t0) / (t1 - t0))^3                                         (3)

ranks, rounded down, with b0 = E r_init and b1 = E r_target. AdaLoRA has one budget for the whole
model; here every layer has its own. The ranks with the largest S stay and move to the front of
their expert in their previous order; a pruned rank is reset to its state before step 1 and does not
return. An expert may lose all its ranks. There is no orthogonality penalty, since it concerns
singular vectors.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from drlora_jax.allocation.base import (
    CapacityState,
    Context,
    Event,
    Policy,
    StepStats,
    zero_stats,
)
from drlora_jax.allocation.measurements import IMPORTANCES, ImportanceName
from drlora_jax.allocation.schedule import EventFields, last_event_words
from drlora_jax.errors import UserError
from drlora_jax.system.fields import fraction, option, require


class Stats(NamedTuple):
    importance_LPER: jax.Array  # f32, EMA
    uncertainty_LPER: jax.Array  # f32, EMA


AXES = Stats("LPER", "LPER")


@dataclass(frozen=True)
class AdaLora(EventFields):
    name = "adalora"
    text = "AdaLoRA: prunes ranks from r_init to r_target, each layer's least important ones first"

    r_init: int = option(8, "active ranks of every expert at the start, to be pruned")
    importance_decay: float = option(0.9, "decay of the smoothed sensitivity, AdaLoRA's beta1")
    uncertainty_decay: float = option(
        0.85, "decay of the sensitivity's uncertainty, AdaLoRA's beta2"
    )
    importance: ImportanceName = option(
        "gate_abs", "how the sensitivity of a rank is measured; not probe"
    )

    def check(self, section) -> None:
        require(
            0 < section.r_target <= self.r_init <= section.r_max,
            "allocation.kind=adalora prunes from r_init to r_target and needs "
            f"0 < r_target <= r_init <= r_max, got r_target={section.r_target}, "
            f"r_init={self.r_init}, r_max={section.r_max}.",
        )
        self.check_events()
        fraction("allocation", {"importance_decay": self.importance_decay})
        fraction("allocation", {"uncertainty_decay": self.uncertainty_decay})
        require(
            not IMPORTANCES[self.importance].is_of_next_rank,
            "allocation.importance=probe scores the next inactive rank, but adalora prunes active "
            "ranks: set gate_abs, gate_sq or elementwise_product.",
        )

    def refuses(self, section, adapter) -> str | None:
        if adapter.shares_matrices:
            return (
                "allocation.kind=adalora reorders the ranks of each expert, but with "
                f"adapter.kind={adapter.kind} the experts of a layer share these ranks. Use a "
                "policy that does not prune, such as dr_lora or uniform."
            )
        return None

    def allocated_rank(self, section, adapter) -> int:
        return self.r_init

    def make(self, context: Context) -> Policy:
        """Raises UserError when no event fits into the run although ranks are to be pruned."""
        shapes, schedule = context.shapes, make_schedule(context, self)
        form = IMPORTANCES[self.importance]
        first_LE = np.full((shapes.layers, shapes.experts), self.r_init, np.int32)
        at = f" at steps {schedule.first + self.interval} to {schedule.last}"
        return Policy(
            name=self.name,
            init=lambda: CapacityState(first_LE.copy()),
            init_stats=lambda: zero_stats(AXES, shapes),
            accumulate=functools.partial(_accumulate, self),
            is_event=schedule.is_event,
            update=lambda state, stats, step: prune(state, stats, schedule.budget(step)),
            budget=schedule.target,
            stat_axes=AXES,
            last_event=schedule.last if schedule.count else 0,
            measures=form.measures,
            describe=(
                f"adalora: rank {self.r_init} pruned to a mean of {context.r_target}, "
                f"{schedule.count} events{at if schedule.count else ''}"
            ),
        )


class Schedule(NamedTuple):
    # Optimizer steps done at the end of warm-up; nothing is pruned yet.
    first: int
    interval: int
    count: int  # number of events, `interval` steps apart
    start: int  # ranks per layer at the start
    target: int  # ranks per layer after the last event

    @property
    def last(self) -> int:
        return self.first + self.count * self.interval

    def is_event(self, step: int) -> bool:
        return self.first < step <= self.last and (step - self.first) % self.interval == 0

    def budget(self, step: int) -> int:
        """Returns the ranks that a layer keeps after the event at `step`, equation (3)."""
        left, span = self.last - step, self.last - self.first
        return self.target + (self.start - self.target) * left**3 // span**3


def make_schedule(context: Context, fields: AdaLora) -> Schedule:
    """Returns the schedule of pruning events, empty if there is nothing to prune.

    Raises UserError when no event fits into the run although ranks are to be pruned.
    """
    (first, last), interval = fields.event_window(context), fields.interval
    experts, r_init, r_target = context.shapes.experts, fields.r_init, context.r_target
    count = max(0, (last - first) // interval) if r_init > r_target else 0
    if r_init > r_target and not count:
        raise UserError(
            f"allocation: no pruning event fits: warm-up ends at step {first}, the first event is "
            f"{interval} steps later, and {last_event_words(last, context.total_steps, interval)}. "
            f"Lower allocation.interval ({interval}) or raise train.steps."
        )
    return Schedule(first, interval, count, experts * r_init, experts * r_target)


def _accumulate(fields: AdaLora, stats: Stats, step: StepStats) -> Stats:
    """Updates the moving averages; runs inside the jitted step."""
    beta1, beta2 = fields.importance_decay, fields.uncertainty_decay
    now_LPER = IMPORTANCES[fields.importance].of(step)
    smooth_LPER = beta1 * stats.importance_LPER + (1 - beta1) * now_LPER
    apart_LPER = jnp.abs(now_LPER - smooth_LPER)
    return Stats(smooth_LPER, beta2 * stats.uncertainty_LPER + (1 - beta2) * apart_LPER)


def prune(state: CapacityState, stats: Stats, budget: int) -> tuple[CapacityState, Stats, Event]:
    """Applies an event: every layer keeps the `budget` ranks with the largest scores (2)."""
    importance_LPER, uncertainty_LPER = (np.asarray(value, np.float64) for value in stats)
    score_LER = (importance_LPER * uncertainty_LPER).mean(axis=1)
    layers = zip(score_LER, state.ranks_LE, strict=True)
    kept_LER = np.stack([keep_best(*layer, budget) for layer in layers])
    order_LER = np.argsort(~kept_LER, axis=-1, kind="stable").astype(np.int32)
    ranks_LE = kept_LER.sum(axis=-1).astype(np.int32)
    is_active_LER = np.arange(kept_LER.shape[-1]) < ranks_LE[..., None]

    def moved(value_LPER):
        rows_LPER = np.take_along_axis(np.asarray(value_LPER), order_LER[:, None], axis=-1)
        return np.where(is_active_LER[:, None], rows_LPER, np.float32(0))

    saliency_LE = np.where(kept_LER, score_LER, 0.0).sum(axis=-1)
    event = Event(saliency_LE.astype(np.float32), order_LER)
    return CapacityState(ranks_LE), Stats(*map(moved, stats)), event


def keep_best(score_ER: np.ndarray, ranks_E: np.ndarray, budget: int) -> np.ndarray:
    """Returns which `budget` active ranks of one layer have the largest scores, bool [E, R].

    Ties go to the lower rank, then to the lower expert, so that without any signal all experts are
    pruned equally. NaN counts as the lowest score.
    """
    rank_ER, expert_ER = np.broadcast_arrays(
        np.arange(score_ER.shape[1]), np.arange(score_ER.shape[0])[:, None]
    )
    is_active_ER = rank_ER < ranks_E[:, None]
    score_ER = np.where(np.isnan(score_ER), -np.inf, score_ER)
    keys = (expert_ER, rank_ER, -score_ER, ~is_active_ER)  # the last one decides first
    best = np.lexsort([key.ravel() for key in keys])[: min(budget, int(ranks_E.sum()))]
    kept_ER = np.zeros(score_ER.shape, bool)
    kept_ER.flat[best] = True
    return kept_ER
