"""What a decoder is made of, as data: every family is a value of these classes, not code of its
own.

The stack is a list of segments. A segment scans over `repeats` copies of a unit of one or more
layers, so dense first layers are one segment and alternating windows are a unit of two.
"""

from dataclasses import dataclass
from typing import Literal

ATTENTION_ROLES = ("q", "k", "v", "o")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding; `inverse_frequencies` carries whatever scaling the family applies."""

    inverse_frequencies: tuple[float, ...]  # radians a position, one per rotated pair
    attention_factor: float = 1.0  # multiplies cos and sin
    interleaved: bool = False  # pairs (2i, 2i + 1) instead of (i, i + half)


@dataclass(frozen=True)
class AttentionConfig:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rope: RopeConfig
    window: int | None = None  # keys a query sees, itself included
    soft_cap: float | None = None
    has_sinks: bool = False
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = (
        "none"  # full: over all heads at once, before the split
    )
    clip_qkv: float | None = None


@dataclass(frozen=True)
class RoutingConfig:
    num_experts: int
    experts_per_token: int
    score: Literal["softmax", "sigmoid", "softmax_of_top_k"] = "softmax"
    normalize: bool = False  # divide the chosen weights by their sum
    scaling: float = 1.0  # multiplies the chosen weights
    has_selection_bias: bool = False  # added to the scores for the choice only
    num_groups: int = 1  # experts lie in groups, of which `top_groups` may be chosen from
    top_groups: int = 1
    top_p: float | None = None  # as many of the best experts as it takes to pass this probability
    group_score: Literal["max", "top2_sum"] = "max"


@dataclass(frozen=True)
class DenseFfnConfig:
    hidden_dim: int
    activation: str = "silu"
    routing: RoutingConfig | None = None  # of LoRA experts that an adapter puts on it (MixLoRA)


@dataclass(frozen=True)
class MoeConfig:
    expert_dim: int
    routing: RoutingConfig
    activation: str = "silu"


@dataclass(frozen=True)
class LayerConfig:
    attention: AttentionConfig
    ffn: DenseFfnConfig | MoeConfig
    # Of LoRA experts that an adapter puts on every matrix that it adapts (MoLA).
    linear_routing: RoutingConfig | None = None

    @property
    def routing(self) -> RoutingConfig | None:
        """Of whatever experts the layer has; None if none."""
        return self.linear_routing or self.ffn.routing


@dataclass(frozen=True)
class SegmentConfig:
    unit: tuple[LayerConfig, ...]
    repeats: int


@dataclass(frozen=True)
class ModelConfig:
    family: str
    vocab_size: int
    width: int
    segments: tuple[SegmentConfig, ...]
    norm_epsilon: float
    tie_embeddings: bool = False
    logit_soft_cap: float | None = None

    @property
    def num_layers(self) -> int:
        return sum(len(segment.unit) * segment.repeats for segment in self.segments)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Model layer index of every layer with experts, the base's or an adapter's, in order: the
        L axis of masks and statistics.
        """
        layers = [layer for segment in self.segments for layer in segment.unit * segment.repeats]
        return tuple(index for index, layer in enumerate(layers) if layer.routing is not None)

    @property
    def routing(self) -> RoutingConfig | None:
        """The routing that all layers with experts share, the base's or an adapter's."""
        layers = [layer for segment in self.segments for layer in segment.unit]
        found = {layer.routing for layer in layers if layer.routing is not None}
        if len(found) > 1:
            raise ValueError(f"Experts of one model must be routed alike, got {found}.")
        return found.pop() if found else None

    @property
    def moe(self) -> MoeConfig | DenseFfnConfig | None:
        """The FFN with experts that all layers with experts share; None if FFNs have none."""
        found = {
            layer.ffn
            for segment in self.segments
            for layer in segment.unit
            if layer.ffn.routing is not None
        }
        if len(found) > 1:
            raise ValueError(f"MoE layers of one model must be alike, got {found}.")
        return found.pop() if found else None

    @property
    def experts_module(self) -> str:
        """Name of the module that has the experts: the base's `moe`, or a dense FFN's `mlp`."""
        return "moe" if isinstance(self.moe, MoeConfig) else "mlp"

    def expert_place(self, role: str) -> tuple[str, str]:
        """Modules below a layer that hold a role's factors of experts, such as (moe, up_lora)."""
        module = "attention" if role in ATTENTION_ROLES else self.experts_module
        return module, f"{role}_lora"
