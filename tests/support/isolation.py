"""Small limits of sandboxed programs, and whether this machine can isolate any."""

import pytest

from drlora_jax.errors import UserError
from drlora_jax.evaluation.sandbox import Limits, Sandbox

# Small numbers, so that programs that run into them end soon.
LIMITS = Limits(
    cpu_seconds=1,
    wall_seconds=2,
    memory_bytes=256 << 20,
    file_bytes=1_000_000,
    disk_bytes=4_000_000,
)


def _why_not() -> str:
    try:
        Sandbox(LIMITS)
    except UserError as error:
        return str(error)
    return ""


WHY_NOT = _why_not()
isolated = pytest.mark.skipif(
    bool(WHY_NOT), reason=f"no isolation on this machine: {WHY_NOT[:200]}"
)
