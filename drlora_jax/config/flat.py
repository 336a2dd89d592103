"""Converts a config between sections and one level of `section.field`."""

from collections.abc import Mapping
from typing import Any


def flat(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Flattens {section: {field: value}} to {section.field: value}."""
    return {
        f"{section}.{name}": value
        for section, fields in sections.items()
        for name, value in fields.items()
    }


def nested(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Nests {section.field: value} as {section: {field: value}}."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section, _, field = name.partition(".")
        sections.setdefault(section, {})[field] = value
    return sections
