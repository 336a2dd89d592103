"""Types of config fields: what a value must be, how it is read from a command line, and named."""

import re
import types
import typing
from typing import Literal

from drlora_jax.errors import UserError
from drlora_jax.system.paths import DIRECTORY, FILE, expand_user, kind_of

LARGEST_INT = 2**32 - 1  # of any field
LARGEST_NUMBER = 1e38  # what a 32-bit float holds


def _options(kind) -> tuple:
    """The alternatives of a union, or the type alone."""
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def type_name(kind) -> str:
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


def check_type(name: str, value, kind) -> None:
    if not any(_matches(value, option) for option in _options(kind)):
        raise UserError(f"{name} must be {type_name(kind)}, got {_shown(value)}.{_why(value)}")
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
        text = ", ".join(map(repr, value)) if isinstance(value, tuple) else repr(value)
    except ValueError:  # Python does not print integers of more than 4300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}..."


# One part of a list: quoted, with any commas, or up to the next comma.
_PART = re.compile(r"""\s*(?:"([^"]*)"|'([^']*)')\s*(?:,|$)|([^,]*)(?:,|$)""")


def _parts(name: str, text: str) -> tuple[str, ...]:
    """The parts of a list; a data path with a comma in it is one part where there is such a file,
    or in quotes.
    """
    is_path = name.startswith("data.") and "," in text
    if is_path and kind_of(expand_user(text)) in (FILE, DIRECTORY):
        return (text,)
    if text[:1] + text[-1:] in ("()", "[]"):  # as Python prints a tuple or a list
        text = text[1:-1]
    found = [
        double or single or plain.strip(" '\"") for double, single, plain in _PART.findall(text)
    ]
    return tuple(part for part in found if part)


def parse(name: str, text: str, kind):
    """Reads a command-line value by the field's type."""
    options = _options(kind)
    if type(None) in options and text.lower() in ("none", "null"):
        return None
    for option in options:
        if option is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if typing.get_origin(option) is tuple:
            return _parts(name, text)
        if option is str or (
            typing.get_origin(option) is Literal and text in typing.get_args(option)
        ):
            return text
        if option in (int, float):
            try:
                return option(text)
            except ValueError:
                continue
    raise UserError(f"{name} must be {type_name(kind)}, got {_shown(text)}.")
