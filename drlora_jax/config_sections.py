"""The sections of a config, each checked where it is made."""

import dataclasses
import typing
from dataclasses import dataclass
from typing import Literal

from drlora_jax.config_types import check_type
from drlora_jax.errors import UserError

LARGEST_BATCH = 2**31 - 1  # tokens: positions are 32-bit on devices
LARGEST_RANK = 65536


def require(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)


def _positive(section: str, values: dict[str, float]) -> None:
    for name, value in values.items():
        require(value > 0, f"{section}.{name} must be greater than 0, got {value}.")


def _at_most(name: str, value: int, limit: int, meaning: str = "") -> None:
    require(value <= limit, f"{name} must be at most {limit}{meaning}, got {value}.")


def _fraction(section: str, values: dict[str, float]) -> None:
    for name, value in values.items():
        require(0 <= value < 1, f"{section}.{name} must be in [0, 1), got {value}.")


class _Section:
    """A part of the config: types are checked first, then what `check` of the section says."""

    def __post_init__(self):
        section = type(self).__name__.removesuffix("Section").lower()
        kinds = typing.get_type_hints(type(self))
        for item in dataclasses.fields(self):
            check_type(f"{section}.{item.name}", getattr(self, item.name), kinds[item.name])
        self.check()

    def check(self):
        """Ranges and contradictions inside this section."""


@dataclass(frozen=True)
class RunSection(_Section):
    dir: str = "runs/default"
    seed: int = 0
    log_every: int = 10  # steps
    checkpoint_every: int = 100  # steps; evaluations, the last step and SIGTERM save as well
    keep_last: int = 2  # newest checkpoints kept, besides the best by eval loss
    tensorboard: bool = False  # also write the logs for TensorBoard, in run.dir/tensorboard
    # With several processes: seconds without a sign of life after which one is given up, and
    # seconds in which nothing moves (a step, a file read, a compilation) after which all end.
    heartbeat_timeout: int = 60
    stall_timeout: int = 1800

    def check(self):
        require(bool(self.dir), "run.dir must name a directory, got an empty string.")
        in_range = 0 <= self.seed < 2**32
        require(in_range, f"run.seed must be 0 or more and below 2**32, got {self.seed}.")
        counts = {"log_every": self.log_every, "checkpoint_every": self.checkpoint_every}
        _positive("run", counts | {"keep_last": self.keep_last})
        limits = {"heartbeat_timeout": self.heartbeat_timeout, "stall_timeout": self.stall_timeout}
        _positive("run", limits)


@dataclass(frozen=True)
class ModelSection(_Section):
    path: str = "bundled:tiny_moe"  # a directory, a hub name, or bundled:NAME
    # Of base weights and activations; auto: bfloat16 on accelerators, float32 on CPUs.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    remat: Literal["none", "selective", "full"] = "selective"  # see drlora_jax/models/remat.py
    attention: Literal["auto", "xla", "chunked", "cudnn", "splash"] = "auto"  # drlora_jax/ops
    experts: Literal["auto", "block", "ragged", "dense", "tokamax"] = "auto"  # ops/grouped.py

    def check(self):
        require(bool(self.path), "model.path must name a model, got an empty string.")


@dataclass(frozen=True)
class DataSection(_Section):
    path: tuple[
        str, ...
    ] = ()  # .jsonl, .json, .parquet (also .gz), bundled:FILE, or a `datasets` NAME[:CONFIG]
    # (with format=choice: TASK=PATH, see drlora_jax/data/choices.py)
    eval_path: tuple[str, ...] = ()
    split: str = "train"  # of a `datasets` name
    eval_split: str = "validation"
    format: Literal["auto", "prompt_response", "alpaca", "chat", "text", "choice"] = "auto"
    prompt_field: str = "prompt"
    response_field: str = "response"
    messages_field: str = "messages"
    text_field: str = "text"
    template: str = "auto"  # a name of drlora_jax/data/templates.py, or `tokenizer` for its own
    loss_on: Literal["response", "all"] = "response"
    bad_rows: Literal["stop", "skip"] = "stop"
    too_long: Literal["truncate", "skip", "stop", "split"] = "truncate"
    max_rows: int | None = None  # of the training set, for experiments
    shuffle: bool = True
    pack: bool = True  # several documents in one row, with segment ids

    def check(self):
        if self.max_rows is not None:
            _positive("data", {"max_rows": self.max_rows})
        require(
            self.too_long != "split" or self.format == "text",
            'data.too_long="split" cuts documents, so it needs data.format="text", '
            f'got data.format="{self.format}".',
        )


@dataclass(frozen=True)
class TrainSection(_Section):
    steps: int | None = None  # optimizer steps; exactly one of steps and epochs
    epochs: int | None = None
    batch_size: int = 8  # rows an optimizer step, over all devices and micro-batches
    micro_batches: int = 1  # the batch is computed in this many parts
    sequence_length: int = 512  # tokens a row
    learning_rate: float = 2e-5
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: float = 0.03  # of all steps
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    b_learning_rate_ratio: float = 1.0  # of B's learning rate to A's (LoRA+: 16)
    # Adam's step count: of the run, or of every rank since it first had a gradient
    bias_correction: Literal["global", "per_rank"] = "global"
    max_grad_norm: float | None = 1.0
    balance_loss: float = 0.0  # weight of the load-balance loss; 0: off
    # pooled: of all layers with experts at once; per_layer: of each, averaged; switch: the same,
    # of first choices only
    balance_form: Literal["pooled", "per_layer", "switch"] = "pooled"
    z_loss: float = 0.0  # weight of the mean squared logsumexp of the router logits; 0: off
    eval_every: int = 100  # steps
    eval_batches: int | None = None  # None: the whole held-out set

    def check(self):
        require(
            (self.steps is None) != (self.epochs is None),
            f"Set exactly one of train.steps and train.epochs, got {self.steps} and {self.epochs}.",
        )
        counts = (
            "steps",
            "epochs",
            "batch_size",
            "micro_batches",
            "sequence_length",
            "eval_every",
            "eval_batches",
        )
        given = {name: getattr(self, name) for name in counts}
        _positive("train", {name: value for name, value in given.items() if value is not None})
        _positive("train", {"learning_rate": self.learning_rate, "epsilon": self.epsilon})
        _positive("train", {"b_learning_rate_ratio": self.b_learning_rate_ratio})
        _fraction(
            "train", {"warmup_ratio": self.warmup_ratio, "beta1": self.beta1, "beta2": self.beta2}
        )
        for name in ("weight_decay", "balance_loss", "z_loss"):
            value = getattr(self, name)
            require(value >= 0, f"train.{name} must be 0 or more, got {value}.")
        require(
            self.max_grad_norm is None or self.max_grad_norm > 0,
            f"train.max_grad_norm must be greater than 0 or None, got {self.max_grad_norm}.",
        )
        require(
            self.batch_size % self.micro_batches == 0,
            f"train.batch_size ({self.batch_size}) must be a multiple of train.micro_batches "
            f"({self.micro_batches}).",
        )
        tokens = self.batch_size * self.sequence_length
        name = "train.batch_size * train.sequence_length"
        _at_most(name, tokens, LARGEST_BATCH, " tokens")


@dataclass(frozen=True)
class AdapterSection(_Section):
    # expert_lora: on the experts of an MoE; lora: one pair a matrix; mixlora: experts of its own on
    # the FFNs of a dense model, with a router; mola: on every matrix, each with its router
    kind: Literal["expert_lora", "lora", "mixlora", "mola"] = "expert_lora"
    targets: tuple[str, ...] = ("up", "down")  # roles, or regular expressions over parameter paths
    scale: float = 2.0  # alpha / rank: constant, whatever rank is active
    dropout: float = 0.1  # on the input of every low-rank product, in training
    # of the factors of experts, where plain LoRA beside them has another; None: the same
    expert_scale: float | None = None
    expert_dropout: float | None = None
    # of kind lora: share of A's columns and of B's rows left out of a training step (LoRA Dropout)
    factor_dropout: float = 0.0
    rank: int | None = None  # of plain LoRA (attention, dense FFN); None: allocation.r_target
    router: Literal["frozen", "after_warmup"] = "frozen"
    router_learning_rate: float | None = None  # None: train.learning_rate
    num_experts: int = 8  # of mixlora and mola
    # of every layer, instead of num_experts: 2468 (MoLA: by quarters of the depth), 2,4,4 (by
    # layer), or FILE.json of drlora_jax.alpha (AlphaLoRA)
    experts_per_layer: str | None = None
    experts_per_token: int = 2  # of mixlora and mola; a layer with fewer uses all it has
    # of both, instead of experts_per_token: the best experts up to this sum of probabilities
    top_p: float | None = None
    dora: bool = False  # of kind lora: lengths of the columns of W' train apart (DoRA)
    freeze_a: bool = False  # only B trains (FFA-LoRA)
    freeze_idle_experts: bool = True  # no tokens in a step: factors and moments stay as they are

    @property
    def makes_experts(self) -> bool:
        """Whether the adapter has experts of its own, on a dense model."""
        return self.kind in ("mixlora", "mola")

    def check(self):
        require(bool(self.targets), "adapter.targets must name at least one projection, got none.")
        fused = "gate_up" in self.targets and {"gate", "up"} & set(self.targets)
        require(
            not fused,
            f"adapter.targets has gate_up next to gate or up: one or the other, got "
            f"{self.targets}.",
        )
        require(self.scale > 0, f"adapter.scale must be greater than 0, got {self.scale}.")
        _fraction("adapter", {"dropout": self.dropout, "factor_dropout": self.factor_dropout})
        for name in ("expert_scale", "expert_dropout"):
            require(
                getattr(self, name) is None or self.kind in ("expert_lora", "mixlora"),
                f"adapter.{name} is for adapters that have experts beside plain LoRA, "
                f"adapter.kind=expert_lora or mixlora: with {self.kind} set "
                f"adapter.{name.removeprefix('expert_')}.",
            )
        if self.expert_scale is not None:
            _positive("adapter", {"expert_scale": self.expert_scale})
        _fraction("adapter", {"expert_dropout": self.expert_dropout or 0.0})
        require(
            self.rank is None or self.rank > 0,
            f"adapter.rank must be greater than 0, got {self.rank}.",
        )
        _at_most("adapter.rank", self.rank or 0, LARGEST_RANK)
        _positive("adapter", {"num_experts": self.num_experts})
        require(
            0 < self.experts_per_token <= self.num_experts
            or (self.experts_per_token > 0 and self.experts_per_layer is not None),
            "adapter.experts_per_token must be from 1 to adapter.num_experts "
            f"({self.num_experts}), got {self.experts_per_token}.",
        )
        require(
            self.experts_per_layer is None or self.makes_experts,
            "adapter.experts_per_layer is for adapters with experts of their own, "
            f"adapter.kind=mola or mixlora, got {self.kind}.",
        )
        require(
            self.top_p is None or 0 < self.top_p <= 1,
            f"adapter.top_p must be in (0, 1] or None, got {self.top_p}.",
        )
        require(
            self.top_p is None or self.makes_experts,
            "adapter.top_p is how adapters with experts of their own choose among them, "
            f"adapter.kind=mixlora or mola, got {self.kind}; an MoE chooses as it was trained to.",
        )
        require(
            self.kind == "expert_lora" or self.router == "frozen",
            f"adapter.router={self.router} is about the routers of an MoE: with "
            f"adapter.kind={self.kind} leave it at frozen (its own router always trains).",
        )
        require(
            not self.factor_dropout or self.kind == "lora",
            "adapter.factor_dropout leaves columns of A and rows of B out for all tokens at once; "
            f"with adapter.kind={self.kind} tokens have factors of different experts, most of them "
            "few tokens: use adapter.dropout, or set adapter.kind=lora.",
        )
        require(
            not self.dora or self.kind == "lora",
            "adapter.dora=True rescales the columns of one adapted matrix; with "
            f"adapter.kind={self.kind} every token has other experts, and so another matrix. Set "
            "adapter.kind=lora.",
        )
        if self.router_learning_rate is not None:
            _positive("adapter", {"router_learning_rate": self.router_learning_rate})
            require(
                self.makes_experts or self.router == "after_warmup",
                "adapter.router_learning_rate is for routers that train: set "
                "adapter.router=after_warmup, or leave it out.",
            )


@dataclass(frozen=True)
class AllocationSection(_Section):
    # random: the schedule of dr_lora, experts drawn by lot
    kind: Literal[
        "uniform",
        "dr_lora",
        "random",
        "adalora",
        "moe_sieve",
        "prilora",
        "alphalora",
        "pattern",
    ] = "dr_lora"
    # active ranks at the start; from 0 an expert has no importance and grows late. prilora: of the
    # first layer
    r_init: int = 8
    r_target: int = 16  # mean active rank at the end (uniform: always); a layer has E * r_target
    # of uniform: r_target divided by the experts a token has, or by those a layer has
    rank_rule: Literal["fixed", "per_top_k", "per_expert"] = "fixed"
    r_max: int = 32  # allocated ranks of every expert (uniform: r_target)
    interval: int = 200  # optimizer steps between events
    p_grow: float = 0.1  # an expert gains at most ceil(p_grow * (r_max - r_init)) ranks an event
    gamma: float = 1.2  # saliency = f * g / (rank + 1) ** gamma
    frequency_decay: float = 0.9  # of the routing-frequency EMA, an optimizer step
    importance_decay: float = 0.9  # of the rank-importance EMA (adalora: its beta1)
    uncertainty_decay: float = 0.85  # adalora: of the EMA of how much the importance varies, beta2
    frequency: Literal["weight", "count"] = "weight"
    # probe: not of the active ranks, but of the next one (see allocation/dr_lora.py)
    importance: Literal["gate_abs", "gate_sq", "elementwise_product", "probe"] = "gate_abs"
    saliency: Literal["product", "frequency", "importance"] = "product"
    warmup_ratio: float | None = (
        None  # of all steps, before the first event; None: train.warmup_ratio
    )
    last_event: int | None = None  # nothing changes after this step; None: total steps - interval
    released: bool = False  # what the authors' released code does, where it differs from the paper
    share: float = 0.25  # of a layer's experts that moe_sieve adapts
    profile_rows: int = 64  # of training data that moe_sieve reads first to count who is used
    pattern: str | None = None  # file of kind pattern: ranks [layers][experts], or a ranks.jsonl
    experts: int | None = None  # of alphalora with mixlora or mola: of all layers
    alpha_beta: float = 2.5  # alphalora, spectral_start: shares are alpha ** alpha_beta
    # dr_lora: saliency * (alpha of the expert / mean of its layer) ** spectral_prior; 0: off
    spectral_prior: float = 0.0
    # dr_lora: the first ranks of a layer's experts by alpha ** alpha_beta, r_init on average
    spectral_start: bool = False
    # of alphalora and these two: written by `drlora_jax.alpha --out`; None: computed
    alpha_file: str | None = None
    alpha_estimator: Literal["fix_finger", "median"] = "fix_finger"

    @property
    def asks_for_exponents(self) -> bool:
        """Whether ranks come from the heavy-tail exponents of the base's weights."""
        return self.kind == "alphalora" or self.spectral_prior != 0 or self.spectral_start

    def check(self):
        _at_most("allocation.r_target", self.r_target, LARGEST_RANK)
        _at_most("allocation.r_max", self.r_max, LARGEST_RANK)
        require(
            self.spectral_prior == 0 or (self.kind == "dr_lora" and not self.released),
            "allocation.spectral_prior is a factor of the saliency of kind=dr_lora "
            f"(released=False), got kind={self.kind} and released={self.released}.",
        )
        require(
            not self.spectral_start or (self.kind == "dr_lora" and not self.released),
            "allocation.spectral_start gives kind=dr_lora (released=False) its first ranks, got "
            f"kind={self.kind} and released={self.released}.",
        )
        require(
            not self.spectral_start or self.r_init > 0,
            "allocation.spectral_start shares out r_init ranks an expert; set r_init to 1 or more.",
        )
        for name, kinds in (("experts", "alphalora"), ("pattern", "pattern")):
            value = getattr(self, name)
            require(
                value is None or self.kind == kinds,
                f"allocation.{name}={value} is for kind={kinds}, got kind={self.kind}; leave it "
                "out.",
            )
        require(
            self.alpha_file is None or self.asks_for_exponents,
            f"allocation.alpha_file={self.alpha_file} is for kind=alphalora, spectral_prior and "
            f"spectral_start, got kind={self.kind} without them; leave it out.",
        )
        require(
            self.rank_rule == "fixed" or self.kind == "uniform",
            f"allocation.rank_rule={self.rank_rule} is a form of kind=uniform, got "
            f"kind={self.kind}.",
        )
        if self.experts is not None:
            _positive("allocation", {"experts": self.experts})
        if self.kind in ("dr_lora", "random"):
            self._check_growth()
        elif self.kind == "adalora":
            self._check_pruning()
        else:
            self._check_static()

    def _check_static(self):
        # Nothing grows: r_target is the mean rank, r_max what is allocated (uniform: r_target).
        _positive("allocation", {"r_target": self.r_target, "r_max": self.r_max})
        if self.kind == "moe_sieve":
            require(0 < self.share <= 1, f"allocation.share must be in (0, 1], got {self.share}.")
            _positive("allocation", {"profile_rows": self.profile_rows})
        if self.kind == "pattern":
            require(
                bool(self.pattern),
                "allocation.kind=pattern needs allocation.pattern=FILE: ranks [layers][experts] "
                "as JSON, or the ranks.jsonl of a run.",
            )

    def _check_growth(self):
        require(
            0 <= self.r_init <= self.r_target <= self.r_max and self.r_max > 0,
            "allocation needs 0 <= r_init <= r_target <= r_max, "
            f"got {self.r_init}, {self.r_target}, {self.r_max}.",
        )
        self._check_events()
        _positive("allocation", {"p_grow": self.p_grow})
        require(self.gamma >= 0, f"allocation.gamma must be 0 or more, got {self.gamma}.")
        _fraction("allocation", {"frequency_decay": self.frequency_decay})
        require(
            not self.released or (self.importance == "gate_abs" and self.saliency == "product"),
            "allocation.released=True fixes importance=gate_abs and saliency=product, "
            f"got {self.importance} and {self.saliency}.",
        )
        require(
            self.kind == "dr_lora" or not self.released,
            f"allocation.released=True is a form of kind=dr_lora, got kind={self.kind}.",
        )

    def _check_pruning(self):
        require(
            0 < self.r_target <= self.r_init <= self.r_max,
            "allocation.kind=adalora prunes from r_init to r_target: it needs 0 < r_target <= "
            f"r_init <= r_max, got r_target={self.r_target}, r_init={self.r_init}, "
            f"r_max={self.r_max}.",
        )
        self._check_events()
        _fraction("allocation", {"uncertainty_decay": self.uncertainty_decay})
        require(
            self.importance != "probe",
            "allocation.importance=probe measures the next rank, and adalora prunes the present "
            "ones: set gate_abs, gate_sq or elementwise_product.",
        )

    def _check_events(self):
        _positive("allocation", {"interval": self.interval})
        _fraction("allocation", {"importance_decay": self.importance_decay})
        if self.warmup_ratio is not None:
            _fraction("allocation", {"warmup_ratio": self.warmup_ratio})
        require(
            self.last_event is None or self.last_event > 0,
            f"allocation.last_event must be greater than 0, got {self.last_event}.",
        )


@dataclass(frozen=True)
class MeshSection(_Section):
    data: int = -1  # -1: whatever devices remain
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1
    # How tokens get to their experts: all to all devices, each where it is needed (ragged: on TPU;
    # padded: anywhere, for tests), or by sizes.
    exchange: Literal["auto", "gather", "ragged", "padded"] = "auto"

    def check(self):
        sizes = (self.data, self.fsdp, self.expert, self.tensor)
        require(
            all(size == -1 or size > 0 for size in sizes) and sizes.count(-1) <= 1,
            f"mesh sizes must be positive, at most one -1 (the rest of the devices), got {sizes}.",
        )
