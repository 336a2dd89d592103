"""The seven sections of a config: their fields, with types, defaults and one line of meaning each.

The checks of values are in `rules.py`. The fields of a placement are in its own file under
`adapters/`, those of an allocation policy in its own under `allocation/`.
"""

from dataclasses import dataclass, field
from typing import Literal

from drlora_jax.adapters.registry import PLACEMENTS
from drlora_jax.allocation.registry import POLICIES
from drlora_jax.config import rules
from drlora_jax.config.kinds import KindSection, with_kinds
from drlora_jax.models.options import Remat
from drlora_jax.ops.attention.api import Backend
from drlora_jax.ops.experts.backends import Experts
from drlora_jax.system.fields import Section, option


@dataclass(frozen=True)
class RunSection(Section):
    """Where a run is stored, and what it keeps and reports."""

    dir: str = option("runs/default", "run directory", is_path=True)
    seed: int = option(0, "seed of initialisation, data order and dropout")
    log_every: int = option(10, "steps between logged rows")
    checkpoint_every: int = option(
        100, "steps between checkpoints; evaluations, the last step and SIGTERM also save one"
    )
    keep_last: int = option(2, "newest checkpoints kept, besides the best by held-out loss")
    tensorboard: bool = option(False, "also write the logs for TensorBoard, in run.dir/tensorboard")
    heartbeat_timeout: int = option(
        60, "with several processes: seconds without a heartbeat after which one counts as lost"
    )
    stall_timeout: int = option(
        1800,
        "seconds without progress (a step, a file, a compilation) after which all processes end",
    )

    check = rules.check_run


@dataclass(frozen=True)
class ModelSection(Section):
    """The base model, and how it is computed."""

    path: str = option(
        "bundled:tiny_moe", "the base model: a directory, a hub name, or bundled:NAME", is_path=True
    )
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto",
        "dtype of base weights and activations; auto: bfloat16 on accelerators, float32 on CPUs",
    )
    remat: Remat = option("selective", "what the backward pass recomputes instead of storing")
    attention: Backend = option("auto", "implementation of attention")
    experts: Experts = option("auto", "implementation of the experts")

    check = rules.check_model


@dataclass(frozen=True)
class DataSection(Section):
    """The data sets, and how rows are built from them."""

    path: tuple[str, ...] = option(
        (),
        "files, folders, globs, bundled:FILE or a `datasets` NAME[:CONFIG]; with format=choice "
        "TASK=PATH",
        is_path=True,
    )
    eval_path: tuple[str, ...] = option((), "path of the held-out set", is_path=True)
    split: str = option("train", "split of a `datasets` name, or of a folder with files per split")
    eval_split: str = option("validation", "split of the held-out set")
    format: Literal["auto", "prompt_response", "alpaca", "chat", "text", "choice"] = option(
        "auto", "layout of a row; auto: detected from its fields"
    )
    prompt_field: str = option("prompt", "field of the prompt, for format=prompt_response")
    response_field: str = option("response", "field of the response")
    messages_field: str = option("messages", "field of the turns, for format=chat")
    text_field: str = option("text", "field of the text, for format=text")
    template: str = option(
        "auto", "a name from data/templates.py, or `tokenizer` for the tokenizer's chat template"
    )
    special_tokens: Literal["auto", "split", "keep"] = option(
        "auto",
        "control tokens in the text of rows: split tokenises them as ordinary text, keep as "
        "control tokens; auto: keep for format=text, else split",
    )
    date: str = option(
        "auto", "YYYY-MM-DD for a chat template that reads the clock; auto: the day of the start"
    )
    unread: Literal["say", "stop"] = option("say", "what to do about fields that nothing reads")
    loss_on: Literal["response", "all"] = option("response", "tokens that count in the loss")
    bad_rows: Literal["stop", "skip"] = option("stop", "what to do about rows that cannot be read")
    too_long: Literal["truncate", "skip", "stop", "split"] = option(
        "truncate", "what to do about documents longer than train.sequence_length"
    )
    max_rows: int | None = option(
        None, "at most this many rows of the training set are read, for experiments"
    )
    shuffle: bool = option(True, "whether documents are reshuffled in every epoch")
    pack: bool = option(True, "whether several documents share a row, separated by segment ids")

    check = rules.check_data


@dataclass(frozen=True)
class TrainSection(Section):
    """The optimizer, its schedule and the batch."""

    steps: int | None = option(None, "optimizer steps; set exactly one of steps and epochs")
    epochs: int | None = option(None, "passes over the training set, instead of steps")
    batch_size: int = option(
        8, "rows per optimizer step, over all devices and micro-batches together"
    )
    micro_batches: int = option(1, "gradient accumulation: parts into which the batch is split")
    sequence_length: int = option(512, "tokens per row")
    learning_rate: float = option(2e-5, "peak learning rate")
    schedule: Literal["linear", "cosine", "constant"] = option(
        "linear", "shape of the learning rate after warm-up"
    )
    warmup_ratio: float = option(0.03, "fraction of all steps in which the learning rate rises")
    weight_decay: float = option(0.0, "AdamW's weight decay")
    beta1: float = option(0.9, "AdamW's beta1")
    beta2: float = option(0.999, "AdamW's beta2")
    epsilon: float = option(1e-8, "AdamW's epsilon")
    b_learning_rate_ratio: float = option(
        1.0, "learning rate of B divided by that of A (LoRA+: 16)"
    )
    bias_correction: Literal["global", "per_rank"] = option(
        "global",
        "Adam's step count: of the whole run, or of each rank since its first gradient",
    )
    max_grad_norm: float | None = option(
        1.0, "gradients are clipped to this norm; none: no clipping"
    )
    balance_loss: float = option(0.0, "weight of the load-balance loss; 0: off")
    balance_form: Literal["pooled", "per_layer", "switch"] = option(
        "pooled",
        "pooled: over all layers with experts at once; per_layer: per layer, averaged; switch: "
        "per layer, with first choices only",
    )
    z_loss: float = option(0.0, "weight of the mean squared logsumexp of the router logits; 0: off")
    eval_every: int = option(100, "steps between evaluations of the held-out loss")
    eval_batches: int | None = option(
        None, "held-out batches per evaluation; none: the whole held-out set"
    )

    check = rules.check_train


@with_kinds({kind: placement.options for kind, placement in PLACEMENTS.items()})
@dataclass(frozen=True)
class AdapterSection(KindSection):
    """What is trained: where the LoRA matrices are, their experts and routers."""

    kind: str = option("expert_lora", "the placement: where the LoRA matrices are")
    targets: tuple[str, ...] = option(
        ("up", "down"), "roles, or regular expressions over parameter paths"
    )
    scale: float = option(2.0, "alpha / rank: constant, whichever ranks are active")
    dropout: float = option(0.1, "dropout on the input of every low-rank product, in training")
    rank: int | None = option(
        None, "rank of plain LoRA (attention, dense FFN); none: allocation.r_target"
    )

    @property
    def makes_experts(self) -> bool:
        """Whether the adapter has experts of its own, on a dense model."""
        return PLACEMENTS[self.kind].makes_experts

    @property
    def shares_matrices(self) -> bool:
        """Whether experts share LoRA matrices, so that ranks cannot be reordered."""
        return PLACEMENTS[self.kind].shares_matrices

    def check(self):
        rules.check_adapter(self)
        super().check()


@with_kinds(POLICIES)
@dataclass(frozen=True)
class AllocationSection(KindSection):
    """How ranks are distributed over experts, and when."""

    kind: str = option("dr_lora", "the policy that decides the active ranks")
    r_target: int = option(16, "mean active rank at the end; a layer has E * r_target active ranks")
    r_max: int = option(32, "ranks allocated per expert (uniform: r_target)")

    def check(self):
        rules.check_allocation(self)
        super().check()


@dataclass(frozen=True)
class MeshSection(Section):
    """The device mesh, and how tokens reach their experts on it."""

    data: int = option(-1, "data parallelism: replicas of the base model; -1: remaining devices")
    fsdp: int = option(1, "FSDP: shards of the base weights along the hidden dimension")
    expert: int = option(1, "expert parallelism: shards of the experts")
    tensor: int = option(
        1, "tensor parallelism: shards of heads, FFN widths, vocabulary, and further of the experts"
    )
    exchange: Literal["auto", "gather", "ragged", "padded"] = option(
        "auto",
        "how tokens reach their experts: gather all tokens on all devices, or send each to the "
        "devices that need it (ragged: TPU; padded: anywhere, for tests)",
    )

    check = rules.check_mesh


@dataclass(frozen=True)
class TrainConfig:
    """The config of a run."""

    run: RunSection = field(default_factory=RunSection)
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    train: TrainSection = field(default_factory=lambda: TrainSection(steps=100))
    adapter: AdapterSection = field(default_factory=AdapterSection)
    allocation: AllocationSection = field(default_factory=AllocationSection)
    mesh: MeshSection = field(default_factory=MeshSection)

    __post_init__ = rules.check_together
