"""MoE-Sieve (arXiv 2603.24044): puts LoRA only on the experts that the task's tokens use most.

Before step 1 the base model reads some rows of the training data and counts, layer by layer, how
often valid tokens choose each expert. The `share` of experts with the highest counts gets ranks,
the others none, and nothing changes afterwards. The ranks of a layer sum to E * r_target, as in
every other policy, so a selected expert has E * r_target / selected of them.
"""

from dataclasses import dataclass

import numpy as np

from drlora_jax.allocation.base import Context, Policy
from drlora_jax.allocation.profiled import ProfileFields
from drlora_jax.errors import UserError
from drlora_jax.system.fields import option, require


@dataclass(frozen=True)
class MoeSieve(ProfileFields):
    name = "moe_sieve"
    text = "MoE-Sieve: gives all ranks to the most used share of a layer's experts"

    share: float = option(0.25, "share of a layer's experts that get ranks")

    def check(self, section) -> None:
        super().check(section)
        require(0 < self.share <= 1, f"allocation.share must be in (0, 1], got {self.share}.")

    def make(self, context: Context) -> Policy:
        """Raises UserError when the budget does not fit into the selected experts."""
        shapes, share = context.shapes, self.share
        chosen, budget = max(1, round(share * shapes.experts)), shapes.experts * context.r_target
        needed = -(-budget // chosen)
        if needed > shapes.max_rank:
            raise UserError(
                f"allocation.kind=moe_sieve gives the layer's {budget} ranks to {chosen} of "
                f"{shapes.experts} experts, up to {needed} each, but allocation.r_max is "
                f"{shapes.max_rank}: raise it to {needed}, or allocation.share ({share})."
            )
        return self.decided_by_use(
            context,
            lambda use_E: sieve(use_E, chosen, budget),
            describe=(
                f"moe_sieve: rank {budget / chosen:g} for the {chosen} of {shapes.experts} experts "
                f"that {self.profile_rows} rows use most, 0 for the others"
            ),
        )


def sieve(count_E: np.ndarray, chosen: int, budget: int) -> np.ndarray:
    """Returns ranks i32 [E]: the experts with the `chosen` largest counts share `budget` equally,
    the remainder goes to the largest counts, ties by index.
    """
    ranks_E = np.zeros(count_E.shape, np.int32)
    best = np.argsort(-count_E, kind="stable")[:chosen]
    ranks_E[best] = budget // chosen
    ranks_E[best[: budget % chosen]] += 1
    return ranks_E
