"""Plain LoRA: every expert has `rank` active ranks from the first step to the last."""

import numpy as np

from drlora_jax.allocation.base import CapacityShapes, Policy, static_policy


def uniform(shapes: CapacityShapes, *, rank: int) -> Policy:
    return static_policy(
        "uniform",
        np.full((shapes.layers, shapes.experts), rank, np.int32),
        budget=shapes.experts * rank,
        describe=f"uniform: every expert has rank {rank}",
    )
