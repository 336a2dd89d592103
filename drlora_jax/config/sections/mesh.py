"""How devices share the work."""

from dataclasses import dataclass
from typing import Literal

from drlora_jax.config.sections.section import Section, require


@dataclass(frozen=True)
class MeshSection(Section):
    data: int = -1  # -1: whatever devices remain
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1
    # How tokens get to their experts: all to all devices, each where it is needed (ragged: on TPU;
    # padded: anywhere, for tests), or by sizes.
    exchange: Literal["auto", "gather", "ragged", "padded"] = "auto"

    def check(self):
        sizes = (self.data, self.fsdp, self.expert, self.tensor)
        require(
            all(size == -1 or size > 0 for size in sizes) and sizes.count(-1) <= 1,
            f"mesh sizes must be positive, at most one -1 (the rest of the devices), got "
            f"{', '.join(map(str, sizes))}.",
        )
