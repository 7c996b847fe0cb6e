"""Builds the tree from Python values: a mapping given in code, or single values from the command line."""

from __future__ import annotations

import os
from collections.abc import Mapping

from flaskd.config.faults import COMMAND_LINE, Faults, Place, dotted
from flaskd.config.nodes import MAX_DEPTH, Items, Node, Path, Scalar, Table, broken, core_not_null, unfit

_WORDS = {None: "null", True: "true", False: "false"}
_MAX_BITS = 1024


def from_python(value: object, place: Place, faults: Faults, path: Path = ()) -> Node:
    """Build the tree of a Python value; a value that YAML cannot have is a fault.

    Text from a mapping stays text. Text from the command line, where every value is text, is read like an unquoted
    scalar, and never interpolated.
    """
    if isinstance(value, (Mapping, list, tuple)):
        if len(path) >= MAX_DEPTH:  # a value may contain itself
            faults.add(place, dotted(path[:3]), f"expected at most {MAX_DEPTH} levels, got more")
            return broken(place, place)
        if isinstance(value, Mapping):
            return Table(place, place, _entries(value, place, faults, path))
        items = tuple(from_python(inner, place, faults, (*path, i)) for i, inner in enumerate(value))
        return Items(place, place, items)
    found = _scalar(value, place)
    if isinstance(found, str):
        faults.add(place, dotted(path), found)
        return broken(place, place)
    return found


def _entries(value: Mapping[object, object], place: Place, faults: Faults, path: Path) -> dict[str, Node]:
    entries = {}
    for key, inner in value.items():
        if isinstance(key, str) and not unfit(key):
            entries[str(key)] = from_python(inner, place, faults, (*path, str(key)))
        else:
            faults.add(place, dotted(path), f"expected keys of text, got a key of type {type(key).__name__}")
    return entries


def _scalar(value: object, place: Place) -> Scalar | str:
    """The scalar, or the words of its fault."""
    if value is None or isinstance(value, bool):
        return Scalar(place, place, _WORDS[value], value)
    if isinstance(value, int) and value.bit_length() <= _MAX_BITS:
        return Scalar(place, place, str(int(value)), int(value))
    if isinstance(value, float):
        return Scalar(place, place, repr(float(value)), float(value))
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str):
        return f"expected what YAML can hold, got a value of type {type(value).__name__}"
    if wrong := unfit(text):
        return f"expected text, got {wrong}"
    if place.source == COMMAND_LINE:
        return Scalar(place, place, text.replace("${", "$${"), core_not_null(text))
    return Scalar(place, place, str(text), str(text))
