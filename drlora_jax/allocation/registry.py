"""Lists the allocation policies, one line per policy, in the order of the reference."""

import importlib

from drlora_jax.allocation.base import PolicyFields


def _load(place: str) -> type[PolicyFields]:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(f"{__package__}.{module}"), name)


# By the value of `allocation.kind`.
POLICIES = {
    policy.name: policy
    for policy in map(
        _load,
        (
            "uniform:Uniform",
            "dr_lora:DrLora",
            "random_growth:RandomGrowth",
            "adalora:AdaLora",
            "moe_sieve:MoeSieve",
            "usage:Usage",
            "prilora:PriLora",
            "alphalora:AlphaLora",
            "pattern:Pattern",
        ),
    )
}
