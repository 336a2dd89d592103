"""What every section of a config is: typed fields, checked where the section is made."""

import dataclasses
import functools
import typing

from drlora_jax.config.types import check_type
from drlora_jax.errors import UserError

LARGEST_RANK = 65536


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


@functools.cache  # it takes longer than all checks together
def field_types(cls: type) -> dict[str, typing.Any]:
    """The types of a dataclass's fields by name."""
    return typing.get_type_hints(cls)


class Section:
    """A part of the config: types are checked first, then what `check` of the section says."""

    def __post_init__(self):
        section = type(self).__name__.removesuffix("Section").lower()
        kinds = field_types(type(self))
        for item in dataclasses.fields(self):
            check_type(f"{section}.{item.name}", getattr(self, item.name), kinds[item.name])
        self.check()

    def check(self):
        """Ranges and contradictions inside this section."""
