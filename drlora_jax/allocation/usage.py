"""Grades ranks by use: the base model reads some rows of the training data and counts, layer by
layer, how often valid tokens choose each expert. Of a layer's E * r_target ranks, expert e gets

    r_e  ~  use_e ** power,      r_init <= r_e <= r_max                                        (1)

rounded to integers by largest remainder. Shares outside the bounds are clipped, and the other
experts share the rest in proportion; where all used experts have r_max, the unused ones share the
rest equally. Nothing changes afterwards.
"""

import bisect
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from drlora_jax.allocation.base import Context, Policy
from drlora_jax.allocation.profiled import ProfileFields
from drlora_jax.system.fields import option, require


@dataclass(frozen=True)
class Usage(ProfileFields):
    name = "usage"
    text = "gives ranks in proportion to a power of each expert's use, from r_init to r_max"

    r_init: int = option(8, "the fewest ranks of an expert")
    power: float = option(0.5, "ranks are in proportion to use ** power; 0: all equal")

    def check(self, section) -> None:
        super().check(section)
        require(
            0 <= self.r_init <= section.r_target <= section.r_max,
            "allocation.kind=usage needs 0 <= r_init <= r_target <= r_max, "
            f"got {self.r_init}, {section.r_target}, {section.r_max}.",
        )
        require(self.power >= 0, f"allocation.power must be 0 or more, got {self.power}.")

    def make(self, context: Context) -> Policy:
        budget, most = context.shapes.experts * context.r_target, context.shapes.max_rank
        return self.decided_by_use(
            context,
            lambda use_E: graded(use_E, budget, power=self.power, least=self.r_init, most=most),
            describe=(
                f"usage: rank {self.r_init} to {most}, a mean of {context.r_target}, in proportion "
                f"to use ** {self.power:g} over {self.profile_rows} rows"
            ),
        )


def graded(use_E: np.ndarray, total: int, *, power: float, least: int, most: int) -> np.ndarray:
    """Returns ranks i32 [E] of equation (1) with the sum `total`; ties between remainders go to the
    first expert.
    """
    scale = float(use_E.max()) or 1.0  # so that no power overflows
    weights = [Fraction(float(weight)) for weight in (use_E / scale) ** power]
    shares = _shares(weights, total, least, most)
    ranks = [int(share) for share in shares]
    by_remainder = sorted(range(len(ranks)), key=lambda expert: ranks[expert] - shares[expert])
    for expert in by_remainder[: total - sum(ranks)]:
        ranks[expert] += 1
    return np.array(ranks, np.int32)


def _shares(weights: list[Fraction], total: int, least: int, most: int) -> list[Fraction]:
    """Returns exact fractional shares between the bounds, with the sum `total`."""
    unused = weights.count(0)
    left = total - most * (len(weights) - unused)
    if unused and left >= least * unused:
        return [Fraction(most) if weight else Fraction(left, unused) for weight in weights]

    def clipped(level: Fraction) -> list[Fraction]:
        return [min(max(level * weight, Fraction(least)), Fraction(most)) for weight in weights]

    def used_up(level: Fraction) -> Fraction:
        return sum(clipped(level))

    # The sum is piecewise linear in the level, with a knot wherever a share meets a bound.
    marks = sorted({bound / weight for weight in weights if weight for bound in (least, most)})
    above = bisect.bisect_left(marks, total, key=used_up)
    if above == 0:
        return clipped(marks[0])  # all have `least`
    low, high = marks[above - 1 : above + 1]
    part = (total - used_up(low)) / (used_up(high) - used_up(low))
    return clipped(low + part * (high - low))
