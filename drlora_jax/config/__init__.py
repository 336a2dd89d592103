"""What a run is: frozen dataclasses, checked where they are made.

A config file is Python with one function, `get_config() -> TrainConfig`; `load_config` runs it and
applies `section.field=value` overrides. Every field is typed; unknown names, wrong types, values
out of range and contradictions are refused here, before anything touches a device. A run stores its
config as data (`to_dict`) and restores it as data (`from_dict`): a run directory is never executed.
"""

import dataclasses
import importlib.util
import pathlib
import typing
from dataclasses import dataclass, field

from drlora_jax.config.sections import (
    AdapterSection,
    AllocationSection,
    DataSection,
    MeshSection,
    ModelSection,
    RunSection,
    TrainSection,
)
from drlora_jax.config.sections.section import field_types, require
from drlora_jax.config.types import parse, type_name
from drlora_jax.errors import UserError
from drlora_jax.system.paths import FILE, check_local, kind_of, local_path
from drlora_jax.system.text import did_you_mean

__all__ = [
    "AdapterSection",
    "AllocationSection",
    "DataSection",
    "MeshSection",
    "ModelSection",
    "RunSection",
    "TrainConfig",
    "TrainSection",
    "all_fields",
    "apply_overrides",
    "config_file",
    "from_dict",
    "load_config",
    "to_dict",
]
PLACES = ("run.dir", "model.path", "data.path", "data.eval_path")  # fields that name paths
PLACES += ("allocation.pattern", "allocation.alpha_file", "adapter.experts_per_layer")


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
            require(isinstance(value, cls), f"{item.name} must be a {cls.__name__}, got {value!r}.")
        require(
            not self.adapter.makes_experts or self.allocation.kind != "moe_sieve",
            "allocation.kind=moe_sieve counts whom a trained router chooses; the router of "
            f"adapter.kind={self.adapter.kind} is new. Use uniform, dr_lora, random or pattern.",
        )
        require(
            not self.adapter.makes_experts
            or self.allocation.kind not in ("dr_lora", "random")
            or self.allocation.r_init > 0,
            f"allocation.r_init=0 with adapter.kind={self.adapter.kind}: its experts without a "
            "rank are never chosen, so none could earn one; set allocation.r_init=1 or more.",
        )
        require(
            self.adapter.kind != "lora" or self.allocation.kind == "uniform",
            "adapter.kind=lora has no experts to share ranks among: "
            f"set allocation.kind=uniform, got {self.allocation.kind}.",
        )
        require(
            self.allocation.rank_rule == "fixed" or self.adapter.kind != "lora",
            f"allocation.rank_rule={self.allocation.rank_rule} divides by a number of experts; "
            "adapter.kind=lora has none.",
        )
        require(
            self.allocation.rank_rule != "per_top_k" or self.adapter.top_p is None,
            "allocation.rank_rule=per_top_k divides by the experts of a token, and with "
            f"adapter.top_p={self.adapter.top_p} tokens have different numbers of them.",
        )
        has_own_experts = self.adapter.makes_experts
        require(
            self.allocation.kind != "alphalora"
            or has_own_experts == (self.allocation.experts is not None),
            "allocation.experts is how many experts alphalora gives to all layers of "
            "adapter.kind=mixlora or mola together, which need it; the experts of another kind are "
            f"there already. Got {self.allocation.experts} with adapter.kind={self.adapter.kind}.",
        )
        section = self.allocation
        name = "spectral_start" if section.spectral_start else "spectral_prior"
        require(
            not (section.spectral_start or section.spectral_prior) or not has_own_experts,
            f"allocation.{name} compares the pretrained weights of a layer's experts; those "
            f"of adapter.kind={self.adapter.kind} are new. Leave it out.",
        )
        require(
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
        require(isinstance(fields, dict), f"{section} must be a section of fields, got {fields!r}.")
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
    config = apply_overrides(config, overrides)
    _check_places(config)
    return config


def _check_places(config: TrainConfig) -> None:
    """Refuses addresses where paths are wanted, before anything is read."""
    for name in PLACES:
        section, field_name = name.split(".")
        value = getattr(getattr(config, section), field_name) or ()
        for text in (value,) if isinstance(value, str) else value:
            check_local(text, name)


def config_file(path: str) -> pathlib.Path:
    """Where a config lies: a path, or `bundled:NAME` (with the package, or in the clone)."""
    if not path.startswith("bundled:"):
        file = local_path(path, "--config")
        kind = kind_of(file)
        if kind != FILE or file.suffix != ".py":
            found = "it does not end in .py" if kind == FILE else f"it is {kind}"
            raise UserError(
                f"--config {path}: no such Python file ({found}). Give NAME.py with "
                "get_config(), or bundled:tiny."
            )
        return file
    name = path.removeprefix("bundled:")
    package = pathlib.Path(__file__).parents[1]
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
        changes.setdefault(section, {})[key] = parse(name, text, _field_type(section, key))
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
            rows.append((name, type_name(_field_type(section.name, item.name)), value))
    return rows


def _section_class(section: str) -> type:
    classes = field_types(TrainConfig)
    if section not in classes:
        raise UserError(f"Unknown config section {section!r}{_suggest(section, classes)}")
    return classes[section]


def _field_type(section: str, name: str):
    hints = field_types(_section_class(section))
    if name not in hints:
        every = [
            row
            for row in (
                f"{s}.{n}" for s in field_types(TrainConfig) for n in field_types(_section_class(s))
            )
        ]
        raise UserError(
            f"Unknown config field {section}.{name}{_suggest(f'{section}.{name}', every)}"
        )
    return hints[name]


def _suggest(name: str, known: typing.Iterable[str]) -> str:
    hint = did_you_mean(name, known) or f"known: {', '.join(known)}."
    return f"; {hint}"
