"""Grows ranks by DR-LoRA's schedule, but for experts drawn at random: the control experiment that
shows what choosing experts by saliency is worth.
"""

import functools
from dataclasses import dataclass

import numpy as np

from drlora_jax.allocation.base import CapacityState, Context, Policy
from drlora_jax.allocation.growth import GrowthFields, Stats, growing_policy, plan_growth


@dataclass(frozen=True)
class RandomGrowth(GrowthFields):
    name = "random"
    text = "grows ranks by the schedule of dr_lora, for experts drawn at random"

    def make(self, context: Context) -> Policy:
        """Raises UserError when the schedule cannot reach the budget."""
        score = functools.partial(_draw, context.seed)
        return growing_policy(plan_growth(context, self), self.name, score)


def _draw(seed: int, state: CapacityState, stats: Stats, step: int) -> np.ndarray:
    return np.random.default_rng([seed, step]).random(state.ranks_LE.shape)
