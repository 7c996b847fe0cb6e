"""The words of a fault: what was expected, what was written, and a hint; never a secret."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

from flaskd.config.faults import Faults, dotted
from flaskd.config.nodes import Items, Node, Path, Scalar, core, scalars, shown
from flaskd.text import did_you_mean, nearest_first, quoted

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def refuse(
    node: Node, path: Path, faults: Faults, expected: str, hint: Callable[[], str] = str, *, whole: bool = False
) -> None:
    """Note that a value is not what was `expected`, unless its fault is noted already.

    `hint` is called only if the fault is shown. With `whole` the fault concerns a mapping as a whole, whose content is
    not repeated.
    """
    if isinstance(node, Scalar) and node.broken:
        return
    faults.add(node.place, dotted(path), functools.partial(_fault, node, expected, hint, whole=whole))


def _fault(node: Node, expected: str, hint: Callable[[], str], *, whole: bool) -> str:
    return f"{expected}{'' if whole else ', got ' + shown(node)}{hint()}"


def without_secrets(expected: str, node: Node) -> str:
    """Words from a function, on one line and without the value, which they may quote in whole or in part."""
    text = expected.partition(", got ")[0]
    secrets = [scalar.text for _, scalar in scalars(node) if scalar.secret and scalar.text]
    if secrets and (not text.startswith("expected ") or any(secret in text for secret in secrets)):
        return "expected another value"
    return " ".join(text.split())


def one_of(choices: Sequence[str]) -> str:
    """The words for a choice."""
    return "expected one of " + ", ".join(choices) if len(choices) > 1 else f"expected {choices[0]}"


_OF_YAML_1_1 = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}
"""Words that are booleans in YAML 1.1, and text in YAML 1.2."""


def hint(node: Node, *, quotes: type | None = None, choices: Sequence[str] = ()) -> str:
    """What may have been meant: the same without quotes, if its type is then `quotes`, or one of the `choices`."""
    if not isinstance(node, Scalar) or node.secret:
        return ""
    if quotes is bool and node.text.lower() in _OF_YAML_1_1:
        return f"; write {_OF_YAML_1_1[node.text.lower()]}"
    if quotes and isinstance(node.value, str) and isinstance(core(node.text), quotes):
        return " as text; write it without quotes"
    return did_you_mean(node.text, choices)


def unknown_key(name: str, valid: Sequence[str], places: Sequence[str] = ()) -> str:
    """The fault of an unknown key; `places` are the places that have a key of that name."""
    if name.lower().replace("-", "_") in valid:
        return f"expected a known key, got {quoted(name)}{did_you_mean(name.lower(), valid)}"
    if places:
        there = " or ".join(places[:_PLACES])
        return f"expected a known key, got {quoted(name)}; write {there}{did_you_mean(name, valid)}"
    known = f"; known keys: {nearest_first(name, valid)}" if valid else ""
    return f"expected a known key, got {quoted(name)}{did_you_mean(name, valid)}{known}"


_PLACES = 3
"""How many places of a key are named."""
NO_VALUE = "expected a value (it has no default), got nothing"


def hidden(node: Node) -> Node:
    """Mark every value under a node as secret, because faults go into logs and into the status."""
    if isinstance(node, Scalar):
        return dataclasses.replace(node, secret=True)
    if isinstance(node, Items):
        return dataclasses.replace(node, items=tuple(map(hidden, node.items)))
    return dataclasses.replace(node, entries={key: hidden(inner) for key, inner in node.entries.items()})
