"""What a run is: frozen dataclasses, checked where they are made.

A config file is Python with one function, `get_config() -> TrainConfig`; `load_config` runs it and
applies `section.field=value` overrides. Every field is typed; unknown names, wrong types, values
out of range and contradictions are refused here, before anything touches a device. A run stores its
config as data (`to_dict`) and restores it as data (`from_dict`): a run directory is never executed.
"""

import dataclasses
import difflib
import importlib.util
import pathlib
import types
import typing
from dataclasses import dataclass, field
from typing import Literal

from drlora_jax.errors import UserError
from drlora_jax.files import FILE, expand_user, kind_of

LARGEST_INT = 2**32 - 1  # of any field
LARGEST_BATCH = 2**31 - 1  # tokens: positions are 32-bit on devices
LARGEST_NUMBER = 1e38  # what a 32-bit float holds
LARGEST_RANK = 65536


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)


def _positive(section: str, values: dict[str, float]) -> None:
    for name, value in values.items():
        _require(value > 0, f"{section}.{name} must be greater than 0, got {value}.")


def _at_most(name: str, value: int, limit: int, meaning: str = "") -> None:
    _require(value <= limit, f"{name} must be at most {limit}{meaning}, got {value}.")


def _fraction(section: str, values: dict[str, float]) -> None:
    for name, value in values.items():
        _require(0 <= value < 1, f"{section}.{name} must be in [0, 1), got {value}.")


class _Section:
    """A part of the config: types are checked first, then what `check` of the section says."""

    def __post_init__(self):
        section = type(self).__name__.removesuffix("Section").lower()
        kinds = typing.get_type_hints(type(self))
        for item in dataclasses.fields(self):
            _check_type(f"{section}.{item.name}", getattr(self, item.name), kinds[item.name])
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
        _require(bool(self.dir), "run.dir must name a directory, got an empty string.")
        in_range = 0 <= self.seed < 2**32
        _require(in_range, f"run.seed must be 0 or more and below 2**32, got {self.seed}.")
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
        _require(bool(self.path), "model.path must name a model, got an empty string.")


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
        _require(
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
        _require(
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
            _require(value >= 0, f"train.{name} must be 0 or more, got {value}.")
        _require(
            self.max_grad_norm is None or self.max_grad_norm > 0,
            f"train.max_grad_norm must be greater than 0 or None, got {self.max_grad_norm}.",
        )
        _require(
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
        _require(bool(self.targets), "adapter.targets must name at least one projection, got none.")
        fused = "gate_up" in self.targets and {"gate", "up"} & set(self.targets)
        _require(
            not fused,
            f"adapter.targets has gate_up next to gate or up: one or the other, got "
            f"{self.targets}.",
        )
        _require(self.scale > 0, f"adapter.scale must be greater than 0, got {self.scale}.")
        _fraction("adapter", {"dropout": self.dropout, "factor_dropout": self.factor_dropout})
        for name in ("expert_scale", "expert_dropout"):
            _require(
                getattr(self, name) is None or self.kind in ("expert_lora", "mixlora"),
                f"adapter.{name} is for adapters that have experts beside plain LoRA, "
                f"adapter.kind=expert_lora or mixlora: with {self.kind} set "
                f"adapter.{name.removeprefix('expert_')}.",
            )
        if self.expert_scale is not None:
            _positive("adapter", {"expert_scale": self.expert_scale})
        _fraction("adapter", {"expert_dropout": self.expert_dropout or 0.0})
        _require(
            self.rank is None or self.rank > 0,
            f"adapter.rank must be greater than 0, got {self.rank}.",
        )
        _at_most("adapter.rank", self.rank or 0, LARGEST_RANK)
        _positive("adapter", {"num_experts": self.num_experts})
        _require(
            0 < self.experts_per_token <= self.num_experts
            or (self.experts_per_token > 0 and self.experts_per_layer is not None),
            "adapter.experts_per_token must be from 1 to adapter.num_experts "
            f"({self.num_experts}), got {self.experts_per_token}.",
        )
        _require(
            self.experts_per_layer is None or self.makes_experts,
            "adapter.experts_per_layer is for adapters with experts of their own, "
            f"adapter.kind=mola or mixlora, got {self.kind}.",
        )
        _require(
            self.top_p is None or 0 < self.top_p <= 1,
            f"adapter.top_p must be in (0, 1] or None, got {self.top_p}.",
        )
        _require(
            self.kind == "expert_lora" or self.router == "frozen",
            f"adapter.router={self.router} is about the routers of an MoE: with "
            f"adapter.kind={self.kind} leave it at frozen (its own router always trains).",
        )
        _require(
            not self.factor_dropout or self.kind == "lora",
            "adapter.factor_dropout leaves columns of A and rows of B out for all tokens at once; "
            f"with adapter.kind={self.kind} tokens have factors of different experts, most of them "
            "few tokens: use adapter.dropout, or set adapter.kind=lora.",
        )
        _require(
            not self.dora or self.kind == "lora",
            "adapter.dora=True rescales the columns of one adapted matrix; with "
            f"adapter.kind={self.kind} every token has other experts, and so another matrix. Set "
            "adapter.kind=lora.",
        )
        if self.router_learning_rate is not None:
            _positive("adapter", {"router_learning_rate": self.router_learning_rate})


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
    alpha_beta: float = 2.5  # alphalora: shares are alpha ** alpha_beta
    # dr_lora: saliency * (alpha of the expert / mean of its layer) ** spectral_prior; 0: off
    spectral_prior: float = 0.0
    # of alphalora and spectral_prior: written by `drlora_jax.alpha --out`; None: computed
    alpha_file: str | None = None
    alpha_estimator: Literal["fix_finger", "median"] = "fix_finger"

    def check(self):
        _at_most("allocation.r_target", self.r_target, LARGEST_RANK)
        _at_most("allocation.r_max", self.r_max, LARGEST_RANK)
        _require(
            self.spectral_prior == 0 or (self.kind == "dr_lora" and not self.released),
            "allocation.spectral_prior is a factor of the saliency of kind=dr_lora "
            f"(released=False), got kind={self.kind} and released={self.released}.",
        )
        _require(
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
            _require(0 < self.share <= 1, f"allocation.share must be in (0, 1], got {self.share}.")
            _positive("allocation", {"profile_rows": self.profile_rows})
        if self.kind == "pattern":
            _require(
                bool(self.pattern),
                "allocation.kind=pattern needs allocation.pattern=FILE: ranks [layers][experts] "
                "as JSON, or the ranks.jsonl of a run.",
            )

    def _check_growth(self):
        _require(
            0 <= self.r_init <= self.r_target <= self.r_max and self.r_max > 0,
            "allocation needs 0 <= r_init <= r_target <= r_max, "
            f"got {self.r_init}, {self.r_target}, {self.r_max}.",
        )
        self._check_events()
        _positive("allocation", {"p_grow": self.p_grow})
        _require(self.gamma >= 0, f"allocation.gamma must be 0 or more, got {self.gamma}.")
        _fraction("allocation", {"frequency_decay": self.frequency_decay})
        _require(
            not self.released or (self.importance == "gate_abs" and self.saliency == "product"),
            "allocation.released=True fixes importance=gate_abs and saliency=product, "
            f"got {self.importance} and {self.saliency}.",
        )
        _require(
            self.kind == "dr_lora" or not self.released,
            f"allocation.released=True is a form of kind=dr_lora, got kind={self.kind}.",
        )

    def _check_pruning(self):
        _require(
            0 < self.r_target <= self.r_init <= self.r_max,
            "allocation.kind=adalora prunes from r_init to r_target: it needs 0 < r_target <= "
            f"r_init <= r_max, got r_target={self.r_target}, r_init={self.r_init}, "
            f"r_max={self.r_max}.",
        )
        self._check_events()
        _fraction("allocation", {"uncertainty_decay": self.uncertainty_decay})
        _require(
            self.importance != "probe",
            "allocation.importance=probe measures the next rank, and adalora prunes the present "
            "ones: set gate_abs, gate_sq or elementwise_product.",
        )

    def _check_events(self):
        _positive("allocation", {"interval": self.interval})
        _fraction("allocation", {"importance_decay": self.importance_decay})
        if self.warmup_ratio is not None:
            _fraction("allocation", {"warmup_ratio": self.warmup_ratio})
        _require(
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
        _require(
            all(size == -1 or size > 0 for size in sizes) and sizes.count(-1) <= 1,
            f"mesh sizes must be positive, at most one -1 (the rest of the devices), got {sizes}.",
        )


@dataclass(frozen=True)
class TrainConfig:
    run: RunSection = field(default_factory=RunSection)
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    train: TrainSection = field(default_factory=lambda: TrainSection(steps=100))
    adapter: AdapterSection = field(default_factory=AdapterSection)
    allocation: AllocationSection = field(default_factory=AllocationSection)
    mesh: MeshSection = field(default_factory=MeshSection)

    def __post_init__(self):
        for item in dataclasses.fields(self):
            value, cls = getattr(self, item.name), _section_class(item.name)
            _require(
                isinstance(value, cls), f"{item.name} must be a {cls.__name__}, got {value!r}."
            )
        _require(
            not self.adapter.makes_experts or self.allocation.kind != "moe_sieve",
            "allocation.kind=moe_sieve counts whom a trained router chooses; the router of "
            f"adapter.kind={self.adapter.kind} is new. Use uniform, dr_lora, random or pattern.",
        )
        _require(
            not self.adapter.makes_experts
            or self.allocation.kind not in ("dr_lora", "random")
            or self.allocation.r_init > 0,
            f"allocation.r_init=0 with adapter.kind={self.adapter.kind}: its experts without a "
            "rank are never chosen, so none could earn one; set allocation.r_init=1 or more.",
        )
        _require(
            self.adapter.kind != "lora" or self.allocation.kind == "uniform",
            "adapter.kind=lora has no experts to share ranks among: "
            f"set allocation.kind=uniform, got {self.allocation.kind}.",
        )
        _require(
            self.allocation.rank_rule == "fixed" or self.adapter.kind != "lora",
            f"allocation.rank_rule={self.allocation.rank_rule} divides by a number of experts; "
            "adapter.kind=lora has none.",
        )
        _require(
            self.allocation.rank_rule != "per_top_k" or self.adapter.top_p is None,
            "allocation.rank_rule=per_top_k divides by the experts of a token, and with "
            f"adapter.top_p={self.adapter.top_p} tokens have different numbers of them.",
        )
        has_own_experts = self.adapter.makes_experts
        _require(
            self.allocation.kind != "alphalora"
            or has_own_experts == (self.allocation.experts is not None),
            "allocation.experts is how many experts alphalora gives to all layers of "
            "adapter.kind=mixlora or mola together, which need it; the experts of another kind are "
            f"there already. Got {self.allocation.experts} with adapter.kind={self.adapter.kind}.",
        )
        _require(
            not self.allocation.spectral_prior or not has_own_experts,
            "allocation.spectral_prior compares the pretrained weights of a layer's experts; those "
            f"of adapter.kind={self.adapter.kind} are new. Leave it at 0.",
        )
        _require(
            self.adapter.experts_per_layer is None
            or self.allocation.kind not in ("prilora", "alphalora"),
            f"allocation.kind={self.allocation.kind} shares ranks or experts out among layers "
            "alike, and adapter.experts_per_layer makes them different. Use one of them.",
        )


def to_dict(config: TrainConfig) -> dict:
    """Plain nested dict, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(values: dict) -> TrainConfig:
    """The inverse of `to_dict`; checks names, types and ranges like any other config."""
    sections = {}
    for section, fields in values.items():
        cls = _section_class(section)
        _require(
            isinstance(fields, dict), f"{section} must be a section of fields, got {fields!r}."
        )
        kwargs = {}
        for name, value in fields.items():
            _field_type(section, name)  # refuses unknown names
            kwargs[name] = tuple(value) if isinstance(value, list) else value
        sections[section] = cls(**kwargs)
    return TrainConfig(**sections)


def load_config(path: str, overrides: typing.Sequence[str] = ()) -> TrainConfig:
    """Runs the config file's `get_config()` and applies `section.field=value` overrides.

    Args:
      path: a Python file, or `bundled:NAME` for a config that the package carries.
      overrides: strings like `train.steps=100`; values are read by the field's type.
    """
    file = config_file(path)
    spec = importlib.util.spec_from_file_location("drlora_config", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config() if hasattr(module, "get_config") else None
    except UserError:
        raise
    # Whatever a user's file raises is the user's mistake, named with the file; sys.exit too.
    except (Exception, SystemExit) as error:
        raise UserError(
            f"The config file {file} does not run: {type(error).__name__}: {error}"
        ) from error
    if not hasattr(module, "get_config"):
        raise UserError(
            f"The config file {file} has no function get_config(); it must return a TrainConfig."
        )
    if not isinstance(config, TrainConfig):
        raise UserError(
            f"get_config() in {file} must return a TrainConfig, got {type(config).__name__}."
        )
    return apply_overrides(config, overrides)


def config_file(path: str) -> pathlib.Path:
    """Where a config lies: a path, or `bundled:NAME` (with the package, or in the clone)."""
    if not path.startswith("bundled:"):
        file = expand_user(path)
        kind = kind_of(file)
        if kind != FILE or file.suffix != ".py":
            found = "it does not end in .py" if kind == FILE else f"it is {kind}"
            raise UserError(
                f"--config {path}: no such Python file ({found}). Give NAME.py with "
                "get_config(), or bundled:tiny."
            )
        return file
    name = path.removeprefix("bundled:")
    package = pathlib.Path(__file__).parent
    for folder in (package / "configs", package.parent / "configs"):
        if pathlib.PurePath(name).name == name and kind_of(folder / f"{name}.py") == FILE:
            return folder / f"{name}.py"
    raise UserError(
        f"--config {path}: the package has no config of that name; one of them is bundled:tiny."
    )


def apply_overrides(config: TrainConfig, overrides: typing.Sequence[str]) -> TrainConfig:
    """Returns a config with `section.field=value` strings applied; refuses unknown names and wrong
    types.
    """
    changes: dict[str, dict] = {}
    for override in overrides:
        name, separator, text = override.partition("=")
        if not separator or name.count(".") != 1:
            raise UserError(
                f"Override {override!r} must look like section.field=value, for example "
                f"train.steps=100."
            )
        section, key = name.split(".")
        changes.setdefault(section, {})[key] = _parse(name, text, _field_type(section, key))
    # Setting one of steps and epochs on the command line replaces the other one of the file.
    for one, other in (("steps", "epochs"), ("epochs", "steps")):
        if changes.get("train", {}).get(one) is not None and other not in changes["train"]:
            changes["train"][other] = None
    sections = {
        name: dataclasses.replace(getattr(config, name), **values)
        for name, values in changes.items()
    }
    return dataclasses.replace(config, **sections)


def all_fields() -> list[tuple[str, str, object]]:
    """(name, type, default) of every config field, for `--help`."""
    rows = []
    default = TrainConfig()
    for section in dataclasses.fields(TrainConfig):
        for item in dataclasses.fields(_section_class(section.name)):
            name = f"{section.name}.{item.name}"
            value = getattr(getattr(default, section.name), item.name)
            rows.append((name, _type_name(_field_type(section.name, item.name)), value))
    return rows


def _section_class(section: str) -> type:
    classes = typing.get_type_hints(TrainConfig)
    if section not in classes:
        raise UserError(f"Unknown config section {section!r}{_suggest(section, classes)}")
    return classes[section]


def _field_type(section: str, name: str):
    hints = typing.get_type_hints(_section_class(section))
    if name not in hints:
        every = [
            row
            for row in (
                f"{s}.{n}"
                for s in typing.get_type_hints(TrainConfig)
                for n in typing.get_type_hints(_section_class(s))
            )
        ]
        raise UserError(
            f"Unknown config field {section}.{name}{_suggest(f'{section}.{name}', every)}"
        )
    return hints[name]


def _suggest(name: str, known: typing.Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}."


def _options(kind) -> tuple:
    """The alternatives of a union, or the type alone."""
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def _type_name(kind) -> str:
    names = []
    for option in _options(kind):
        if typing.get_origin(option) is Literal:
            names.append(" | ".join(typing.get_args(option)))
        elif typing.get_origin(option) is tuple:
            names.append("a,b,...")
        else:
            names.append("none" if option is type(None) else option.__name__)
    return " | ".join(names)


def _matches(value, option) -> bool:
    if typing.get_origin(option) is Literal:
        return value in typing.get_args(option)
    if typing.get_origin(option) is tuple:
        return isinstance(value, tuple) and all(_matches(item, str) for item in value)
    if option is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and abs(value) <= LARGEST_NUMBER  # false for nan
    if option is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if option is str:
        return isinstance(value, str) and _is_text(value)
    return isinstance(value, option)


def _is_text(value: str) -> bool:
    """No NUL, which no path may have, and no lone surrogate: bytes of a path that are not UTF-8."""
    return "\0" not in value and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _check_type(name: str, value, kind) -> None:
    if not any(_matches(value, option) for option in _options(kind)):
        raise UserError(f"{name} must be {_type_name(kind)}, got {_shown(value)}.{_why(value)}")
    if isinstance(value, int) and abs(value) > LARGEST_INT:
        raise UserError(f"{name} must be within +-{LARGEST_INT}, got {_shown(value)}.")


def _why(value) -> str:
    """What is wrong with a value of a type that looks right."""
    if isinstance(value, int | float) and abs(value) > LARGEST_NUMBER:
        return f" Numbers go up to {LARGEST_NUMBER:g}."
    texts = value if isinstance(value, tuple) else (value,)
    if all(isinstance(text, str) for text in texts) and not all(map(_is_text, texts)):
        return " It has a character that no UTF-8 text or path has."
    return ""


def _shown(value) -> str:
    """The value for a message, cut if it is very long."""
    try:
        text = repr(value)
    except ValueError:  # Python does not print integers of more than 4300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _parse(name: str, text: str, kind):
    """Reads a command-line value by the field's type."""
    options = _options(kind)
    if type(None) in options and text.lower() in ("none", "null"):
        return None
    for option in options:
        if option is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if typing.get_origin(option) is tuple:
            if text[:1] + text[-1:] in ("()", "[]"):  # as Python prints a tuple or a list
                text = text[1:-1]
            return tuple(part.strip(" '\"") for part in text.split(",") if part.strip(" '\""))
        if option is str or (
            typing.get_origin(option) is Literal and text in typing.get_args(option)
        ):
            return text
        if option in (int, float):
            try:
                return option(text)
            except ValueError:
                continue
    raise UserError(f"{name} must be {_type_name(kind)}, got {_shown(text)}.")
