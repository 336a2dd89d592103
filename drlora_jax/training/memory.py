"""Forecasts the memory of a training step on one device, before it is compiled.

What resides on the device is counted exactly: base model, LoRA matrices, moments, statistics. A
step adds

    gradients    of the LoRA matrices, twice: of this micro-batch and the sum over those before
    residuals    what each layer saves for the backward pass, by `model.remat` (models/remat.py)
    weights      of one layer, sliced from their stack and gathered over fsdp
    working set  the larger of the head's chunk of logits and one layer's backward pass

Only the largest arrays are counted; the compiled step is the reference. Letters as in
`models.layers`.
"""

import math
from typing import NamedTuple, get_args

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
from drlora_jax.models.options import Remat
from drlora_jax.ops.cross_entropy import CHUNK_TOKENS
from drlora_jax.ops.experts.api import READS_STACKS
from drlora_jax.ops.native.library import parts

POLICIES = get_args(Remat)
LOGIT_COPIES = 3  # f32 copies of a chunk: logits, exponentials, their gradient
# One layer's backward pass, fitted to steps that were compiled for CPU. Numbers per token:
# multiples of D (attention, norms, results and their gradients) and of F (a dense FFN, or experts
# computed one by one on all tokens). Numbers per (token, expert) assignment in the block loop:
# multiples of D.
TOKEN_COPIES, WIDE_COPIES, BLOCK_COPIES = 16, 9, 0.5
# Copies of the inputs of plain LoRA: gradients, and with dropout random numbers and dropped inputs.
LINEAR_COPIES, DROPPED_COPIES = 1.5, 3.5
# Grouped products on TPU, fitted to steps that were compiled for it: copies of the tokens that the
# devices of an expert group share [T, D], and per (token, expert) assignment the larger of two peak
# moments, as multiples of D and F.
SHARED_COPIES = 6
# Gradients of the rows, each before and after masking, and those of gate | up.
INPUT_MOMENT = (4, 2)
# gate | up, h, what LoRA adds, and their gradients.
HIDDEN_MOMENT = (1, 8)
# Between slices, sums are sent while the next layer runs, so parts of two layers coexist.
OVERLAP = 1.5
# With remat=none autodiff saves [T, D] f32 of a layer's norms,
NORM_COPIES = 3
# [T, E * R] of every routed matrix, with and without the routing weights,
RANK_COPIES = 2
# and [T, F] of a dense FFN, for every hidden vector of a token.
FFN_COPIES = 4


class Layout(NamedTuple):
    """Holds the settings of a run that determine its memory."""

    tokens: int  # per micro-batch on one device
    item: int  # bytes per activation
    experts: str  # backend of the expert operation
    expert_shards: int = 1  # expert-parallel groups, between which tokens are exchanged
    fsdp: int = 1
    # Shards of attention heads, dense FFNs and the vocabulary, and further shards of experts.
    tensor: int = 1
    max_rank: int = 0
    roles: int = 0  # projections of an expert that have LoRA matrices
    slices: int = 1  # slices of TPU chips
    # Numbers per token that the plain LoRA of a layer reads, summed over matrices.
    linear_inputs: int = 0
    drops: bool = False  # those inputs pass through dropout
    ffn_passes: int = 1  # hidden vectors of a dense FFN per token
    side_ranks: int = 0  # ranks per token of LoRA experts beside one projection
    # Experts are read from their stack; no layer's experts are sliced from it.
    reads_stacks: bool = False


class Sizes(NamedTuple):
    """Holds the sizes of one layer that determine its memory, summed over its matrices."""

    weights: int  # parameters of all matrices except routers and experts
    heads: int  # numbers per token in queries, keys, values and the output of attention
    attention_heads: int
    wide: int  # numbers per token in a dense FFN's pre-activations
    experts: int = 0  # per layer
    chosen: int = 0  # experts per token
    expert_weights: int = 0  # parameters per expert
    expert_hidden: int = 0

    @property
    def ffn_hidden(self) -> int:
        return self.wide // 2


def sizes_of(config: ModelConfig, layer: LayerConfig) -> Sizes:
    """Returns the sizes of one layer."""
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
    """Returns the bytes that a step needs in addition to what resides on a device."""
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
    # The output of one layer's block loop exists a second time until it is in the stack.
    passes = (
        _working(width, sizes, layout)
        + linear
        + layout.tokens * _looped_bytes(sizes, layout, remat)
        for sizes, _ in layers
    )
    working = max(head, *passes)
    return 2 * lora_bytes + kept + weights + working


def _kept(width: int, sizes: Sizes, layout: Layout, remat: str) -> int:
    """Returns the bytes that one layer saves for the backward pass."""
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
    """Returns the bytes that autodiff saves of one layer in addition with remat=none."""
    kept = layout.tokens * NORM_COPIES * width * 4
    kept += layout.tokens * layout.linear_inputs * layout.item if layout.drops else 0
    hidden = layout.ffn_passes * sizes.ffn_hidden // layout.tensor
    kept += layout.tokens * FFN_COPIES * hidden * layout.item
    kept += layout.tokens * RANK_COPIES * layout.roles * layout.side_ranks * layout.item
    if layout.experts in (*READS_STACKS, "dense") and not layout.reads_stacks:
        # The gradient saves the layer's expert weights, and the scan stacks them.
        kept += _expert_bytes(sizes, layout)
    return kept


def _looped_bytes(sizes: Sizes, layout: Layout, remat: str) -> int:
    """Returns the bytes per token of a layer's pre-activations that the CPU backends save."""
    is_alone = layout.expert_shards * layout.tensor == 1
    if remat == "full" or layout.experts not in READS_STACKS or not is_alone:
        return 0
    return sizes.chosen * 2 * sizes.expert_hidden * layout.item


def _expert_bytes(sizes: Sizes, layout: Layout) -> int:
    """Returns the bytes of one layer's experts on one device."""
    experts = sizes.experts // (layout.expert_shards * layout.tensor)
    return experts * sizes.expert_weights * layout.item // layout.fsdp


def _weight_bytes(sizes: Sizes, layout: Layout) -> int:
    experts = 0 if layout.reads_stacks else _expert_bytes(sizes, layout)
    return sizes.weights * layout.item // (layout.fsdp * layout.tensor) + experts


def _working(width: int, sizes: Sizes, layout: Layout) -> int:
    """Returns the bytes that one layer's backward pass needs."""
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
            "native": (parts() - 1) * shared * width,  # each thread's sums over experts
        }[layout.experts]
        gathered = SHARED_COPIES * (shared - layout.tokens) * width
        return (own + gathered + per) * layout.item
    widest = max(rows * width + wide * hidden for rows, wide in (INPUT_MOMENT, HIDDEN_MOMENT))
    overlap = 1 if layout.slices == 1 else OVERLAP
    return int(overlap * (SHARED_COPIES * shared * width + assigned * widest)) * layout.item


def bytes_on_one_device(tree) -> int:
    """Returns the bytes of one device's shards of all leaves."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
        total += math.prod(shape) * leaf.dtype.itemsize
    return total


class CompiledBytes(NamedTuple):
    """Holds the memory of a compiled program on a device, in bytes."""

    total: int
    inputs: int


def compiled_bytes(compiled) -> CompiledBytes | None:
    """Returns the memory of a compiled program on a device; None if XLA does not report it."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    inputs = analysis.argument_size_in_bytes
    total = inputs + analysis.temp_size_in_bytes
    total += analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    # On TPU the sum counts some temporaries twice: steps compile for chips smaller than the sum.
    # jax before 0.12 reports only the sum.
    return CompiledBytes(getattr(analysis, "total_allocation_bytes", 0) or total, inputs)
