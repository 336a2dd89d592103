"""What a training step will take on one device, before it is compiled.

What lies there anyway is counted exactly: base, factors, moments, statistics. A step adds

    gradients   of the factors, twice: of this micro-batch and of those before
    kept        what the backward pass finds, by `model.remat` (models/remat.py), for every layer
    weights     of one layer, cut out of their stack; gathered over fsdp
    working set the larger of the head's chunk of logits and one layer's backward pass

Largest arrays only; the compiled step is the measure. Letters as in `models.layers`.
"""

import math
from typing import NamedTuple

import jax

from drlora_jax.models.architecture import (
    ATTENTION,
    EXPERTS,
    FFN,
    INTO_RESIDUAL,
    ROUTER,
    LayerConfig,
    ModelConfig,
)
from drlora_jax.ops.cross_entropy import CHUNK_TOKENS
from drlora_jax.ops.experts.api import READS_STACKS
from drlora_jax.ops.native.library import parts

POLICIES = ("none", "selective", "full")
LOGIT_COPIES = 3  # of a chunk, f32: logits, exponentials, their gradient
# Of one layer's backward pass, fitted to steps that were compiled for CPU: numbers for every token,
# in D (attention, norms, results and their gradients) and in F (a dense FFN, or experts computed
# one by one on all tokens), and for every slot of the block walk in D.
TOKEN_COPIES, WIDE_COPIES, BLOCK_COPIES = 16, 9, 0.5
# Of what plain LoRA reads: gradients, and with dropout random numbers and what they leave.
LINEAR_COPIES, DROPPED_COPIES = 1.5, 3.5
# Grouped products on TPU, fitted to steps that were compiled for it: the tokens that the devices of
# an expert group share [T, D], and for every slot the larger of two moments, as numbers of D and F.
SHARED_COPIES = 6
# Gradients of the rows, each as written and masked, beside those of gate | up.
INPUT_MOMENT = (4, 2)
HIDDEN_MOMENT = (1, 8)  # gate | up, h, what the factors add, and their gradients
# Between slices sums are sent while the next layer runs, and more of two layers is there at once.
OVERLAP = 1.5
NORM_COPIES = 3  # [T, D] f32 that autodiff keeps of a layer's norms, unless told not to
RANK_COPIES = 2  # [T, E * R] of every routed matrix: with and without the routing's weights
FFN_COPIES = 4  # [T, F] that it keeps of a dense FFN, for every slot of a token


class Layout(NamedTuple):
    """What of a run decides its memory."""

    tokens: int  # of one micro-batch on one device
    item: int  # bytes of an activation
    experts: str  # backend of the expert operation
    expert_shards: int = 1  # groups of experts, between which tokens travel
    fsdp: int = 1
    tensor: int = 1  # parts of attention heads, dense FFNs, the vocabulary, and again of experts
    max_rank: int = 0
    roles: int = 0  # projections of an expert with factors
    slices: int = 1  # of TPU chips
    linear_inputs: int = 0  # numbers a token that plain LoRA of a layer reads, matrix by matrix
    drops: bool = False  # whether dropout leaves some of them out
    ffn_passes: int = 1  # hidden vectors of a dense FFN per token
    side_ranks: int = 0  # ranks per token of LoRA experts beside one projection
    reads_stacks: bool = False  # experts are read from their stack, no layer's are cut out


class Sizes(NamedTuple):
    """What of one layer's weights decides its memory, summed over its matrices."""

    weights: int  # numbers of all matrices but routers and experts
    heads: int  # numbers per token of queries, keys, values and the output of attention
    attention_heads: int
    wide: int  # numbers per token of a dense FFN's pre-activations
    experts: int = 0  # of one layer
    chosen: int = 0  # experts per token
    expert_weights: int = 0  # numbers of one expert
    expert_hidden: int = 0

    @property
    def ffn_hidden(self) -> int:
        return self.wide // 2


def sizes_of(config: ModelConfig, layer: LayerConfig) -> Sizes:
    """The sizes of one layer."""
    matrices = list(layer.matrices(config.width))
    experts = [matrix for matrix in matrices if matrix.kind == EXPERTS]
    rest = [matrix for matrix in matrices if matrix.kind not in (EXPERTS, ROUTER)]
    return Sizes(
        weights=sum(matrix.parameters for matrix in rest),
        heads=sum(each.inner_features for each in rest if each.kind == ATTENTION),
        attention_heads=layer.attention.num_heads,
        wide=sum(
            each.inner_features
            for each in rest
            if each.kind == FFN and each.role not in INTO_RESIDUAL
        ),
        experts=max((each.count for each in experts), default=0),
        chosen=max((each.active for each in experts), default=0),
        expert_weights=sum(each.in_features * each.out_features for each in experts),
        expert_hidden=max((each.inner_features for each in experts), default=0),
    )


def predicted_step_bytes(config: ModelConfig, layout: Layout, lora_bytes: int, remat: str) -> int:
    """What a step adds to what resides on a device anyway."""
    layers = [
        (sizes_of(config, layer), segment.repeats)
        for segment in config.segments
        for layer in segment.unit
    ]
    width = config.width
    kept = sum(repeats * _kept(width, sizes, layout, remat) for sizes, repeats in layers)
    weights = max(layout.fsdp * _weight_bytes(sizes, layout) for sizes, _ in layers)
    chunk = min(CHUNK_TOKENS, layout.tokens)
    head = LOGIT_COPIES * 4 * chunk * config.vocab_size // layout.tensor
    linear = DROPPED_COPIES if layout.drops else LINEAR_COPIES
    linear = int(linear * layout.linear_inputs * layout.tokens) * layout.item
    # What the block loop of one layer writes is there once more before it is in the stack.
    passes = (
        _working(width, sizes, layout)
        + linear
        + layout.tokens * _looped_bytes(sizes, layout, remat)
        for sizes, _ in layers
    )
    working = max(head, *passes)
    return 2 * lora_bytes + kept + weights + working


def _kept(width: int, sizes: Sizes, layout: Layout, remat: str) -> int:
    """Bytes of one layer that the backward pass finds."""
    residual = width * layout.item
    if remat == "full":
        return layout.tokens * residual
    split = sizes.heads * layout.item + 4 * sizes.attention_heads
    token = 2 * residual + split // layout.tensor + sizes.wide * layout.item // layout.tensor
    shards = layout.expert_shards * layout.tensor
    is_sorted = layout.experts in ("ragged", "mosaic", "tokamax")
    if is_sorted and (shards == 1 or remat == "none"):
        ranks = layout.roles * layout.max_rank if sizes.experts else 0
        assigned = sizes.chosen * layout.expert_shards
        token += assigned * (2 * sizes.expert_hidden + ranks) * layout.item
    token += _looped_bytes(sizes, layout, remat)
    kept = layout.tokens * token
    return kept + _kept_by_autodiff(width, sizes, layout) if remat == "none" else kept


def _kept_by_autodiff(width: int, sizes: Sizes, layout: Layout) -> int:
    """Bytes of one layer that autodiff keeps besides, unless told not to."""
    kept = layout.tokens * NORM_COPIES * width * 4
    kept += layout.tokens * layout.linear_inputs * layout.item if layout.drops else 0
    hidden = layout.ffn_passes * sizes.ffn_hidden // layout.tensor
    kept += layout.tokens * FFN_COPIES * hidden * layout.item
    kept += layout.tokens * RANK_COPIES * layout.roles * layout.side_ranks * layout.item
    if layout.experts in (*READS_STACKS, "dense") and not layout.reads_stacks:
        # Its gradient keeps its weights, and the scan stacks them.
        kept += _expert_bytes(sizes, layout)
    return kept


def _looped_bytes(sizes: Sizes, layout: Layout, remat: str) -> int:
    """Bytes per token of the pre-activations that sorted assignments on CPU keep of a layer."""
    is_alone = layout.expert_shards * layout.tensor == 1
    if remat == "full" or layout.experts not in READS_STACKS or not is_alone:
        return 0
    return sizes.chosen * 2 * sizes.expert_hidden * layout.item


def _expert_bytes(sizes: Sizes, layout: Layout) -> int:
    """The experts of one layer on one expert shard, as far as fsdp cuts them."""
    experts = sizes.experts // (layout.expert_shards * layout.tensor)
    return experts * sizes.expert_weights * layout.item // layout.fsdp


def _weight_bytes(sizes: Sizes, layout: Layout) -> int:
    experts = 0 if layout.reads_stacks else _expert_bytes(sizes, layout)
    return sizes.weights * layout.item // (layout.fsdp * layout.tensor) + experts


def _working(width: int, sizes: Sizes, layout: Layout) -> int:
    """One layer's backward pass."""
    wide = WIDE_COPIES * sizes.ffn_hidden // layout.tensor
    own = (TOKEN_COPIES * width + wide) * layout.tokens
    if not sizes.experts:
        return own * layout.item
    # The tokens of an expert group are gathered on each of its devices.
    shared, hidden = layout.tokens * layout.expert_shards, sizes.expert_hidden
    assigned = shared * sizes.chosen
    if layout.experts in ("dense", *READS_STACKS):
        per = {
            "dense": WIDE_COPIES * hidden * shared,
            "block": int(BLOCK_COPIES * assigned) * width,
            "native": (parts() - 1) * shared * width,  # sums over experts of each part
        }[layout.experts]
        gathered = SHARED_COPIES * (shared - layout.tokens) * width
        return (own + gathered + per) * layout.item
    widest = max(rows * width + wide * hidden for rows, wide in (INPUT_MOMENT, HIDDEN_MOMENT))
    overlap = 1 if layout.slices == 1 else OVERLAP
    return int(overlap * (SHARED_COPIES * shared * width + assigned * widest)) * layout.item


def bytes_on_one_device(tree) -> int:
    """What a device's shard of every leaf takes."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
        total += math.prod(shape) * leaf.dtype.itemsize
    return total


class CompiledBytes(NamedTuple):
    """What a compiled program takes on a device."""

    total: int
    inputs: int


def compiled_bytes(compiled) -> CompiledBytes | None:
    """What a compiled program takes on a device; None if it does not say."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    inputs = analysis.argument_size_in_bytes
    total = inputs + analysis.temp_size_in_bytes
    total += analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    # On TPU the sum has some temporaries twice: steps compile for chips that are too small for it.
    # jax before 0.12 knows only the sum.
    return CompiledBytes(getattr(analysis, "total_allocation_bytes", 0) or total, inputs)
