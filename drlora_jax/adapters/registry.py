"""The placements: a line each, in the order of the reference."""

import importlib

from drlora_jax.models.placement import Placement


def _load(place: str) -> type[Placement]:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(f"{__package__}.{module}"), name)


# By the value of `adapter.kind`.
PLACEMENTS = {
    placement.kind: placement
    for placement in map(
        _load,
        (
            "expert_lora:ExpertLora",
            "lora:Lora",
            "mixlora:MixLora",
            "mola:Mola",
            "shared_expert_lora:SharedExpertLora",
        ),
    )
}
