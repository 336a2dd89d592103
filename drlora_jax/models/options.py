"""How a decoder is run, apart from what it is: one value that every module of it is given."""

from dataclasses import dataclass, replace
from typing import Self

import jax.numpy as jnp

from drlora_jax.models.placement import NO_ADAPTER, Placement
from drlora_jax.models.remat import Remat
from drlora_jax.ops import Ops


@dataclass(frozen=True)
class DecoderOptions:
    # Of base weights and activations; routers, norms and softmax are f32 always.
    dtype: jnp.dtype = jnp.float32
    adapter: Placement = NO_ADAPTER
    ops: Ops = Ops()  # for one device, or for a mesh
    base_grad: bool = False  # gradients of the expert weights themselves (pretraining)
    remat: Remat = "none"
    cache_length: int = 0  # cached positions per row in generation; 0: no cache

    def below(self, name: str) -> Self:
        """The options of the module `name` of the one that has these."""
        return replace(self, adapter=self.adapter.below(name))
