"""AdaLoRA (arXiv 2303.10512) over experts: all start with `r_init` ranks, and the least important
ranks of a layer are pruned, event by event, until its budget is met.

AdaLoRA writes an update as P diag(lambda) Q and prunes triplets: a column of P, a singular value
and a row of Q. Here a triplet is a rank of an expert: its column of B, its gate c_k and its row of
A. The gate is what lambda is there; its value is 1, so AdaLoRA's sensitivity |w dL/dw| of it is

    I_k = |dL/dc_k| = |sum_j A_kj dL/dA_kj| = |sum_i B_ik dL/dB_ik|                            (1)

which already speaks for the whole triplet, so that the sums over the entries of P and Q that
AdaLoRA adds are left out, and with them two averages of the size of every factor. Over optimizer
steps t, with beta1 = `importance_decay` and beta2 = `uncertainty_decay`:

    I-   <- beta1 I-  + (1 - beta1) I                 smoothed sensitivity
    U    <- beta2 U   + (1 - beta2) |I - I-|          its uncertainty
    S_k  =  mean over projections of I- U                                                      (2)

An expert without tokens in a step has I = 0, as the gradient says: that is how being chosen seldom
counts. From the end of warm-up t0 to the last event t1 a layer may keep

    b(t) = b1 + (b0 - b1) (1 - (t - t0) / (t1 - t0))^3                                         (3)

ranks, b0 = E r_init and b1 = E r_target, rounded down; AdaLoRA has one budget for the whole model,
this one for each layer. The ranks with the largest S stay. They move to the front of their expert
in the order they had; a pruned rank is as before step 1 and does not come back. An expert may lose
all its ranks. There is no orthogonality penalty, which is about singular vectors.
"""

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

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

if TYPE_CHECKING:
    import jax


class Stats(NamedTuple):
    importance_LPER: "jax.Array"  # f32, EMA
    uncertainty_LPER: "jax.Array"  # f32, EMA


AXES = Stats("LPER", "LPER")


@dataclass(frozen=True)
class AdaLora(EventFields):
    name = "adalora"
    text = "AdaLoRA: ranks are pruned from r_init to r_target, the least important of a layer first"

    r_init: int = option(8, "active ranks of every expert at the start, to be pruned")
    importance_decay: float = option(0.9, "of the smoothed sensitivity, AdaLoRA's beta1")
    uncertainty_decay: float = option(0.85, "of the sensitivity's uncertainty, AdaLoRA's beta2")
    importance: ImportanceName = option(
        "gate_abs", "how the sensitivity of a rank is measured; not probe"
    )

    def check(self, section) -> None:
        require(
            0 < section.r_target <= self.r_init <= section.r_max,
            "allocation.kind=adalora prunes from r_init to r_target: it needs 0 < r_target <= "
            f"r_init <= r_max, got r_target={section.r_target}, r_init={self.r_init}, "
            f"r_max={section.r_max}.",
        )
        self.check_events()
        fraction("allocation", {"importance_decay": self.importance_decay})
        fraction("allocation", {"uncertainty_decay": self.uncertainty_decay})
        require(
            not IMPORTANCES[self.importance].is_of_next_rank,
            "allocation.importance=probe measures the next rank, and adalora prunes the present "
            "ones: set gate_abs, gate_sq or elementwise_product.",
        )

    def refuses(self, section, adapter) -> str | None:
        if adapter.shares_matrices:
            return (
                "allocation.kind=adalora moves the ranks of an expert that stay to the front, and "
                f"with adapter.kind={adapter.kind} the experts of a layer share these ranks. Use a "
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
    first: int  # optimizer steps done at the end of warm-up; nothing is pruned yet
    interval: int
    count: int  # events, each `interval` after the one before
    start: int  # ranks of a layer at first
    target: int  # and after the last event

    @property
    def last(self) -> int:
        return self.first + self.count * self.interval

    def is_event(self, step: int) -> bool:
        return self.first < step <= self.last and (step - self.first) % self.interval == 0

    def budget(self, step: int) -> int:
        """Ranks a layer may have after the event at `step`, equation (3) in whole numbers."""
        left, span = self.last - step, self.last - self.first
        return self.target + (self.start - self.target) * left**3 // span**3


def make_schedule(context: Context, fields: AdaLora) -> Schedule:
    """Returns when events happen; none if there is nothing to prune.

    Raises UserError when no event fits into the run although ranks are to be pruned.
    """
    (first, last), interval = fields.event_window(context), fields.interval
    experts, r_init, r_target = context.shapes.experts, fields.r_init, context.r_target
    count = max(0, (last - first) // interval) if r_init > r_target else 0
    if r_init > r_target and not count:
        raise UserError(
            f"allocation: no pruning event fits: warm-up ends at step {first}, an event comes "
            f"{interval} steps later at the earliest, and "
            f"{last_event_words(last, context.total_steps, interval)}. Lower allocation.interval "
            f"({interval}) or raise train.steps."
        )
    return Schedule(first, interval, count, experts * r_init, experts * r_target)


def _accumulate(fields: AdaLora, stats: Stats, step: StepStats) -> Stats:
    """Moves the averages by one step; jnp, in the step."""
    import jax.numpy as jnp

    beta1, beta2 = fields.importance_decay, fields.uncertainty_decay
    now_LPER = IMPORTANCES[fields.importance].of(step)
    smooth_LPER = beta1 * stats.importance_LPER + (1 - beta1) * now_LPER
    apart_LPER = jnp.abs(now_LPER - smooth_LPER)
    return Stats(smooth_LPER, beta2 * stats.uncertainty_LPER + (1 - beta2) * apart_LPER)


def prune(state: CapacityState, stats: Stats, budget: int) -> tuple[CapacityState, Stats, Event]:
    """An event: every layer keeps the `budget` ranks with the largest scores, equation (2)."""
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
    """bool [E, R]: the `budget` active ranks of one layer with the largest scores.

    Of equal scores the lower rank stays, then the lower expert: without any signal all experts are
    cut alike. NaN counts as the lowest.
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
