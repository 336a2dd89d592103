"""The FFN of a dense layer."""

import flax.linen as nn
import jax

from drlora_jax.models.architecture import DenseFfnConfig
from drlora_jax.models.layers import Projection
from drlora_jax.models.options import DecoderOptions, keep
from drlora_jax.models.routing import RoutingStats
from drlora_jax.ops.experts.shared import ACTIVATIONS


class DenseFfn(nn.Module):
    config: DenseFfnConfig
    options: DecoderOptions

    @nn.compact
    def __call__(self, x_BTD, segment_ids_BT) -> tuple[jax.Array, list[RoutingStats]]:
        """The output [B, T, D], and the statistics of the adapter's routers on the projections."""
        routed: list[RoutingStats] = []

        def project(role, features, inputs):
            y, stats = Projection(features, self.options, name=role)(inputs, segment_ids_BT)
            routed.extend(stats)
            return y

        gate = keep(project("gate", self.config.hidden_dim, x_BTD), "mlp_gu")
        up = keep(project("up", self.config.hidden_dim, x_BTD), "mlp_gu")
        hidden = ACTIVATIONS[self.config.activation](gate) * up
        return project("down", x_BTD.shape[-1], hidden), routed
