"""Bundles the operations that have several implementations into one value for a model."""

import operator
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import jax.numpy as jnp

from drlora_jax.ops.attention.api import Backend, attend
from drlora_jax.ops.cross_entropy import summed_nll
from drlora_jax.ops.experts.api import READS_STACKS, expert_mlp
from drlora_jax.ops.experts.backends import Call, Experts, choose_backend
from drlora_jax.ops.lora_deltas import deltas_of


class Ops(NamedTuple):
    """Holds the operations of a model, by default those for one device; `parallel.sharded_ops`
    returns those for a mesh.
    """

    expert_mlp: Callable = expert_mlp
    attend: Callable = attend
    summed_nll: Callable = summed_nll
    embed: Callable = operator.getitem  # (table [V, D], tokens [B, T]) -> [B, T, D]
    expert_deltas: Callable = deltas_of
    # expert_mlp receives the weights of all layers, stacked, and the index of a layer.
    reads_stacks: bool = False


def ops_for(
    platform: str,
    *,
    expert_shards: int = 1,
    attention: Backend = "auto",
    experts: Experts = "auto",
    dtype=jnp.float32,
) -> Ops:
    """Returns the operations for programs compiled for `platform`."""
    backend = choose_backend(Call(platform, dtype)) if experts == "auto" else experts
    return Ops(
        expert_mlp=_experts(backend, expert_shards == 1, platform),
        attend=_attention(attention, platform),
        reads_stacks=backend in READS_STACKS,
    )


@cache  # one function per choice, so that equal options compare equal
def _experts(backend: str, keeps_hidden: bool, platform: str) -> Callable:
    return partial(expert_mlp, backend=backend, keeps_hidden=keeps_hidden, platform=platform)


@cache
def _attention(backend: Backend, platform: str) -> Callable:
    return partial(attend, backend=backend, platform=platform)
