"""The kinds of values: how each is read from a node, written for people, and described as JSON Schema.

`kind_of` makes a kind of an annotation: ``int``, ``Literal["a", "b"]``, ``list[str] | None``. What an ``Annotated``
adds is called with the kind inside, and returns the kind around it.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Union, get_args, get_origin

from flaskd.config.faults import Faults
from flaskd.config.nodes import Items, Node, Scalar, Table, plain
from flaskd.config.wording import hint, one_of, refuse, without_secrets
from flaskd.text import MASK

if TYPE_CHECKING:
    from flaskd.config.nodes import Path as NodePath

NOTHING: Final = object()
"""The result for a node with a fault, because None may be a value."""

Schema = dict[str, Any]
_BOUNDS: dict[str, tuple[str, str, Callable[[Any, float], bool]]] = {
    "ge": ("at least {:g}", "minimum", lambda value, limit: value >= limit),
    "gt": ("more than {:g}", "exclusiveMinimum", lambda value, limit: value > limit),
    "le": ("at most {:g}", "maximum", lambda value, limit: value <= limit),
    "min_length": ("a list of at least {:g}", "minItems", lambda value, limit: len(value) >= limit),
}  # fmt: skip
"""The words of a bound, its name in JSON Schema, and the function that says whether a value keeps it."""


class SecretText:
    """Text that no repr shows."""

    def __init__(self, text: str) -> None:
        self._text = text

    def get_secret_value(self) -> str:
        """The text itself."""
        return self._text

    def __repr__(self) -> str:
        return f"{type(self).__name__}('{MASK}')"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SecretText) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)


class Kind:
    """The base class of all kinds of values."""

    hides = False
    """Whether its values are never shown, not even in faults."""

    def read(self, node: Node, path: NodePath, faults: Faults) -> Any:
        """The value of a node; NOTHING if it has a fault, which is noted."""
        raise NotImplementedError

    def write(self, value: Any) -> Any:
        """The value as YAML and JSON can hold it, for people; never called for None."""
        return value

    def schema(self, definitions: dict[str, Schema]) -> Schema:
        """Its JSON Schema; a part that has a name is added to `definitions`."""
        raise NotImplementedError


class Text(Kind):
    """Text as it was written, even if YAML would read it as a number."""

    def read(self, node: Node, path: NodePath, faults: Faults) -> Any:
        if isinstance(node, Scalar):
            return self._made(node.text)
        refuse(node, path, faults, "expected text")
        return NOTHING

    def _made(self, text: str) -> Any:
        return text

    def schema(self, definitions: dict[str, Schema]) -> Schema:
        return {"type": "string"}


class FilePath(Text):
    """The path of a file or directory."""

    def _made(self, text: str) -> Path:
        return Path(text)

    def write(self, value: Path) -> str:
        return str(value)

    def schema(self, definitions: dict[str, Schema]) -> Schema:
        return {"format": "path", **super().schema(definitions)}


class Secret(Text):
    """Text that is never shown."""

    hides = True

    def _made(self, text: str) -> SecretText:
        return SecretText(text)

    def write(self, value: SecretText) -> str:
        return MASK if value.get_secret_value() else ""

    def schema(self, definitions: dict[str, Schema]) -> Schema:
        return {"format": "password", "writeOnly": True, **super().schema(definitions)}


class Plain(Kind):
    """A value that YAML itself reads: an integer, or true and false."""

    def __init__(self, python: type, expected: str, name: str) -> None:
        self._python, self._expected, self._name = python, expected, name

    def read(self, node: Node, path: NodePath, faults: Faults) -> Any:
        if isinstance(node, Scalar) and type(node.value) is self._python:
            return node.value
        refuse(node, path, faults, self._expected, lambda: hint(node, quotes=self._python))
        return NOTHING

    def schema(self, definitions: dict[str, Schema]) -> Schema:
        return {"type": self._name}


class Anything(Kind):
    """Any value that YAML can hold."""

    def read(self, node: Node, path: NodePath, faults: Faults) -> Any:
        return plain(node)

    def schema(self, definitions: dict[str, Schema]) -> Schema:
        return {}


class Choice(Kind):
    """One of several words, or of several numbers."""

    def __init__(self, choices: tuple[Any, ...]) -> None:
        self._choices = choices

    def read(self, node: Node, path: NodePath, faults: Faults) -> Any:
        for each in self._choices:
            if isinstance(node, Scalar):
                written = node.text if isinstance(each, str) else node.value
                if written == each and isinstance(written, bool) is isinstance(each, bool):
                    return each
        names = [str(each) for each in self._choices]
        refuse(node, path, faults, one_of(names), lambda: hint(node, choices=names))
        return NOTHING

    def schema(self, definitions: dict[str, Schema]) -> Schema:
        several = {"enum": list(self._choices)} if len(self._choices) > 1 else {"const": self._choices[0]}
        return {**several, "type": "string" if isinstance(self._choices[0], str) else "integer"}


class Named(Choice):
    """One of the values of an enumeration."""

    def __init__(self, names: type[StrEnum]) -> None:
        super().__init__(tuple(names))
        self._names = names

    def write(self, value: StrEnum) -> str:
        return str(value)

    def schema(self, definitions: dict[str, Schema]) -> Schema:
        name = self._names.__name__
        described = {"description": inspect.getdoc(self._names), "enum": list(map(str, self._names)), "title": name}
        definitions[name] = {**described, "type": "string"}
        return {"$ref": f"#/$defs/{name}"}


class ListOf(Kind):
    """A list; with `alone` a single entry may be written without the brackets."""

    def __init__(self, item: Kind, *, alone: bool = False) -> None:
        self.item, self._alone = item, alone
        self.hides = item.hides

    def read(self, node: Node, path: NodePath, faults: Faults) -> Any:
        if isinstance(node, Items):
            found = [self.item.read(each, (*path, i), faults) for i, each in enumerate(node.items)]
        elif isinstance(node, Scalar) and node.value is None:
            return []  # all entries of the list are commented out
        elif isinstance(node, Scalar) and self._alone:
            found = [self.item.read(node, path, faults)]
        else:
            refuse(node, path, faults, "expected a list")
            return NOTHING
        return NOTHING if any(each is NOTHING for each in found) else found

    def write(self, value: list[Any]) -> list[Any]:
        return [self.item.write(each) for each in value]

    def schema(self, definitions: dict[str, Schema]) -> Schema:
        item = self.item.schema(definitions)
        several = {"items": item, "type": "array"}
        return {"anyOf": [item, several]} if self._alone else several


class MappingOf(Kind):
    """A mapping whose keys the user chooses."""

    def __init__(self, key: Kind, value: Kind) -> None:
        self._key, self._value = key, value
        self.hides = value.hides

    def read(self, node: Node, path: NodePath, faults: Faults) -> Any:
        if isinstance(node, Scalar) and node.value is None:
            return {}
        if not isinstance(node, Table):
            refuse(node, path, faults, "expected a mapping")
            return NOTHING
        found = {}
        for name, inner in node.entries.items():
            at = (*path, name)
            key = self._key.read(Scalar(inner.key, inner.key, name, name), at, faults)
            found[key] = self._value.read(inner, at, faults)
        return NOTHING if NOTHING in found or any(each is NOTHING for each in found.values()) else found

    def write(self, value: Mapping[Any, Any]) -> dict[Any, Any]:
        return {self._key.write(name): self._value.write(each) for name, each in value.items()}

    def schema(self, definitions: dict[str, Schema]) -> Schema:
        inner, pattern = self._value.schema(definitions), self._key.schema(definitions).get("pattern")
        return {"patternProperties": {pattern: inner}, "type": "object"} if pattern else {
            "additionalProperties": inner, "type": "object",
        }  # fmt: skip


class Around(Kind):
    """A kind that changes one thing of the kind inside it."""

    def __init__(self, inner: Kind) -> None:
        self.inner = inner
        self.hides = inner.hides

    def read(self, node: Node, path: NodePath, faults: Faults) -> Any:
        return self.inner.read(node, path, faults)

    def write(self, value: Any) -> Any:
        return self.inner.write(value)

    def schema(self, definitions: dict[str, Schema]) -> Schema:
        return self.inner.schema(definitions)


class OrNull(Around):
    """A value that may be null."""

    def read(self, node: Node, path: NodePath, faults: Faults) -> Any:
        return None if isinstance(node, Scalar) and node.value is None else self.inner.read(node, path, faults)

    def schema(self, definitions: dict[str, Schema]) -> Schema:
        inner = self.inner.schema(definitions)
        return {"anyOf": [*(inner["anyOf"] if inner.keys() == {"anyOf"} else [inner]), {"type": "null"}]}


class Checked(Around):
    """A value that a function checks or changes; it raises ValueError with the words of the fault, "expected ..."."""

    def __init__(self, inner: Kind, check: Callable[[Any], Any]) -> None:
        super().__init__(inner)
        self._check = check

    def read(self, node: Node, path: NodePath, faults: Faults) -> Any:
        value = self.inner.read(node, path, faults)
        return value if value is NOTHING else attempt(lambda: self._check(value), node, path, faults)


class Bounded(Around):
    """A number or a length within bounds: `ge`, `gt`, `le`, `min_length`."""

    def __init__(self, inner: Kind, bounds: Mapping[str, float]) -> None:
        super().__init__(inner)
        self._bounds = bounds

    def read(self, node: Node, path: NodePath, faults: Faults) -> Any:
        value = self.inner.read(node, path, faults)
        for name, limit in self._bounds.items():
            words, _, keeps = _BOUNDS[name]
            if value is not NOTHING and not keeps(value, limit):
                refuse(node, path, faults, f"expected {words.format(limit)}")
                return NOTHING
        return value

    def schema(self, definitions: dict[str, Schema]) -> Schema:
        inner = super().schema(definitions)
        lists = [each for each in (inner, *inner.get("anyOf", ())) if each.get("type") == "array"]
        for each in lists or ([inner] if inner.get("type") == "integer" else []):  # values with units are text
            each |= {_BOUNDS[name][1]: limit for name, limit in self._bounds.items()}
        return inner


class Unshown(Around):
    """A value that may be secret though it is written in plain text: it is used, and shown only as `shown` gives it."""

    def __init__(self, inner: Kind, shown: Callable[[Any], Any] = lambda _: MASK) -> None:
        super().__init__(inner)
        self._shown, self.hides = shown, True

    def write(self, value: Any) -> Any:
        return self._shown(value)


class LowerCase(Around):
    """Names whose case does not matter in HTTP (RFC 9110, section 5.1); they become lower case."""

    def read(self, node: Node, path: NodePath, faults: Faults) -> Any:
        if isinstance(node, Scalar):
            found = self.inner.read(dataclasses.replace(node, text=node.text.lower()), path, Faults())
            if found is not NOTHING:
                return found
        return self.inner.read(node, path, faults)  # so that a fault shows what was written


def attempt(make: Callable[[], Any], node: Node, path: NodePath, faults: Faults) -> Any:
    """The result of `make`; if it raises ValueError, that is a fault of the node."""
    try:
        return make()
    except ValueError as error:
        refuse(node, path, faults, without_secrets(str(error), node), whole=isinstance(node, Table))
        return NOTHING


def checked(check: Callable[[Any], Any]) -> Callable[[Kind], Kind]:
    """Check each value with a function; it returns the value to use, or raises ValueError with the fault's words."""
    return lambda inner: Checked(inner, check)


def bounded(**bounds: float) -> Callable[[Kind], Kind]:
    """Keep a value within bounds; see `Bounded`."""
    return lambda inner: Bounded(inner, bounds)


def described(schema: Schema) -> Callable[[Kind], Kind]:
    """Give a kind another JSON Schema."""
    return lambda inner: _Described(inner, schema)


class _Described(Around):
    def __init__(self, inner: Kind, schema: Schema) -> None:
        super().__init__(inner)
        self._schema = schema

    def schema(self, definitions: dict[str, Schema]) -> Schema:
        return dict(self._schema)


_OF_TYPES: dict[Any, Callable[[], Kind]] = {
    str: Text, Path: FilePath, SecretText: Secret, Any: Anything,
    int: lambda: Plain(int, "expected an integer", "integer"),
    bool: lambda: Plain(bool, "expected true or false", "boolean"),
    float: lambda: Plain(float, "expected a number", "number"),
}  # fmt: skip


def kind_of(annotation: Any) -> Kind:
    """Make the kind of an annotation; a section of the configuration has a method `kind` for this."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        kind = kind_of(parts[0])
        for around in parts[1:]:
            kind = around(kind)
        return kind
    if origin in {Union, UnionType}:
        (inner,) = [part for part in parts if part is not type(None)]
        return OrNull(kind_of(inner))
    if origin is Literal:
        return Choice(parts)
    if origin is list:
        return ListOf(kind_of(parts[0]))
    if origin is dict:
        return MappingOf(kind_of(parts[0]), kind_of(parts[1]))
    if annotation in _OF_TYPES:
        return _OF_TYPES[annotation]()
    if issubclass(annotation, StrEnum):
        return Named(annotation)
    kind = annotation.kind()
    assert isinstance(kind, Kind)
    return kind
