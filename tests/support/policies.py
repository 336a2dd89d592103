"""Policies made as a config would make them, without a model."""

from drlora_jax.allocation import CapacityShapes, Context, Policy
from drlora_jax.allocation.spectra import Exponents
from drlora_jax.config import AllocationSection

OF_RUN = ("total_steps", "seed", "counts_L", "has_new_experts")  # the rest are fields


def make_policy(kind: str, shapes: CapacityShapes, *, alpha=None, **options) -> Policy:
    """The policy of `kind` with fields, and what a run decides, among `options`.

    Args:
      alpha: exponents, of layers or of layers and experts.
    """
    of_run = {name: options.pop(name) for name in OF_RUN if name in options}
    section = AllocationSection(**{"kind": kind, "r_max": 64} | options)
    exponents = None if alpha is None else (lambda: Exponents(alpha, alpha))
    context = Context(shapes, section.r_target, exponents=exponents, **of_run)
    return section.own.make(context)
