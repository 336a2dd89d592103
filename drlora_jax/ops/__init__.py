"""The operations with more than one implementation, as one value that a model is given."""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

from drlora_jax.ops import grouped_ragged
from drlora_jax.ops.attention import attend
from drlora_jax.ops.backends import expert_backend
from drlora_jax.ops.cross_entropy import summed_nll
from drlora_jax.ops.grouped import expert_mlp


class Ops(NamedTuple):
    """Functions with the signatures of ours on one device; `parallel.sharded_ops` has those for a
    mesh.
    """

    expert_mlp: Callable = expert_mlp
    attend: Callable = attend
    summed_nll: Callable = summed_nll


def ops_for(platform: str, options: dict | None = None) -> Ops:
    """What runs in programs compiled for `platform` with these compiler options."""
    backend = expert_backend(platform, options)
    if backend == "ragged":
        return Ops(expert_mlp=grouped_ragged.expert_mlp)
    return Ops(expert_mlp=_with_backend(backend))


@cache  # one function a backend, so that equal options stay equal
def _with_backend(backend: str) -> Callable:
    return partial(expert_mlp, backend=backend)
