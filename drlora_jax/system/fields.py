"""Fields of frozen dataclasses that are checked when they are built.

Sections of a config, policies and placements declare their fields with `option`: the default and
one line of meaning. `--help` and the config reference are generated from that line.
"""

import dataclasses
import functools
import types
import typing
from typing import Any, Literal

from drlora_jax.errors import UserError

LARGEST_INT = 2**32 - 1  # for every field
LARGEST_NUMBER = 1e38  # about the largest 32-bit float


def option(default: Any, meaning: str, *, is_path: bool = False) -> Any:
    """Declares a field of a dataclass.

    Args:
      default: an immutable value.
      meaning: one line for a reader who sees the name and the type.
      is_path: whether the value names files of this machine.
    """
    metadata = {"meaning": meaning, "is_path": is_path}
    return dataclasses.field(default=default, metadata=metadata)


@functools.cache  # slower than all checks together
def field_types(cls: type) -> dict[str, Any]:
    """Returns the types of a dataclass's fields by name."""
    hints = typing.get_type_hints(cls)
    return {item.name: hints[item.name] for item in dataclasses.fields(cls)}


class Section:
    """A part of the config: types are checked first, then the section's own `check` runs."""

    def __post_init__(self):
        section = type(self).__name__.removesuffix("Section").lower()
        for name, kind in field_types(type(self)).items():
            check_type(f"{section}.{name}", getattr(self, name), kind)
        self.check()

    def check(self):
        """Refuses ranges and contradictions inside this section."""


# ------------------------------------------------------------------------------------------- checks


def require(ok: bool, message: str) -> None:
    if not ok:
        raise UserError(message)


def positive(section: str, values: dict[str, float]) -> None:
    for name, value in values.items():
        require(value > 0, f"{section}.{name} must be greater than 0, got {value}.")


def at_most(name: str, value: int, limit: int, meaning: str = "") -> None:
    require(value <= limit, f"{name} must be at most {limit}{meaning}, got {value}.")


def fraction(section: str, values: dict[str, float]) -> None:
    for name, value in values.items():
        require(0 <= value < 1, f"{section}.{name} must be in [0, 1), got {value}.")


def check_type(name: str, value: Any, kind: Any) -> None:
    """Refuses a value that is not of a field's type or is too large for a device."""
    if not any(_matches(value, each) for each in alternatives(kind)):
        raise UserError(f"{name} must be {type_name(kind)}, got {shown(value)}.{_why(value)}")
    if isinstance(value, int) and abs(value) > LARGEST_INT:
        raise UserError(f"{name} must be within +-{LARGEST_INT}, got {shown(value)}.")


# -------------------------------------------------------------------------------------------- types


def alternatives(kind: Any) -> tuple:
    """Returns the members of a union, or the type alone."""
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def type_name(kind: Any) -> str:
    """Formats a type for `--help` and messages."""
    names = []
    for each in alternatives(kind):
        if typing.get_origin(each) is Literal:
            names.append(" | ".join(typing.get_args(each)))
        elif typing.get_origin(each) is tuple:
            names.append("a,b,...")
        else:
            names.append("none" if each is type(None) else each.__name__)
    return " | ".join(names)


def _matches(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_matches(item, str) for item in value)
    if kind is float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and abs(value) <= LARGEST_NUMBER  # false for nan
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is str:
        return isinstance(value, str) and _is_text(value)
    return isinstance(value, kind)


def _is_text(value: str) -> bool:
    """Returns whether a text has no NUL, which no path may have, and no lone surrogate, which
    stands for path bytes that are not UTF-8.
    """
    return "\0" not in value and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _why(value: Any) -> str:
    """Explains what is wrong with a value whose type looks right."""
    if isinstance(value, int | float) and abs(value) > LARGEST_NUMBER:
        return f" The largest number is {LARGEST_NUMBER:g}."
    texts = value if isinstance(value, tuple) else (value,)
    if all(isinstance(text, str) for text in texts) and not all(map(_is_text, texts)):
        return " It has a character that is not allowed in UTF-8 text or paths."
    return ""


def shown(value: Any) -> str:
    """Returns the value for a message, shortened if it is very long."""
    try:
        text = ", ".join(map(repr, value)) if isinstance(value, tuple) else repr(value)
    except ValueError:  # Python does not print integers of more than 4300 digits
        text = "a number with thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}..."
