"""The base class of the configuration's sections: fields with kinds, and values that never change.

The fields of actions from other packages are pydantic models. For what both have in common pydantic's names are used:
`model_fields`, `model_fields_set`, `model_copy`, `model_dump`, `model_validate`.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path as FilePath
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Self, dataclass_transform, get_type_hints

from flaskd.config.faults import Faults, Place, dotted
from flaskd.config.kind import NOTHING, Bounded, Kind, OrNull, attempt
from flaskd.config.kinds import Choice, kind_of
from flaskd.config.nodes import Items, Node, Scalar, Table, scalars, shown
from flaskd.config.python_source import from_python
from flaskd.config.wording import NO_VALUE, hidden, refuse, unknown_key, without_secrets
from flaskd.text import LONGEST_QUOTED

if TYPE_CHECKING:
    from flaskd.config.kind import Schema
    from flaskd.config.nodes import Path

_REQUIRED = object()


class Field:
    """A key of a section: its kind, its default and its description.

    `alias` is its name in the file if Python cannot have that name. `restart`: a reload cannot change it if the app
    runs in the daemon itself. `renewal`: if there are workers, only new ones can have another value. `check` is called
    with the value and with those earlier fields that have no fault; it returns the value to use, or raises ValueError.
    `told`: whether the schema has its default. `bounds`: see `flaskd.config.kinds.Bounded`.
    """

    def __init__(
        self,
        default: Any = _REQUIRED,
        *,
        factory: Callable[[], Any] | None = None,
        description: str = "",
        alias: str = "",
        restart: bool = False,
        renewal: bool = False,
        check: Callable[[Any, Mapping[str, Any]], Any] | None = None,
        told: bool = True,
        bounds: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        self.default, self.description, self.alias, self.restart, self.check = (
            default, description, alias, restart, check,
        )  # fmt: skip
        self.renewal = renewal
        self.told = told and default is not _REQUIRED
        self._factory, self._bounds = factory, bounds
        self.annotation: Any = None
        self.name = ""

    @property
    def key(self) -> str:
        """Its name in the file."""
        return self.alias or self.name

    def is_required(self) -> bool:
        """Whether it has no default."""
        return self.default is _REQUIRED and self._factory is None

    def make_default(self) -> Any:
        """The default, a new object for each section."""
        return copy.copy(self.default) if self._factory is None else self._factory()

    @functools.cached_property
    def kind(self) -> Kind:
        """The kind of its value; made when it is first needed."""
        kind = kind_of(self.annotation)
        if not self._bounds:
            return kind
        return OrNull(Bounded(kind.inner, self._bounds)) if isinstance(kind, OrNull) else Bounded(kind, self._bounds)


def field(
    default: Any = _REQUIRED, *, description: str, alias: str = "", restart: bool = False, renewal: bool = False,
    told: bool = True, check: Callable[[Any, Mapping[str, Any]], Any] | None = None, **bounds: float,
) -> Any:  # fmt: skip
    """Make a field; see `Field`."""
    return Field(
        default, description=description, alias=alias, restart=restart, renewal=renewal, told=told, check=check,
        bounds=bounds,
    )  # fmt: skip


def section(kind: type[Settings]) -> Any:
    """Make a field that holds a section; keys that are not written have their defaults."""
    return Field(factory=kind, description=inspect.cleandoc(kind.__doc__ or ""))


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Settings:
    """A section of the configuration, or the fields of a cleanup action; unknown keys are refused, values never change.

    Code that makes one gives values in seconds and bytes; `check_whole` alone checks these.
    """

    __slots__ = ("__dict__", "model_fields_set")
    model_fields: ClassVar[dict[str, Field]] = {}
    model_fields_set: set[str]
    """The names of the fields that were given a value."""

    alone: ClassVar[str] = ""
    """The field whose value may be written in place of the whole section, as one word."""

    def __init_subclass__(cls) -> None:
        cls.model_fields = {}
        for name, annotation in get_type_hints(cls, include_extras=True).items():
            found = getattr(cls, name, None)
            if isinstance(found, Field):
                found.name, found.annotation = name, annotation
                cls.model_fields[name] = found

    def __init__(self, **values: Any) -> None:
        if unknown := values.keys() - self.model_fields.keys():
            raise TypeError(f"{type(self).__name__} has no field {', '.join(sorted(unknown))}")
        for name, each in self.model_fields.items():
            if name not in values and each.is_required():
                raise TypeError(f"{type(self).__name__} needs {name}")
            self.__dict__[name] = values[name] if name in values else each.make_default()
        object.__setattr__(self, "model_fields_set", set(values))
        self.check_whole()

    def check_whole(self) -> None:
        """Raise ValueError for values that exclude each other; set values that depend on several fields."""

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"cannot set {name}: the values of a configuration never change")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"cannot delete {name}: the values of a configuration never change")

    def __setstate__(self, state: tuple[dict[str, Any] | None, dict[str, Any]]) -> None:
        """Restore it from pickle, with which a configuration goes to worker processes."""
        values, slots = state
        self.__dict__.update(values or {})  # pickle gives None if there are no fields
        object.__setattr__(self, "model_fields_set", slots["model_fields_set"])

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]  # it contains lists

    def __repr__(self) -> str:
        shown = (f"{name}={getattr(self, name)!r}" for name, each in self.model_fields.items() if not each.kind.hides)
        return f"{type(self).__name__}({', '.join(shown)})"

    def model_copy(self, *, update: Mapping[str, Any]) -> Self:
        """A copy with other values in some fields, which are not checked."""
        new = self._with(**update)
        object.__setattr__(new, "model_fields_set", self.model_fields_set | update.keys())
        return new

    def _with(self, **more: Any) -> Self:
        """A copy with further attributes that are no fields."""
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__, **more)
        object.__setattr__(new, "model_fields_set", self.model_fields_set)
        return new

    def model_dump(self, *, mode: str = "json", by_alias: bool = True) -> dict[str, Any]:  # noqa: ARG002 - pydantic's
        """Its values as YAML and JSON can hold them, named as in a file; secrets masked."""
        values = ((each, getattr(self, name)) for name, each in self.model_fields.items())
        return {each.key: None if value is None else each.kind.write(value) for each, value in values}

    @classmethod
    def model_validate(cls, data: Mapping[str, object]) -> Self:
        """Read it from Python values that are written as in a file; raises InvalidConfigError."""
        faults = Faults()
        read = cls.read(from_python(data, Place(f"<{cls.__name__}>"), faults), (), faults)
        faults.check()
        assert read is not None
        return read

    @classmethod
    def read(cls, node: Node, path: Path, faults: Faults) -> Self | None:
        """Read it from a node at the dotted key `path`; None if there is a fault, which is noted."""
        if isinstance(node, Scalar) and node.value is None:
            node = Table(node.key, node.place, {})  # all keys of the section are commented out
        if cls.alone and isinstance(node, Scalar) and isinstance(node.value, str):
            value = cls.model_fields[cls.alone].kind.read(node, path, faults)
            return None if value is NOTHING else cls(**{cls.alone: value})
        if not isinstance(node, Table):
            refuse(node, path, faults, "expected a mapping", functools.partial(cls._as_mapping, node, path))
            return None
        values, good = cls._read_fields(node, path, faults)
        keys = {each.key for each in cls.model_fields.values()}
        for name, inner in node.entries.items():
            if name not in keys:
                good = False
                faults.add(inner.key, dotted((*path, name)), functools.partial(cls._unknown, name, faults))
        if not good:
            return None
        try:
            return cls(**values)
        except ValueError as error:
            refuse(node, path, faults, without_secrets(str(error), node), whole=True)
            return None

    @classmethod
    def _unknown(cls, name: str, faults: Faults) -> str:
        return unknown_key(name, [each.key for each in cls.model_fields.values()], faults.elsewhere(name))

    @classmethod
    def _as_mapping(cls, node: Node, path: Path) -> str:
        """The mapping to write in place of a value or a list: one of the usual keys that accepts it, with the value."""
        if not path or any(each.secret or len(each.text) > LONGEST_QUOTED for _, each in scalars(node)):
            return ""
        if isinstance(node, Items) and any(isinstance(each, Table) for each in node.items):
            return f"; write its keys under {path[-1]} without the dashes, each key once"
        open_ = [each for each in cls.model_fields.values() if not each.kind.hides]
        glued = re.match(r"([\w-]+):\S", node.text) if isinstance(node, Scalar) else None
        if glued and any(each.key == glued[1] for each in open_):
            return f'; write a blank behind the colon: "{glued[1]}: ..."'
        # A word from a choice is meant for that key; a key that accepts any text is proposed only if it is the first.
        usual = [*open_[:2], *(each for each in open_[2:] if isinstance(each.kind, Choice))]
        fitting = (
            each.key
            for each in usual
            if each.annotation != FilePath | None and each.kind.read(node, (*path, each.key), Faults()) is not NOTHING
        )
        key = next(fitting, "")
        inside = f"{key}: {shown(node)}" if key else ", ".join(f"{each.key}: ..." for each in open_[:2])
        return f"; such as {path[-1]}: {{{inside}}}"

    @classmethod
    def _read_fields(cls, node: Table, path: Path, faults: Faults) -> tuple[dict[str, Any], bool]:
        """The values that are written, and whether none of them has a fault."""
        written: dict[str, Any] = {}
        before: dict[str, Any] = {}
        good = True
        for name, each in cls.model_fields.items():
            at = (*path, each.key)
            if each.key in node.entries:
                inner = node.entries[each.key]
                inner = hidden(inner) if each.kind.hides else inner
                value = each.kind.read(inner, at, faults)
                if value is not NOTHING and each.check is not None:
                    value = attempt(functools.partial(each.check, value, before), inner, at, faults)
                written[name] = value
            elif each.is_required():
                faults.add(node.key, dotted(at), NO_VALUE)
                value = NOTHING
            else:
                value = each.make_default()
            good = good and value is not NOTHING
            if value is not NOTHING:
                before[name] = value
        return written, good

    @classmethod
    def kind(cls) -> Kind:
        """The kind of a field that holds it."""
        return _SectionKind(cls)


class _SectionKind(Kind):
    def __init__(self, settings: type[Settings]) -> None:
        self._settings = settings

    def read(self, node: Node, path: Path, faults: Faults) -> Any:
        found = self._settings.read(node, path, faults)
        return NOTHING if found is None else found

    def write(self, value: Settings) -> dict[str, Any]:
        return value.model_dump()

    def schema(self, definitions: dict[str, Schema]) -> Schema:
        whole = definition(self._settings, definitions)
        if not (alone := self._settings.alone):
            return whole
        return {"anyOf": [self._settings.model_fields[alone].kind.schema(definitions), whole]}


def definition(settings: type[Settings], definitions: dict[str, Schema]) -> Schema:
    """Add the JSON Schema of a section to `definitions` if it is missing, and return a reference to it."""
    name = settings.__name__
    if name not in definitions:
        definitions[name] = {}  # its place, before those of its parts
        fields = settings.model_fields.values()
        required = [each.key for each in fields if each.is_required()]
        definitions[name] = {
            "additionalProperties": False,
            "description": inspect.cleandoc(settings.__doc__ or ""),
            "properties": {each.key: _property(each, definitions) for each in fields},
            **({"required": required} if required else {}),
            "title": name,
            "type": "object" if required else ["object", "null"],  # all of its keys may be commented out
        }
    return {"$ref": f"#/$defs/{name}"}


def _property(each: Field, definitions: dict[str, Schema]) -> Schema:
    schema = each.kind.schema(definitions)
    if "$ref" in schema:
        known = definitions[schema["$ref"].removeprefix("#/$defs/")].get("description")
        return schema if known == each.description else {**schema, "description": each.description}
    default = None if each.default is None else each.kind.write(each.default) if each.told else None
    schema |= {"default": default} if each.told else {}
    schema |= {"description": each.description, "title": each.key.replace("_", " ").title()}
    marks = {"restart": each.restart, "new_workers": each.renewal}
    return schema | {name: True for name, set_ in marks.items() if set_}
