"""The architecture of a base model as data: every family is a value of these classes, not code of
its own. Nothing here knows of adapters.

The stack is a list of segments. A segment scans over `repeats` copies of a unit of one or more
layers, so dense first layers are one segment and alternating windows are a unit of two.

`ModelConfig.layers` and `ModelConfig.matrices` describe the model to everything that counts, reads,
covers or exports its weights: a new kind of matrix is added here and nowhere else.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

ATTENTION_ROLES = ("q", "k", "v", "o")
FFN_ROLES = ("gate", "up", "down")
INTO_RESIDUAL = ("o", "down")  # roles whose output is added to the residual stream
HALVES = ("gate", "up")  # of the fused matrix gate_up of an expert, in this order

# What a matrix is part of.
ATTENTION, FFN, EXPERTS, ROUTER = "attention", "ffn", "experts", "router"
EMBEDDING, HEAD = "embedding", "head"


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding; `inverse_frequencies` carries whatever scaling the family applies."""

    inverse_frequencies: tuple[float, ...]  # radians per position, one per rotated pair
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
    # full: over all heads at once, before the split
    qk_norm: Literal["none", "head", "full"] = "none"
    clip_qkv: float | None = None


@dataclass(frozen=True)
class RoutingConfig:
    num_experts: int
    experts_per_token: int
    score: Literal["softmax", "sigmoid", "softmax_of_top_k"] = "softmax"
    normalize: bool = False  # divide the chosen weights by their sum
    scaling: float = 1.0  # multiplies the chosen weights
    has_selection_bias: bool = False  # added to the scores for the choice only
    num_groups: int = 1  # of experts; a token chooses from its `top_groups` best ones
    top_groups: int = 1
    top_p: float | None = None  # as many of the best experts as it takes to pass this probability
    group_score: Literal["max", "top2_sum"] = "max"


@dataclass(frozen=True)
class DenseFfnConfig:
    hidden_dim: int
    activation: str = "silu"


@dataclass(frozen=True)
class MoeConfig:
    expert_dim: int
    routing: RoutingConfig
    activation: str = "silu"


class Matrix(NamedTuple):
    """A weight matrix, or all of one role that share a path (experts, the repeats of a segment)."""

    path: str  # of the module in the parameter tree, such as segment_0/layer_0/attention/q
    role: str
    kind: str  # ATTENTION, FFN, EXPERTS, ROUTER, EMBEDDING or HEAD
    in_features: int
    out_features: int
    count: int = 1
    active: int = 1  # of the `count`, those that one token is multiplied with
    # The leaf of the layer's parameters that holds it, and which half of the leaf's columns it is
    # where two matrices are fused.
    leaf: tuple[str, ...] = ()
    half: int | None = None

    @property
    def parameters(self) -> int:
        return self.count * self.in_features * self.out_features

    @property
    def inner_features(self) -> int:
        """The side that is not the residual stream's: heads, or the hidden width of an FFN."""
        return self.in_features if self.role in INTO_RESIDUAL else self.out_features

    def inside(self, place: str, repeats: int) -> "Matrix":
        """The matrix of a layer as that of a model whose segment has `repeats` of the layer."""
        path = f"{place}/{self.path}"
        return self._replace(path=path, count=self.count * repeats, active=self.active * repeats)


@dataclass(frozen=True)
class LayerConfig:
    attention: AttentionConfig
    ffn: DenseFfnConfig | MoeConfig

    @property
    def routing(self) -> RoutingConfig | None:
        """The routing of the layer's experts; None if it has none."""
        return self.ffn.routing if isinstance(self.ffn, MoeConfig) else None

    def matrices(self, width: int) -> Iterator[Matrix]:
        """Every weight matrix of the layer, in a model of this width; paths begin below it."""
        attention = self.attention
        queries, keys = (
            heads * attention.head_dim for heads in (attention.num_heads, attention.num_kv_heads)
        )
        for role, features in zip(ATTENTION_ROLES, (queries, keys, keys, queries), strict=True):
            yield _matrix(f"attention/{role}", role, ATTENTION, width, features)
        if isinstance(self.ffn, DenseFfnConfig):
            for role in FFN_ROLES:
                yield _matrix(f"mlp/{role}", role, FFN, width, self.ffn.hidden_dim)
            return
        experts, chosen = self.ffn.routing.num_experts, self.ffn.routing.experts_per_token
        yield Matrix("moe/router", "router", ROUTER, width, experts, leaf=("moe", "router"))
        for role in FFN_ROLES:
            matrix = _matrix(f"moe/{role}", role, EXPERTS, width, self.ffn.expert_dim)
            half = HALVES.index(role) if role in HALVES else None
            leaf = ("moe", role if half is None else "gate_up")
            yield matrix._replace(count=experts, active=chosen, leaf=leaf, half=half)


def _matrix(path: str, role: str, kind: str, width: int, inner: int) -> Matrix:
    shape = (inner, width) if role in INTO_RESIDUAL else (width, inner)
    return Matrix(path, role, kind, *shape, leaf=(*path.split("/"), "kernel"))


@dataclass(frozen=True)
class SegmentConfig:
    unit: tuple[LayerConfig, ...]
    repeats: int


def segment_name(index: int) -> str:
    """The name of a segment's module and subtree."""
    return f"segment_{index}"


def layer_name(index: int) -> str:
    """The name of a layer's module and subtree in its segment."""
    return f"layer_{index}"


class Layer(NamedTuple):
    """A layer of the model, and where the parameter trees hold it."""

    number: int  # in the model, from 0
    segment: str  # segment_0, ...
    unit: str  # of the segment: layer_0, ...
    repeat: int  # index into the leading axis of every leaf
    config: LayerConfig

    @property
    def place(self) -> str:
        """The path of the layer's modules, which all repeats share."""
        return f"{self.segment}/{self.unit}"

    @property
    def key(self) -> tuple[str, str, int]:
        """Where a leaf of this layer is: the first two names of its path, and its first index."""
        return self.segment, self.unit, self.repeat

    def below(self, tree: dict) -> dict:
        """The subtree of the layer's place; leaves keep their leading [repeats]."""
        return tree.get(self.segment, {}).get(self.unit, {})


@dataclass(frozen=True)
class ModelConfig:
    family: str
    vocab_size: int
    width: int
    segments: tuple[SegmentConfig, ...]
    norm_epsilon: float
    tie_embeddings: bool = False
    logit_soft_cap: float | None = None

    def layers(self) -> list[Layer]:
        """Every layer of the model in order."""
        found: list[Layer] = []
        for index, segment in enumerate(self.segments):
            for repeat in range(segment.repeats):
                for unit, config in enumerate(segment.unit):
                    names = (segment_name(index), layer_name(unit))
                    found.append(Layer(len(found), *names, repeat, config))
        return found

    def matrices(self) -> Iterator[Matrix]:
        """Every weight matrix in the order of the stack; those of a segment's repeats together."""
        # A token looks its embedding up; tied, the embedding is the head as well.
        active = 1 if self.tie_embeddings else 0
        shape = (self.vocab_size, self.width)
        yield Matrix(EMBEDDING, EMBEDDING, EMBEDDING, *shape, active=active)
        for index, segment in enumerate(self.segments):
            for unit, layer in enumerate(segment.unit):
                place = f"{segment_name(index)}/{layer_name(unit)}"
                for matrix in layer.matrices(self.width):
                    yield matrix.inside(place, segment.repeats)
        if not self.tie_embeddings:
            yield Matrix(HEAD, HEAD, HEAD, self.width, self.vocab_size)

    @property
    def num_layers(self) -> int:
        return sum(len(segment.unit) * segment.repeats for segment in self.segments)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The model layer index of every layer with experts, in order."""
        return tuple(layer.number for layer in self.layers() if layer.config.routing is not None)

    @property
    def moe(self) -> MoeConfig | None:
        """The FFN that all MoE layers share; None for a dense model."""
        units = [layer.ffn for segment in self.segments for layer in segment.unit]
        found = {ffn for ffn in units if isinstance(ffn, MoeConfig)}
        if len(found) > 1:
            raise ValueError(f"MoE layers of one model must be alike, got {found}.")
        return found.pop() if found else None
