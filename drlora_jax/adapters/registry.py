"""The placements by the value of `adapter.kind`."""

from drlora_jax.adapters.expert_lora import ExpertLora
from drlora_jax.adapters.lora import Lora
from drlora_jax.adapters.mixlora import MixLora
from drlora_jax.adapters.mola import Mola
from drlora_jax.models.placement import Placement

PLACEMENTS: dict[str, type[Placement]] = {
    placement.kind: placement
    for placement in (
        ExpertLora,
        Lora,
        MixLora,
        Mola,
    )
}
