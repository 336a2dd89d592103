"""PRILoRA's ranks (arXiv 2401.11316) rise linearly from the first layer to the last.

With L layers, layer l has the rank

    r_l = r_s + (r_f - r_s) l / (L - 1),      r_s = `r_init`,  r_f = 2 `r_target` - r_s          (1)

so that the mean is `r_target` and a model has L * E * r_target active ranks, as with every other
policy. All experts of a layer have the same rank: 4 to 12, say, in place of 8 everywhere. Ranks are
rounded to integers by largest remainder over the layers. The paper also prunes single entries of A
during training; that does not concern ranks and is not implemented.
"""

from dataclasses import dataclass

import numpy as np

from drlora_jax.allocation.base import Context, Policy, PolicyFields, static_policy
from drlora_jax.allocation.shares import largest_remainder
from drlora_jax.system.fields import option, require


@dataclass(frozen=True)
class PriLora(PolicyFields):
    name = "prilora"
    text = "PRILoRA: raises ranks linearly from the first layer to the last"
    shares_among_layers = True

    r_init: int = option(8, "rank of the first layer; the last one has 2 r_target - r_init")

    def check(self, section) -> None:
        super().check(section)
        last = last_rank(self.r_init, section.r_target)
        require(
            0 <= min(self.r_init, last) and max(self.r_init, last) <= section.r_max,
            f"allocation.kind=prilora goes from r_init ({self.r_init}) in the first layer to "
            f"2 * r_target - r_init ({last}) in the last; both must be between 0 and "
            f"allocation.r_max ({section.r_max}).",
        )

    def allocated_rank(self, section, adapter) -> int:
        return max(self.r_init, last_rank(self.r_init, section.r_target))

    def make(self, context: Context) -> Policy:
        shapes, r_target = context.shapes, context.r_target
        share_L = np.linspace(self.r_init, last_rank(self.r_init, r_target), shapes.layers)
        if shapes.layers == 1:  # no depth to rise over
            share_L[:] = r_target
        rank_L = largest_remainder(share_L, shapes.layers * r_target, least=0)
        return static_policy(
            self.name,
            np.broadcast_to(rank_L[:, None], (shapes.layers, shapes.experts)),
            budget=tuple((shapes.experts * rank_L).tolist()),
            describe=(
                f"prilora: rank {rank_L[0]} in the first layer to {rank_L[-1]} in the last, "
                f"a mean of {r_target}"
            ),
        )


def last_rank(r_init: int, r_target: int) -> int:
    """Returns r_f of equation (1)."""
    return 2 * r_target - r_init
