"""What the backward pass finds in memory, and what it computes again from what it finds.

    none       whatever autodiff asks for; of custom gradients that includes their weights, which a
               scan over layers then stacks: a copy of the experts
    selective  what is expensive to compute: the residual stream at both halves of a layer, queries,
               keys, values, attention's output, chosen experts, the pre-activations of FFNs; norms,
               routers, sorting and activations are computed again
    full       the residual stream at the start of every layer; the layer is computed again

With a frozen base a step is 4 N floating-point operations a token; `full` makes it 6 N again. All
three give the same numbers. `keep` is written next to a computation; which of the names are kept
is decided here.
"""

from typing import Literal

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

Remat = Literal["none", "selective", "full"]
KEPT = ("moe_in", "q", "k", "v", "attn_out", "attn_lse", "expert", "mlp_gu", "moe_gu", "moe_z")
CUDNN_FORWARD = "dot_product_attention_fwd"  # jax's primitive, whose statistics have no name

keep = checkpoint_name


def rematerialised(module: type[nn.Module], remat: Remat) -> type[nn.Module]:
    """The module of a scanned unit with this policy."""
    if remat == "none":
        return module
    policy = _is_kept if remat == "selective" else None
    return nn.remat(module, prevent_cse=False, policy=policy)


def _is_kept(primitive, *args, **params) -> bool:
    by_name = jax.checkpoint_policies.save_only_these_names(*KEPT)
    return primitive.name.startswith(CUDNN_FORWARD) or by_name(primitive, *args, **params)
