"""Derives static ranks from how the base model routes the training data before step 1."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from drlora_jax.allocation.base import (
    CapacityState,
    Context,
    Event,
    Policy,
    PolicyFields,
    Profile,
    static_policy,
)
from drlora_jax.system.fields import option, positive


@dataclass(frozen=True)
class ProfileFields(PolicyFields):
    """Fields of policies that profile the base model's routing."""

    profile_rows: int = option(
        64, "rows of training data read before step 1 to count how often experts are chosen"
    )

    def check(self, section) -> None:
        super().check(section)
        positive("allocation", {"profile_rows": self.profile_rows})

    def refuses(self, section, adapter) -> str | None:
        if adapter.makes_experts:
            return (
                f"allocation.kind={self.name} ranks experts by routing frequency, which needs a "
                f"trained router; the router of adapter.kind={adapter.kind} is randomly "
                "initialised. Use uniform, dr_lora, random or pattern."
            )
        return None

    def decided_by_use(
        self, context: Context, ranks_of: Callable[[np.ndarray], np.ndarray], describe: str
    ) -> Policy:
        """Returns the policy whose layers have the ranks `ranks_of(choices_E)`, i32 [E] with the
        sum E * r_target, where choices_E counts how often each expert of the layer is chosen.
        """
        shapes = context.shapes

        def decide(measured: dict[str, np.ndarray]) -> tuple[CapacityState, Event]:
            choices_LE = measured["choices"]
            total_L1 = np.maximum(choices_LE.sum(axis=1, keepdims=True), 1.0)
            ranks_LE = np.stack([ranks_of(choices_E) for choices_E in choices_LE])
            return CapacityState(ranks_LE), Event((choices_LE / total_L1).astype(np.float32))

        policy = static_policy(
            self.name,
            np.zeros((shapes.layers, shapes.experts), np.int32),  # until the rows are read
            budget=shapes.experts * context.r_target,
            describe=describe,
        )
        return policy._replace(profile=Profile(self.profile_rows, ("choices",), decide))
