"""Allocation policies decide which ranks are active, and when. Each policy is one file, listed in
`registry.py`.
"""

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
