"""MoE-Sieve (arXiv 2603.24044): LoRA only on the experts that the task's tokens use most.

Before step 1 the base model reads some rows of the training data and counts, layer by layer, how
often valid tokens choose each expert. The `share` of experts with the highest counts get ranks, the
others none, and nothing changes afterwards. The ranks of a layer sum to E * r_target, as in every
other policy, so a chosen expert has E * r_target / chosen of them.
"""

import numpy as np

from drlora_jax.allocation.base import (
    CapacityShapes,
    CapacityState,
    Event,
    Policy,
    static_policy,
)
from drlora_jax.errors import UserError


def moe_sieve(shapes: CapacityShapes, *, r_target: int, share: float, profile_rows: int) -> Policy:
    """The policy for `shapes`; arguments are the fields of the config section `allocation`.

    Raises UserError when the budget does not fit into the chosen experts.
    """
    chosen, budget = max(1, round(share * shapes.experts)), shapes.experts * r_target
    needed = -(-budget // chosen)
    if needed > shapes.max_rank:
        raise UserError(
            f"allocation.kind=moe_sieve gives the layer's {budget} ranks to {chosen} of "
            f"{shapes.experts} experts, up to {needed} each, but allocation.r_max is "
            f"{shapes.max_rank}: raise it to {needed}, or allocation.share ({share})."
        )

    def start(count_LE: np.ndarray) -> tuple[CapacityState, Event]:
        ranks_LE = np.stack([sieve(count_E, chosen, budget) for count_E in count_LE])
        total_L1 = np.maximum(count_LE.sum(axis=1, keepdims=True), 1.0)
        return CapacityState(ranks_LE), Event((count_LE / total_L1).astype(np.float32))

    policy = static_policy(
        "moe_sieve",
        np.zeros((shapes.layers, shapes.experts), np.int32),  # until the rows were read
        budget=budget,
        describe=(
            f"moe_sieve: the {chosen} of {shapes.experts} experts that {profile_rows} rows use "
            f"most have rank {budget / chosen:g}, the others none"
        ),
    )
    return policy._replace(profile_rows=profile_rows, start=start)


def sieve(count_E: np.ndarray, chosen: int, budget: int) -> np.ndarray:
    """Ranks i32 [E]: `budget` shared equally by the `chosen` largest counts, ties by index; what
    does not divide goes to the largest.
    """
    ranks_E = np.zeros(count_E.shape, np.int32)
    best = np.argsort(-count_E, kind="stable")[:chosen]
    ranks_E[best] = budget // chosen
    ranks_E[best[: budget % chosen]] += 1
    return ranks_E
