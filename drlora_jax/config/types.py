"""Parses the values of config fields from a command line."""

import re
import typing
from typing import Any, Literal

from drlora_jax.errors import UserError
from drlora_jax.system.fields import alternatives, shown, type_name
from drlora_jax.system.paths import DIRECTORY, FILE, expand_user, kind_of

# One part of a list: quoted, with any commas, or up to the next comma.
_PART = re.compile(r"""\s*(?:"([^"]*)"|'([^']*)')\s*(?:,|$)|([^,]*)(?:,|$)""")


def parse(name: str, text: str, kind: Any) -> Any:
    """Reads a command-line value by the field's type."""
    options = alternatives(kind)
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
    raise UserError(f"{name} must be {type_name(kind)}, got {shown(text)}.")


def _parts(name: str, text: str) -> tuple[str, ...]:
    """Splits a list. A data path with a comma is one part if such a file exists or it is quoted."""
    is_path = name.startswith("data.") and "," in text
    if is_path and kind_of(expand_user(text)) in (FILE, DIRECTORY):
        return (text,)
    if text[:1] + text[-1:] in ("()", "[]"):  # as Python prints a tuple or a list
        text = text[1:-1]
    found = [
        double or single or plain.strip(" '\"") for double, single, plain in _PART.findall(text)
    ]
    return tuple(part for part in found if part)
