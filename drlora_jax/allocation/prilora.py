"""PRILoRA's ranks (arXiv 2401.11316): they rise linearly from the first layer to the last.

Of L layers, layer l is due

    r_l = r_s + (r_f - r_s) l / (L - 1),      r_s = `r_init`,  r_f = 2 `r_target` - r_s          (1)

so that the mean is `r_target` and a model has L * E * r_target active ranks, as with every other
policy; a layer has E * r_l of them, the same for each of its experts: 4 to 12, say, in the place of
8 everywhere. Ranks become whole numbers by largest remainder over the layers. What else the paper
does, to prune single entries of A while training, is not about ranks and is not done here.
"""

import numpy as np

from drlora_jax.allocation.alphalora import largest_remainder
from drlora_jax.allocation.base import CapacityShapes, Policy, static_policy
from drlora_jax.errors import UserError


def last_rank(r_init: int, r_target: int) -> int:
    """r_f of equation (1)."""
    return 2 * r_target - r_init


def prilora(shapes: CapacityShapes, *, r_init: int, r_target: int, r_max: int) -> Policy:
    """The policy for `shapes`; arguments are the fields of the config section `allocation`.

    Raises UserError when the line leaves the ranks there can be.
    """
    ends = r_init, last_rank(r_init, r_target)
    if min(ends) < 0 or max(ends) > r_max:
        raise UserError(
            f"allocation.kind=prilora goes from r_init ({ends[0]}) in the first layer to "
            f"2 * r_target - r_init ({ends[1]}) in the last; both must be from 0 to "
            f"allocation.r_max ({r_max})."
        )
    share_L = np.linspace(*ends, shapes.layers)
    if shapes.layers == 1:  # no depth to rise over
        share_L[:] = r_target
    rank_L = largest_remainder(share_L, shapes.layers * r_target, least=0)
    return static_policy(
        "prilora",
        np.broadcast_to(rank_L[:, None], (shapes.layers, shapes.experts)),
        budget=tuple((shapes.experts * rank_L).tolist()),
        describe=f"prilora: rank {rank_L[0]} in the first layer to {rank_L[-1]} in the last, "
        f"a mean of {r_target}",
    )
