"""Loads configs from files, command lines and stored runs."""

import dataclasses
import importlib.util
import pathlib
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from drlora_jax.config.flat import nested
from drlora_jax.config.kinds import KindSection
from drlora_jax.config.schema import TrainConfig
from drlora_jax.config.types import parse
from drlora_jax.errors import UserError
from drlora_jax.system.fields import field_types, require, type_name
from drlora_jax.system.paths import FILE, check_local, kind_of, local_path
from drlora_jax.system.text import did_you_mean


def load_config(path: str, overrides: typing.Sequence[str] = ()) -> TrainConfig:
    """Runs the config file's `get_config()` and applies `section.field=value` overrides.

    Args:
      path: a Python file, or `bundled:NAME` for a config of the package.
      overrides: strings like `train.steps=100`; values are parsed by the field's type.
    """
    file = config_file(path)
    module, config = _run_file(file)
    if not hasattr(module, "get_config"):
        raise UserError(
            f"The config file {file} has no function get_config(); add one that returns a "
            "TrainConfig."
        )
    if not isinstance(config, TrainConfig):
        raise UserError(
            f"get_config() in {file} must return a TrainConfig, got {type(config).__name__}."
        )
    config = settled(apply_overrides(config, overrides))
    _check_places(config)
    return config


def _run_file(file: pathlib.Path) -> tuple[types.ModuleType, Any]:
    """Returns a config file's module, and what its `get_config()` returns."""
    spec = importlib.util.spec_from_file_location("drlora_config", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return module, module.get_config() if hasattr(module, "get_config") else None
    except UserError:
        raise
    # Anything that a user's file raises is reported as the user's mistake; sys.exit too.
    except (Exception, SystemExit) as error:
        raise UserError(
            f"The config file {file} does not run: {type(error).__name__}: {error}"
        ) from error


def _check_places(config: TrainConfig) -> None:
    """Refuses URLs where paths are required, before anything is read."""
    for name in PLACES:
        section, field_name = name.split(".")
        value = getattr(getattr(config, section), field_name) or ()
        for text in (value,) if isinstance(value, str) else value:
            check_local(text, name)


def config_file(path: str) -> pathlib.Path:
    """Returns the file of a config: a path, or `bundled:NAME` (in the package, or in the clone)."""
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
        f"--config {path}: the package has no config of that name; use for example bundled:tiny."
    )


# ------------------------------------------------------------------------------------- command line


def apply_overrides(config: TrainConfig, overrides: typing.Sequence[str]) -> TrainConfig:
    """Returns a config with `section.field=value` strings applied; refuses unknown names and wrong
    types. Prints which values of the config file are dropped because the new `kind` lacks their
    fields.
    """
    changes: dict[str, dict] = {}
    for override in overrides:
        name, separator, text = override.partition("=")
        if not separator or name.count(".") != 1:
            raise UserError(
                f"Override {override!r} must look like section.field=value, for example "
                "train.steps=100."
            )
        section, key = name.split(".")
        changes.setdefault(section, {})[key] = parse(name, text, _field_type(section, key))
    # Setting one of steps and epochs on the command line replaces the other one of the file.
    for one, other in (("steps", "epochs"), ("epochs", "steps")):
        if changes.get("train", {}).get(one) is not None and other not in changes["train"]:
            changes["train"][other] = None
    sections = {name: _changed(getattr(config, name), given) for name, given in changes.items()}
    return dataclasses.replace(config, **sections)


def _changed(section, given: Mapping[str, Any]):
    if not isinstance(section, KindSection):
        return dataclasses.replace(section, **given)
    changed, dropped = section.changed(given)
    if dropped:
        name = type(section).__name__.removesuffix("Section").lower()
        listed = ", ".join(f"{key}={value}" for key, value in dropped.items())
        print(f"note: {name}.kind={changed.kind} does not use {listed} of the config file")
    return changed


def settled(config: TrainConfig) -> TrainConfig:
    """Returns a config in which every kind is named; refuses values that belong to another kind."""
    sections = {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}
    kinds = {n: each.settled() for n, each in sections.items() if isinstance(each, KindSection)}
    return dataclasses.replace(config, **kinds)


# --------------------------------------------------------------------------------------------- data


def to_dict(config: TrainConfig) -> dict:
    """Returns a plain nested dict, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(values: dict) -> TrainConfig:
    """Inverts `to_dict`; checks names, types and ranges like any other config. Fields that the
    stored `kind` does not have are ignored.
    """
    sections = {}
    for section, fields in values.items():
        cls = _section_class(section)
        require(isinstance(fields, dict), f"{section} must be a section of fields, got {fields!r}.")
        for name in fields:
            _field_type(section, name)  # refuses unknown names
        fields = own_fields(section, fields)
        sections[section] = cls(
            **{name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()}
        )
    return TrainConfig(**sections)


def own_fields(section: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the stored fields of a section without those that its kind does not have."""
    cls, kind = _section_class(section), fields.get("kind")
    if not issubclass(cls, KindSection) or not isinstance(kind, str) or kind not in cls.kinds:
        return dict(fields)
    return {name: value for name, value in fields.items() if cls.has(kind, name)}


def from_flat(values: Mapping[str, Any]) -> TrainConfig:
    """Builds a config from fields named `section.field`."""
    return from_dict(nested(values))


# ------------------------------------------------------------------------------------------- fields


class FieldRow(NamedTuple):
    """A field as documentation lists it."""

    name: str  # section.field
    type: str
    default: Any
    # (meaning, the kinds for which it has this meaning; () for all)
    meanings: tuple[tuple[str, tuple[str, ...]], ...]
    is_path: bool


def field_rows() -> Iterator[FieldRow]:
    """Yields every config field."""
    default = TrainConfig()
    for section, cls in field_types(TrainConfig).items():
        for item in dataclasses.fields(cls):
            about = item.metadata
            every = about.get("meanings") or {about["meaning"]: ()}
            yield FieldRow(
                f"{section}.{item.name}",
                type_name(field_types(cls)[item.name]),
                getattr(getattr(default, section), item.name),
                tuple((meaning, tuple(kinds)) for meaning, kinds in every.items()),
                about["is_path"],
            )


def all_fields() -> list[tuple[str, str, object]]:
    """Returns (name, type, default) of every config field."""
    return [(row.name, row.type, row.default) for row in field_rows()]


PLACES = tuple(row.name for row in field_rows() if row.is_path)


def _section_class(section: str) -> type:
    classes = field_types(TrainConfig)
    if section not in classes:
        raise UserError(f"Unknown config section {section!r}{_suggest(section, classes)}")
    return classes[section]


def _field_type(section: str, name: str):
    hints = field_types(_section_class(section))
    if name not in hints:
        every = [row.name for row in field_rows()]
        raise UserError(
            f"Unknown config field {section}.{name}{_suggest(f'{section}.{name}', every)}"
        )
    return hints[name]


def _suggest(name: str, known: typing.Iterable[str]) -> str:
    near = did_you_mean(name, known)
    return f"; {near}" if near else f"; known: {', '.join(known)}."
