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

    def check(self):
        _require(bool(self.dir), "run.dir must name a directory, got an empty string.")
        in_range = 0 <= self.seed < 2**32
        _require(in_range, f"run.seed must be 0 or more and below 2**32, got {self.seed}.")
        counts = {"log_every": self.log_every, "checkpoint_every": self.checkpoint_every}
        _positive("run", counts | {"keep_last": self.keep_last})


@dataclass(frozen=True)
class ModelSection(_Section):
    path: str = "bundled:tiny_moe"  # a directory, a hub name, or bundled:NAME
    # Of base weights and activations; auto: bfloat16 on accelerators, float32 on CPUs.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    remat: Literal["none", "selective", "full"] = "selective"  # see drlora_jax/models/remat.py
    attention: Literal["auto", "xla", "chunked", "cudnn", "splash"] = "auto"  # drlora_jax/ops

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
    balance_form: Literal["pooled", "per_layer"] = "pooled"  # of all MoE layers at once, or each
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
    # the FFNs of a dense model, with a router
    kind: Literal["expert_lora", "lora", "mixlora"] = "expert_lora"
    targets: tuple[str, ...] = ("up", "down")  # roles, or regular expressions over parameter paths
    scale: float = 2.0  # alpha / rank: constant, whatever rank is active
    dropout: float = 0.1  # on the input of every low-rank product, in training
    rank: int | None = None  # of plain LoRA (attention, dense FFN); None: allocation.r_target
    router: Literal["frozen", "after_warmup"] = "frozen"
    router_learning_rate: float | None = None  # None: train.learning_rate
    num_experts: int = 8  # of mixlora
    experts_per_token: int = 2  # of mixlora
    # of mixlora, instead of experts_per_token: the best experts up to this sum of probabilities
    top_p: float | None = None
    freeze_a: bool = False  # only B trains (FFA-LoRA)
    freeze_idle_experts: bool = True  # no tokens in a step: factors and moments stay as they are

    def check(self):
        _require(bool(self.targets), "adapter.targets must name at least one projection, got none.")
        fused = "gate_up" in self.targets and {"gate", "up"} & set(self.targets)
        _require(
            not fused,
            f"adapter.targets has gate_up next to gate or up: one or the other, got "
            f"{self.targets}.",
        )
        _require(self.scale > 0, f"adapter.scale must be greater than 0, got {self.scale}.")
        _fraction("adapter", {"dropout": self.dropout})
        _require(
            self.rank is None or self.rank > 0,
            f"adapter.rank must be greater than 0, got {self.rank}.",
        )
        _at_most("adapter.rank", self.rank or 0, LARGEST_RANK)
        _positive("adapter", {"num_experts": self.num_experts})
        _require(
            0 < self.experts_per_token <= self.num_experts,
            "adapter.experts_per_token must be from 1 to adapter.num_experts "
            f"({self.num_experts}), got {self.experts_per_token}.",
        )
        _require(
            self.top_p is None or 0 < self.top_p <= 1,
            f"adapter.top_p must be in (0, 1] or None, got {self.top_p}.",
        )
        _require(
            self.kind == "expert_lora" or self.router == "frozen",
            f"adapter.router={self.router} is about the routers of an MoE: with "
            f"adapter.kind={self.kind} leave it at frozen (a mixlora router always trains).",
        )
        if self.router_learning_rate is not None:
            _positive("adapter", {"router_learning_rate": self.router_learning_rate})


@dataclass(frozen=True)
class AllocationSection(_Section):
    # random: the schedule of dr_lora, experts drawn by lot
    kind: Literal["uniform", "dr_lora", "random", "moe_sieve", "pattern"] = "dr_lora"
    r_init: int = 8  # active ranks at the start; from 0 an expert has no importance and grows late
    r_target: int = 16  # mean active rank at the end (uniform: always); a layer has E * r_target
    r_max: int = 32  # allocated ranks of every expert (uniform: r_target)
    interval: int = 200  # optimizer steps between growth events
    p_grow: float = 0.1  # an expert gains at most ceil(p_grow * (r_max - r_init)) ranks an event
    gamma: float = 1.2  # saliency = f * g / (rank + 1) ** gamma
    frequency_decay: float = 0.9  # of the routing-frequency EMA, an optimizer step
    importance_decay: float = 0.9  # of the rank-importance EMA
    frequency: Literal["weight", "count"] = "weight"
    # probe: not of the active ranks, but of the next one (see allocation/dr_lora.py)
    importance: Literal["gate_abs", "gate_sq", "elementwise_product", "probe"] = "gate_abs"
    saliency: Literal["product", "frequency", "importance"] = "product"
    warmup_ratio: float | None = (
        None  # of all steps, before the first event; None: train.warmup_ratio
    )
    last_event: int | None = None  # no growth after this step; None: total steps - interval
    released: bool = False  # what the authors' released code does, where it differs from the paper
    share: float = 0.25  # of a layer's experts that moe_sieve adapts
    profile_rows: int = 64  # of training data that moe_sieve reads first to count who is used
    pattern: str | None = None  # file of kind pattern: ranks [layers][experts], or a ranks.jsonl

    def check(self):
        _at_most("allocation.r_target", self.r_target, LARGEST_RANK)
        _at_most("allocation.r_max", self.r_max, LARGEST_RANK)
        if self.kind in ("dr_lora", "random"):
            self._check_growth()
            return
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
        _positive("allocation", {"interval": self.interval, "p_grow": self.p_grow})
        _require(self.gamma >= 0, f"allocation.gamma must be 0 or more, got {self.gamma}.")
        decays = {
            "frequency_decay": self.frequency_decay,
            "importance_decay": self.importance_decay,
        }
        _fraction("allocation", decays)
        if self.warmup_ratio is not None:
            _fraction("allocation", {"warmup_ratio": self.warmup_ratio})
        _require(
            self.last_event is None or self.last_event > 0,
            f"allocation.last_event must be greater than 0, got {self.last_event}.",
        )
        _require(
            not self.released or (self.importance == "gate_abs" and self.saliency == "product"),
            "allocation.released=True fixes importance=gate_abs and saliency=product, "
            f"got {self.importance} and {self.saliency}.",
        )
        _require(
            self.kind == "dr_lora" or not self.released,
            f"allocation.released=True is a form of kind=dr_lora, got kind={self.kind}.",
        )


@dataclass(frozen=True)
class MeshSection(_Section):
    data: int = -1  # -1: whatever devices remain
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1

    def check(self):
        sizes = dataclasses.astuple(self)
        _require(
            all(size == -1 or size > 0 for size in sizes) and sizes.count(-1) <= 1,
            f"mesh sizes must be positive, at most one -1 (the rest of the devices), got {sizes}.",
        )
        _require(
            self.tensor == 1,
            f"mesh.tensor={self.tensor}: tensor parallelism is not available; use mesh.data, "
            f"mesh.fsdp and mesh.expert.",
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
            self.adapter.kind != "mixlora" or self.allocation.kind != "moe_sieve",
            "allocation.kind=moe_sieve counts whom a trained router chooses; the router of "
            "adapter.kind=mixlora is new. Use uniform, dr_lora, random or pattern.",
        )
        _require(
            self.adapter.kind != "lora" or self.allocation.kind == "uniform",
            "adapter.kind=lora has no experts to share ranks among: "
            f"set allocation.kind=uniform, got {self.allocation.kind}.",
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
