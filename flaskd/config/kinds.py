"""The kinds of values; `kind_of` makes one of an annotation, such as ``int``, ``Literal["a", "b"]``, ``list[str]``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from flaskd.config.faults import Faults
from flaskd.config.kind import INTERPOLATION, NOTHING, Kind, OrNull, Schema, text_schema
from flaskd.config.nodes import Items, Node, Scalar, Table, plain
from flaskd.config.wording import hint, one_of, refuse
from flaskd.text import MASK

if TYPE_CHECKING:
    from flaskd.config.nodes import Path as NodePath


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
        return text_schema()


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
        several = {"items": item, "type": ["array", "null"]}
        if not self._alone:
            return several
        given = item.get("type")
        alone = {**item, "type": [each for each in given if each != "null"]} if isinstance(given, list) else item
        return {"anyOf": [alone, several]}


class MappingOf(Kind):
    """A mapping whose keys the user chooses."""

    def __init__(self, key: Kind, value: Kind) -> None:
        self._key, self._value = key, value
        self.hides = value.hides

    def read(self, node: Node, path: NodePath, faults: Faults) -> Any:
        if isinstance(node, Scalar) and node.value is None:
            return {}
        if not isinstance(node, Table):
            refuse(node, path, faults, "expected a mapping", lambda: f"; such as {path[-1]}: {{NAME: ...}}")
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
        inner, pattern = self._value.schema(definitions), self._key.schema(definitions).get("pattern", "")
        of_keys = {pattern.removesuffix(f"|{INTERPOLATION}"): inner}
        return {
            **({"patternProperties": of_keys} if pattern else {}),
            "additionalProperties": False if pattern else inner,
            "type": ["object", "null"],
        }


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
