"""Plain LoRA: every expert has `rank` active ranks from the first step to the last."""

import numpy as np

from drlora_jax.allocation.base import CapacityShapes, CapacityState, Policy


def uniform(shapes: CapacityShapes, *, rank: int) -> Policy:
    def update(state, stats, step):
        raise AssertionError(f"a uniform allocation has no events, asked at step {step}")

    return Policy(
        name="uniform",
        init=lambda: CapacityState(np.full((shapes.layers, shapes.experts), rank, np.int32)),
        init_stats=lambda: (),
        accumulate=lambda stats, step_stats: stats,
        is_event=lambda step: False,
        update=update,
        budget=shapes.experts * rank,
        describe=f"uniform: every expert has rank {rank}",
    )
