"""The base of all kinds of values: how each is read from a node, written for people, and described as JSON Schema.

What an ``Annotated`` adds is called with the kind inside, and returns the kind around it; those are here, too. The
kinds themselves are in `flaskd.config.kinds`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

from flaskd.config.faults import Faults
from flaskd.config.nodes import Node, Scalar, Table
from flaskd.config.wording import refuse, without_secrets
from flaskd.text import MASK

if TYPE_CHECKING:
    from flaskd.config.nodes import Path as NodePath

INTERPOLATION = r"\$\{"
"""The schema's pattern for an interpolation in place of a single value."""

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
        lists = [each for each in (inner, *inner.get("anyOf", ())) if "array" in each.get("type", ())]
        for each in lists or [inner]:
            each |= {_BOUNDS[name][1]: limit for name, limit in self._bounds.items()}
            if lists:
                each["type"] = "array"  # then null is not allowed, because it means no entries
            elif "unit" in inner and ("gt" in self._bounds or self._bounds.get("ge")):  # then the text 0 is not allowed
                each["pattern"] = each["pattern"].replace("^", "^(?=.*[1-9])", 1)
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

    def schema(self, definitions: dict[str, Schema]) -> Schema:
        return in_any_case(super().schema(definitions), ())


class Matching(Around):
    """Text that matches a pattern, which is also in the schema; `expected` are the words of a fault."""

    def __init__(self, inner: Kind, pattern: str, expected: str) -> None:
        super().__init__(inner)
        self._pattern, self._expected = re.compile(pattern), expected

    def read(self, node: Node, path: NodePath, faults: Faults) -> Any:
        if isinstance(node, Scalar) and not self._pattern.fullmatch(node.text):
            refuse(node, path, faults, self._expected)
            return NOTHING
        return self.inner.read(node, path, faults)

    def schema(self, definitions: dict[str, Schema]) -> Schema:
        return {**super().schema(definitions), **text_schema(self._pattern.pattern)}


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


def matching(pattern: str, expected: str) -> Callable[[Kind], Kind]:
    """Accept text that matches a pattern as a whole; the pattern must mean the same in JSON Schema (ECMA-262)."""
    return lambda inner: Matching(inner, pattern, expected)


def exampled(*examples: str) -> Callable[[Kind], Kind]:
    """Add examples of values to the schema."""
    return lambda inner: _Described(inner, {"examples": list(examples)}, more=True)


_SCALARS = {"string": (), "number": ("1", "1.5"), "boolean": ("true",), "null": ("", "null", "~")}
"""The types of a single value in JSON, and the pattern of such values if they are read as text."""


def text_schema(pattern: str = "") -> Schema:
    """The schema of text that matches a pattern; in a file it may look like a number, and is read as text."""
    takes = [
        kind
        for kind, texts in _SCALARS.items()
        if not texts or any(re.fullmatch(pattern or ".*", each) for each in texts)
    ]
    return {
        "type": takes if takes[1:] else takes[0],
        **({"pattern": f"^(?:{pattern})$|{INTERPOLATION}"} if pattern else {}),
    }


def in_any_case(schema: Schema, more: Iterable[str]) -> Schema:
    """The schema of words, and of `more`, that are accepted in any case; an editor proposes those of `schema`."""
    words = ("".join(f"[{each.upper()}{each}]" if each.isalpha() else each for each in word)
             for word in (*schema["enum"], *more))  # fmt: skip
    return {"anyOf": [schema, {"type": "string", "pattern": f"^({'|'.join(words)})$"}]}


def described(schema: Schema) -> Callable[[Kind], Kind]:
    """Give a kind another JSON Schema."""
    return lambda inner: _Described(inner, schema)


class _Described(Around):
    def __init__(self, inner: Kind, schema: Schema, *, more: bool = False) -> None:
        super().__init__(inner)
        self._schema, self._more = schema, more

    def schema(self, definitions: dict[str, Schema]) -> Schema:
        return {**(super().schema(definitions) if self._more else {}), **self._schema}
