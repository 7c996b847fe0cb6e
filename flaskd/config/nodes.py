"""The tree between a source (file, mapping, command line) and the model: values with their places."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from flaskd.config.faults import Place
from flaskd.text import MASK, quoted
from flaskd.values import value

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MAX_DEPTH = 32

Path = tuple[str | int, ...]
"""Keys and list positions from the top down to a node."""

Plain = str | int | float | bool | None


@value
class Scalar:
    """A single value: ``text`` as it was written, ``value`` as YAML 1.2 reads it.

    Both are kept because it depends on the field which one it needs: an integer field takes the value of ``0660``, a
    text field its text. ``secret`` marks a value that came from an interpolation; ``pieces`` are the texts that were
    filled in. ``broken`` marks a value whose fault is noted already.
    """

    key: Place
    place: Place
    text: str
    value: Plain
    secret: bool = False
    broken: bool = False
    pieces: tuple[str, ...] = ()


@value
class Items:
    """A list."""

    key: Place
    place: Place
    items: tuple[Node, ...]


@value
class Table:
    """A mapping; each node in it has the place of its key as ``key``."""

    key: Place
    place: Place
    entries: dict[str, Node]


Node = Scalar | Items | Table


def broken(key: Place, place: Place) -> Scalar:
    """A node in place of a value whose fault is noted already, so that it gets no second one."""
    return Scalar(key, place, "", "", broken=True)


_MAX_DIGITS = 400
"""More digits than any meant integer has; Python refuses more than 4300 with a bare ValueError."""

# YAML 1.2.2, section 10.3.2 (core schema).
_CORE: tuple[tuple[re.Pattern[str], Callable[[str], Plain]], ...] = (
    (re.compile(r"null|Null|NULL|~|"), lambda _: None),
    (re.compile(r"true|True|TRUE|false|False|FALSE"), lambda text: text[0] in "tT"),
    (re.compile(r"[-+]?[0-9]+"), int),
    (re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+"), lambda text: int(text, 0)),
    (re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"), float),
    (re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"), lambda text: float(text.replace(".", ""))),
)


def core(text: str) -> Plain:
    """Read an unquoted scalar as the YAML 1.2 core schema does: ``no``, ``22:22`` and dates are text."""
    if len(text) <= _MAX_DIGITS:
        for pattern, read in _CORE:
            if pattern.fullmatch(text):
                return read(text)
    return text


def core_not_null(text: str) -> Plain:
    """Read text from outside the file: numbers and booleans are recognized, but empty text is not null."""
    value = core(text)
    return text if value is None else value


def unfit(text: str) -> str | None:
    """Name what no scalar may contain: NUL ends a C string, and a lone surrogate cannot be encoded."""
    if "\0" in text:
        return "a NUL character"
    if any("\ud800" <= character <= "\udfff" for character in text):
        return "text that is not Unicode (a lone surrogate)"
    return None


def child(node: Node, part: str | int) -> Node | None:
    """The node at one key or position of a node, or None."""
    if isinstance(node, Table) and isinstance(part, str):
        return node.entries.get(part)
    if isinstance(node, Items) and isinstance(part, int) and part < len(node.items):
        return node.items[part]
    return None


def scalars(node: Node, path: Path = ()) -> Iterator[tuple[Path, Scalar]]:
    """Every scalar under a node, with its path."""
    if isinstance(node, Scalar):
        yield path, node
    elif isinstance(node, Table):
        for key, inner in node.entries.items():
            yield from scalars(inner, (*path, key))
    else:
        for i, inner in enumerate(node.items):
            yield from scalars(inner, (*path, i))


def plain(node: Node) -> Any:
    """The value of a node without places, as JSON would hold it."""
    if isinstance(node, Table):
        return {key: plain(inner) for key, inner in node.entries.items()}
    if isinstance(node, Items):
        return [plain(inner) for inner in node.items]
    return node.value


def shown(node: Node) -> str:
    """What a fault says of a node's value: text in quotes, secrets masked, mappings only by their kind."""
    if isinstance(node, Table):
        return "a mapping"
    if isinstance(node, Items):
        text = ", ".join(shown(item) for item in node.items[:10])
        short = len(node.items) <= 5 and all(isinstance(item, Scalar) for item in node.items)  # noqa: PLR2004
        return f"[{text}]" if node.items and short else "a list" if node.items else "an empty list"
    if node.secret:
        return MASK
    if node.value is None:
        return "null" if node.text else "nothing"
    if not isinstance(node.value, str):
        return node.text if len(node.text) <= 40 else node.text[:40] + "..."  # noqa: PLR2004 - what fits on a line
    return quoted(node.text)
