"""Recognises directories that were given as a model or a run, and says what to give instead."""

import pathlib
from typing import NamedTuple

from drlora_jax.errors import UserError
from drlora_jax.system.paths import ABSENT, DIRECTORY, FILE, kind_of, read_json

ADAPTER_CONFIG = "adapter_config.json"
MOST_LOOKED_AT = 1000  # entries of a folder
_WANTED = "give the run.dir of a training"
_LEVELS = 3  # from a checkpoint's parts up to its run


class Described(NamedTuple):
    """The description of a directory that is no model directory."""

    what: str  # "a run directory", ...
    as_model: str  # what to give if a model is expected
    as_run: str  # what to give if a run is expected


def is_run(values: dict) -> bool:
    """Returns whether config.json has all that a run stores there."""
    config, steps = values.get("config"), values.get("schedule_steps")
    fingerprints = (values.get("base_fingerprint"), values.get("data_fingerprint"))
    return (
        isinstance(config, dict)
        and all(isinstance(fields, dict) for fields in config.values())
        and all(isinstance(value, str) for value in fingerprints)
        and isinstance(steps, int)
        and steps > 0
    )


def describe(directory: pathlib.Path) -> Described | None:
    """Describes a directory that is known and is no model directory; returns None for others."""
    finders = (_run, _adapter, _part_of_run, _cache, _other_weights, _folder, _empty)
    return next(filter(None, (find(directory) for find in finders)), None)


def is_model(directory: pathlib.Path) -> bool:
    return isinstance(_values(directory / "config.json").get("model_type"), str)


def _run(directory: pathlib.Path) -> Described | None:
    values = _values(directory / "config.json")
    if not isinstance(values.get("config"), dict):
        return None
    section = values["config"].get("model")
    base = section.get("path") if isinstance(section, dict) else None
    return Described(
        "a run directory",
        f"use it with --run; its base model is {base or 'named in its config.json'}",
        "use it as it is",
    )


def _part_of_run(directory: pathlib.Path) -> Described | None:
    for parent in list(directory.absolute().parents)[:_LEVELS]:
        if _run(parent):
            shown = _shown(parent)
            return Described(f"inside the run {shown}", f"use --run {shown}", f"give {shown}")
    return None


def _adapter(directory: pathlib.Path) -> Described | None:
    file = directory / ADAPTER_CONFIG
    if kind_of(file) == ABSENT or is_model(directory):
        return None
    base = _values(file).get("base_model_name_or_path")
    named = isinstance(base, str) and base
    what = f"a PEFT adapter of the base model {base}" if named else "a PEFT adapter"
    model = f"give that base model ({base})" if named else "give its base model"
    return Described(
        what,
        f"{model}, or the adapter merged into it",
        "give the run.dir that it was exported from",
    )


def _cache(directory: pathlib.Path) -> Described | None:
    """Recognises a folder of the hub's cache, one level too high."""
    commits = directory if directory.name == "snapshots" else directory / "snapshots"
    found = sorted(_folders(commits), key=lambda each: each.stat().st_mtime)
    if not found or not commits.parent.name.startswith("models--"):
        return None
    name = commits.parent.name.removeprefix("models--").replace("--", "/")
    return Described(
        f"the hub cache's folder of {name}",
        f"give the name {name}, or {found[-1]}",
        "give the run.dir of a training",
    )


def _other_weights(directory: pathlib.Path) -> Described | None:
    kinds = (
        ("*.gguf", "GGUF weights", "GGUF is not read; give the model's own safetensors directory"),
        ("consolidated*.pth", "weights in Meta's own format", "give the transformers version"),
        ("*.bin", "pickle files", "pickles are not read; convert them to safetensors"),
        ("*.pt", "pickle files", "pickles are not read; convert them to safetensors"),
    )
    if kind_of(directory / "config.json") != ABSENT:
        return None
    for pattern, what, way in kinds:
        names = sorted(each.name for each in directory.glob(pattern) if each.name[0] != ".")
        if names:
            return Described(
                f"a directory of {what} ({', '.join(names[:3])})",
                way,
                "give the run.dir of a training",
            )
    return None


def _folder(directory: pathlib.Path) -> Described | None:
    """Recognises a folder whose subfolders are runs or models."""
    folders = _folders(directory)
    runs = [each for each in folders if _run(each)]
    models = [each for each in folders if is_model(each)]
    if not runs and not models:
        return None
    shown = ", ".join(each.name for each in (runs or models)[:3])
    return Described(
        f"a folder of {'runs' if runs else 'models'} ({shown})",
        f"give one of its models, such as {models[0]}" if models else "use --run with one of them",
        f"give one of them, such as {runs[0]}" if runs else "give the run.dir of a training",
    )


def _empty(directory: pathlib.Path) -> Described | None:
    if kind_of(directory) != DIRECTORY or any(directory.iterdir()):
        return None
    way = "give one that has a config.json"
    if not directory.is_absolute() and len(directory.parts) == 2:
        way = "remove it to have the hub's model of this name"
    return Described("an empty directory", way, "give the run.dir of a training that saved")


def _shown(directory: pathlib.Path) -> pathlib.Path:
    here = pathlib.Path.cwd()
    return directory.relative_to(here) if directory.is_relative_to(here) else directory


def _folders(directory: pathlib.Path) -> list[pathlib.Path]:
    try:
        entries = sorted(directory.iterdir())[:MOST_LOOKED_AT]
    except OSError:
        return []
    return [each for each in entries if each.name[0] != "." and kind_of(each) == DIRECTORY]


def _values(file: pathlib.Path) -> dict:
    """Returns the JSON object in a file; an empty one if there is none."""
    try:
        return read_json(file) if kind_of(file) == FILE else {}
    except UserError:
        return {}


# --------------------------------------------------------------------------------------------- runs


def read_run(directory: pathlib.Path, shown: str) -> dict:
    """Returns the content of a run's config.json; explains what a directory is instead of a run.

    Args:
      shown: the directory as it was given, with its option.
    """
    kind = kind_of(directory)
    if kind == FILE:
        described = _part_of_run(directory)
        raise UserError(f"{shown} is a file; {described.as_run if described else _WANTED}.")
    if kind != DIRECTORY:
        raise UserError(f"{shown} is {kind}; {_WANTED}.")
    file = directory / "config.json"
    values = read_json(file) if kind_of(file) != ABSENT else {}
    if is_run(values):
        return values
    if "config" in values:
        raise UserError(
            f"{shown} has a config.json that lacks values of a run. Is it damaged? {_WANTED}."
        )
    raise UserError(f"{shown} {why_no_run(directory)}.")


def why_no_run(directory: pathlib.Path) -> str:
    """Explains what a directory is instead of a run, and what to give."""
    if is_model(directory):
        return "is a model directory, not a run; use it with --model"
    described = describe(directory)
    if described is None:
        return f"is not a run: it has no config.json of one; {_WANTED}"
    return f"is {described.what}, not a run; {described.as_run}"
