"""DR-LoRA (arXiv 2601.04823): grows the ranks of experts, layer by layer, where saliency is high.

With the averages f and I of `allocation/growth.py`, per layer l and expert i:

    g  =  mean over projections of the mean over active ranks of I_k
    saliency     S = f g / (r + 1) ** gamma, with f and g divided by their sums over the layer

The averages are de-biased: each is divided by 1 - beta ** updates, expert by expert, so that an
expert with fewer updates since the last event does not score lower for that reason.

With `importance="probe"`, g estimates the benefit of one more rank instead of that of the active
ones: the squared gradient of the B row of the expert's next inactive rank, which is the decrease of
the loss by a small gradient step on that row. A row of B that is zero has no gate gradient, so new
ranks dilute the mean in the paper's g; the probe does not depend on the number of active ranks.

`released` reproduces the authors' code instead: ranks are counted in module slots (quota and target
are multiplied by the number of projections, but a step is counted once per expert), frequency is a
decayed sum of counts, the importance EMA is applied twice per micro-batch and is not de-biased, and
sums have an absolute floor of 1e-6. It may end slightly above the budget.
"""

import functools
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from drlora_jax.allocation.base import CapacityState, Context, Policy, StepStats
from drlora_jax.allocation.exponents import ExponentFields, spectral_prior, spectral_start
from drlora_jax.allocation.growth import GrowthFields, Stats, growing_policy, plan_growth
from drlora_jax.system.fields import option, require

RELEASED_FLOOR = 1e-6


@dataclass(frozen=True)
class DrLora(GrowthFields, ExponentFields):
    name = "dr_lora"
    text = "DR-LoRA: grows ranks from r_init to r_target where experts are used and ranks matter"

    gamma: float = option(1.2, "saliency = f * g / (rank + 1) ** gamma")
    saliency: Literal["product", "frequency", "importance"] = option(
        "product", "f * g, or one of them alone"
    )
    released: bool = option(
        False, "follow the authors' released code where it differs from the paper"
    )
    spectral_prior: float = option(
        0.0, "saliency * (alpha of the expert / mean alpha of its layer) ** spectral_prior; 0: off"
    )
    spectral_start: bool = option(
        False, "initial ranks of a layer's experts by alpha ** alpha_beta, r_init on average"
    )

    def check(self, section) -> None:
        self._check_spectral()
        super().check(section)
        require(self.gamma >= 0, f"allocation.gamma must be 0 or more, got {self.gamma}.")
        require(
            not self.released or (self.importance == "gate_abs" and self.saliency == "product"),
            "allocation.released=True fixes importance=gate_abs and saliency=product, "
            f"got {self.importance} and {self.saliency}.",
        )

    def _check_spectral(self) -> None:
        for name in ("spectral_prior", "spectral_start"):
            require(
                not (getattr(self, name) and self.released),
                f"allocation.{name}={getattr(self, name)} is not in the authors' code and cannot "
                "be combined with allocation.released=True; omit one of them.",
            )
        require(
            not self.spectral_start or self.r_init > 0,
            "allocation.spectral_start distributes r_init ranks per expert; set r_init to 1 or "
            "more.",
        )
        require(
            self.alpha_file is None or self.wants_exponents(),
            f"allocation.alpha_file={self.alpha_file} is used by kind=alphalora, spectral_prior "
            "and spectral_start, got kind=dr_lora without them; leave it out.",
        )

    def refuses(self, section, adapter) -> str | None:
        if adapter.makes_experts and self.wants_exponents():
            name = "spectral_start" if self.spectral_start else "spectral_prior"
            return (
                f"allocation.{name} compares the pretrained weights of a layer's experts, but the "
                f"experts of adapter.kind={adapter.kind} are new. Leave it out."
            )
        return super().refuses(section, adapter)

    def wants_exponents(self) -> bool:
        return self.spectral_prior != 0 or self.spectral_start

    def first_ranks_show_files(self) -> bool:
        return not self.spectral_prior

    def make(self, context: Context) -> Policy:
        """Raises UserError when the schedule cannot reach the budget."""
        alpha_LE = context.exponents().expert_LE if self.wants_exponents() else None
        first_LE = prior_LE = None
        if self.spectral_start:
            most = context.shapes.max_rank
            first_LE = spectral_start(alpha_LE, self.r_init, beta=self.alpha_beta, most=most)
        if self.spectral_prior:
            prior_LE = spectral_prior(alpha_LE, self.spectral_prior)
        return self.grown_from(context, first_LE, prior_LE)

    def grown_from(
        self,
        context: Context,
        first_LE: np.ndarray | None = None,
        prior_LE: np.ndarray | None = None,
    ) -> Policy:
        """Returns the policy that starts from the ranks `first_LE` (None: `r_init` everywhere) and
        multiplies the saliency of every expert by `prior_LE`.
        """
        slots = context.shapes.projections if self.released else 1
        notes = ", times a spectral prior" if self.spectral_prior else ""
        notes += " (as released: may end slightly above the budget)" if self.released else ""
        return growing_policy(
            plan_growth(context, self, first_LE, slots_per_rank=slots),
            self.name,
            functools.partial(_score, self, prior_LE),
            accumulate=functools.partial(_accumulate_released, self) if self.released else None,
            notes=notes,
        )


def _score(
    fields: DrLora, prior_LE: np.ndarray | None, state: CapacityState, stats: Stats, step: int
) -> np.ndarray:
    """Returns the saliency of every expert, f64 [L, E]."""
    importance_LPER = np.asarray(stats.importance_LPER, np.float64)
    mean_LPE = importance_LPER.sum(axis=-1)  # inactive ranks hold 0
    if not fields.form.is_of_next_rank:
        mean_LPE = mean_LPE / np.maximum(state.ranks_LE, 1)[:, None, :]
    g_LE, f_LE = mean_LPE.mean(axis=1), np.asarray(stats.frequency_LE)
    if not fields.released:
        updates_LE = np.asarray(stats.updates_LE, np.float64)
        bias_LE = 1.0 - fields.importance_decay**updates_LE
        g_LE = np.divide(g_LE, bias_LE, out=np.zeros_like(g_LE), where=bias_LE > 0)
    if fields.saliency == "frequency":
        g_LE = np.ones_like(g_LE)
    elif fields.saliency == "importance":
        f_LE = np.ones_like(f_LE)
    floor = RELEASED_FLOOR if fields.released else 0.0
    score_LE = saliency(f_LE, g_LE, state.ranks_LE, fields.gamma, floor)
    return score_LE if prior_LE is None else score_LE * prior_LE


def saliency(frequency_LE, importance_LE, ranks_LE, gamma: float, floor: float = 0.0):
    """Returns f g / (r + 1) ** gamma with f and g as shares of their layer, [L, E].

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


def _accumulate_released(fields: DrLora, stats: Stats, step: StepStats) -> Stats:
    """Accumulates as the released code does: counts without the factor (1 - beta), and two EMA
    updates per micro-batch with the absolute value of that micro-batch's gradient.
    """
    beta_f, beta_i = fields.frequency_decay, fields.importance_decay

    def micro_batch(carry, inputs):
        importance_LPER, updates_LE = carry
        gate_grad_LPER, count_LE = inputs
        updated = importance_LPER
        for _ in range(2):  # once for the A side and once for the B side, which are equal
            updated = beta_i * updated + (1 - beta_i) * jnp.abs(gate_grad_LPER)
        is_used_LE = count_LE > 0
        return (
            jnp.where(is_used_LE[:, None, :, None], updated, importance_LPER),
            updates_LE + is_used_LE,
        ), None

    carry = (stats.importance_LPER, stats.updates_LE)
    carry, _ = jax.lax.scan(micro_batch, carry, (step.gate_grad_MLPER, step.count_MLE))
    frequency_LE = beta_f * stats.frequency_LE + jnp.sum(step.count_MLE, axis=0)
    return Stats(frequency_LE, *carry)
