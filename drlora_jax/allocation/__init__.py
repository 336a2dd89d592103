"""Who decides the active ranks, and when: a file per policy, which `registry.py` lists."""

from drlora_jax.allocation.base import (
    CapacityShapes,
    CapacityState,
    Context,
    Event,
    Policy,
    Profile,
    StepStats,
    masks_from_ranks,
)

__all__ = [
    "CapacityShapes",
    "CapacityState",
    "Context",
    "Event",
    "Policy",
    "Profile",
    "StepStats",
    "masks_from_ranks",
]
