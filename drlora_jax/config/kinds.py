"""Sections whose fields depend on a `kind`, built from a registry of policies or placements."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, Self

from drlora_jax.errors import UserError
from drlora_jax.system.fields import Section, field_types, shown


class Unnamed(str):
    """The default kind of a section that nobody has named yet."""

    __slots__ = ()


class KindSection(Section):
    """A section with a field `kind`, built by `with_kinds`."""

    kinds: ClassVar[Mapping[str, type]]

    @functools.cached_property
    def own(self) -> Any:
        """The chosen kind, with the values of its own fields."""
        cls = self.kinds[self.kind]
        return cls(**{item.name: getattr(self, item.name) for item in dataclasses.fields(cls)})

    def check(self):
        if not isinstance(self.kind, Unnamed):
            self.refuse(self.kind, self.foreign(self.kind))
        self.own.check(self)

    def foreign(self, kind: str) -> dict[str, Any]:
        """Returns the fields that a kind does not have, if their values differ from the
        defaults.
        """
        return {
            item.name: getattr(self, item.name)
            for item in dataclasses.fields(self)
            if not self.has(kind, item.name) and getattr(self, item.name) != item.default
        }

    @classmethod
    def has(cls, kind: str, name: str) -> bool:
        """Returns whether a kind has a field: one of its own, or one that all kinds share."""
        owners = cls.owners(name)
        return not owners or kind in owners

    @classmethod
    def owners(cls, name: str) -> list[str]:
        """Returns the kinds that declare a field; empty for a field that all share."""
        return [
            kind
            for kind, own in cls.kinds.items()
            if any(item.name == name for item in dataclasses.fields(own))
        ]

    @classmethod
    def refuse(cls, kind: str, given: Mapping[str, Any]) -> None:
        """Refuses fields that are given although the kind does not have them."""
        section = cls.__name__.removesuffix("Section").lower()
        for name, value in given.items():
            *most, last = cls.owners(name)
            owners = f"{', '.join(most)} or {last}" if most else last
            value = value if isinstance(value, str) else shown(value)
            raise UserError(
                f"{section}.{name}={value} is for kind={owners}, got kind={kind}; leave it out."
            )

    def changed(self, given: Mapping[str, Any]) -> tuple[Self, dict[str, Any]]:
        """Applies values from the command line.

        Returns:
          The section, and the dropped fields: those that the config file had set for its own kind,
          if the command line names another kind that lacks them.

        Raises:
          UserError: a given field that the kind does not have.
        """
        kind = given.get("kind", self.kind)
        self.refuse(kind, {name: given[name] for name in given if not self.has(kind, name)})
        dropped = self.foreign(kind) if "kind" in given else {}
        defaults = {name: type(self).__dataclass_fields__[name].default for name in dropped}
        return dataclasses.replace(self, **defaults, **given), dropped

    def settled(self) -> Self:
        """Returns the section with its kind named, so that no field of another kind may have a
        value.
        """
        return dataclasses.replace(self, kind=str(self.kind))


def with_kinds(kinds: Mapping[str, type]) -> Callable[[type], type]:
    """Decorates the shared part of a section, a frozen dataclass that derives from `KindSection`.

    A registry is a mapping from the value of `kind` to a frozen dataclass of that kind's own
    fields, declared with `option`, which has a method `check(section)` and a line `text`:

        @with_kinds({"uniform": Uniform, "dr_lora": DrLora})
        @dataclass(frozen=True)
        class AllocationSection(KindSection):
            kind: str = option("dr_lora", "who decides the active ranks")
            r_target: int = option(16, "mean active rank at the end")

    The resulting section is flat: `kind` is a Literal of the registry's names, the shared fields
    follow, then each kind's own. `section.own` is the chosen kind's dataclass with its values. A
    field that several kinds declare is one field, with one type and default; each kind may
    document its own meaning. A field of another kind must keep its default, or it is refused.
    """

    def decorate(shared: type) -> type:
        default = shared.__dataclass_fields__["kind"].default
        kind = dataclasses.field(
            default=Unnamed(default), metadata=shared.__dataclass_fields__["kind"].metadata
        )
        own = _own_fields(shared, kinds)
        made = dataclasses.make_dataclass(
            shared.__name__,
            [("kind", Literal[tuple(kinds)], kind), *own],
            bases=(shared,),
            namespace={"kinds": kinds, "__doc__": shared.__doc__},
            frozen=True,
        )
        made.__module__ = shared.__module__  # pickle looks it up there
        return made

    return decorate


def _own_fields(shared: type, kinds: Mapping[str, type]) -> list[tuple[str, Any, Any]]:
    """Returns (name, type, field) of the fields that the kinds declare, each once."""
    found: dict[str, tuple[Any, Any]] = {}
    for kind, own in kinds.items():
        for item in dataclasses.fields(own):
            type_ = field_types(own)[item.name]
            metadata = dict(item.metadata) | {"meanings": {}}
            field = dataclasses.field(default=item.default, metadata=metadata)
            known, before = found.setdefault(item.name, (type_, field))
            is_same = known == type_ and before.default == item.default
            assert is_same and item.name not in shared.__dataclass_fields__, (kind, item.name)
            before.metadata["meanings"].setdefault(item.metadata["meaning"], []).append(kind)
    return [(name, type_, field) for name, (type_, field) in found.items()]
