"""The operations with more than one implementation, as one value that a model is given."""

from collections.abc import Callable
from typing import NamedTuple

from drlora_jax.ops.attention import attend
from drlora_jax.ops.cross_entropy import summed_nll
from drlora_jax.ops.grouped import expert_mlp


class Ops(NamedTuple):
    """Functions with the signatures of ours on one device; `parallel.sharded_ops` has those for a
    mesh.
    """

    expert_mlp: Callable = expert_mlp
    attend: Callable = attend
    summed_nll: Callable = summed_nll
