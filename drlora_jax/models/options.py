"""How a decoder is run, apart from what it is: one value that every module of it is given.

`remat` says what the backward pass finds in memory, and what it computes again from that. `keep` is
written beside a computation; KEPT has the names that `selective` keeps.

    none       whatever autodiff asks for; of custom gradients that includes their weights, which a
               scan over layers then stacks: a copy of the experts
    selective  what is expensive to compute: the residual stream at both halves of a layer, queries,
               keys, values, attention's output, chosen experts, the pre-activations of FFNs; norms,
               routers, sorting and activations are computed again
    full       the residual stream at the start of every layer; the layer is computed again

With a frozen base a step is 4 N floating-point operations per token; `full` makes it 6 N again. All
three give the same numbers.
"""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from drlora_jax.models.placement import NO_ADAPTER, Placement
from drlora_jax.ops import Ops

Remat = Literal["none", "selective", "full"]
KEPT = ("moe_in", "q", "k", "v", "attn_out", "attn_lse", "expert", "mlp_gu", "moe_gu", "moe_z")

keep = checkpoint_name


@dataclass(frozen=True)
class DecoderOptions:
    # The dtype of base weights and activations; routers, norms and softmax are always f32.
    dtype: jnp.dtype = jnp.float32
    adapter: Placement = NO_ADAPTER
    ops: Ops = Ops()  # for one device, or for a mesh
    base_grad: bool = False  # gradients of the expert weights themselves (pretraining)
    remat: Remat = "none"
    cache_length: int = 0  # cached positions per row in generation; 0: no cache
