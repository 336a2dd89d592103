"""A config as one level of `section.field`, and back."""

from collections.abc import Mapping
from typing import Any


def flat(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns {section.field: value} of {section: {field: value}}."""
    return {
        f"{section}.{name}": value
        for section, fields in sections.items()
        for name, value in fields.items()
    }


def nested(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns {section: {field: value}} of {section.field: value}."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section, _, field = name.partition(".")
        sections.setdefault(section, {})[field] = value
    return sections
