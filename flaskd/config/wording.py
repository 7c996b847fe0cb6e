"""Validates a tree against a model, and turns what pydantic says into faults with a place and plain words."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from pydantic import BaseModel, SecretBytes, SecretStr, ValidationError
from pydantic.errors import PydanticInvalidForJsonSchema

from flaskd.config.faults import Faults, dotted
from flaskd.config.fields import Hidden
from flaskd.config.nodes import Items, Node, Path, Scalar, Table, child, core, scalars, shown
from flaskd.text import did_you_mean, nearest_first, quoted

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pydantic_core import ErrorDetails

Model = TypeVar("Model", bound=BaseModel)

_WANTS_TEXT = {"string_type", "path_type", "url_type", "bytes_type", "literal_error", "enum"}
_WANTS_MAPPING = {"model_type", "model_attributes_type", "dict_type", "dataclass_type"}
_KINDS = {
    "int": "an integer", "bool": "true or false", "float": "a number", "string": "text", "path": "text",
    "url": "text", "bytes": "text", "list": "a list", "tuple": "a list", "set": "a list", "frozen": "a list",
    "model": "a mapping", "dict": "a mapping", "dataclass": "a mapping", "none": "null",
}  # fmt: skip
_UNQUOTED = {"int_type": int, "float_type": float, "bool_type": bool}
_NOT_SHOWN = (SecretStr, SecretBytes, Hidden)
"""What the kind of a field is made of whose value is not for everybody's eyes."""
_BOUNDS = {
    "greater_than_equal": "at least {ge:g}", "greater_than": "more than {gt:g}",
    "less_than_equal": "at most {le:g}",
    "less_than": "less than {lt:g}", "string_too_short": "at least {min_length} characters",
    "string_too_long": "at most {max_length} characters", "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}", "string_pattern_mismatch": "text that matches {pattern}",
    "finite_number": "a finite number",
}  # fmt: skip


def validated(model: type[Model], node: Node, prefix: Path, faults: Faults) -> Model | None:
    """Build the model from a tree, or note why not; ``prefix`` is the path of the tree's top.

    The tree goes in as JSON under strict rules: text is no number and 1 is not true, yet paths, enums and
    tuples may be written. What a field refuses as a number but wants as text it then gets as it was written.
    """
    instead: dict[Path, Any] = {}
    while True:
        try:
            return model.model_validate_json(json.dumps(_plain(node, instead)), strict=True)
        except ValidationError as error:
            errors = error.errors(include_url=False, include_input=False)
        new = {path: value for path, value in _second_try(node, errors) if path not in instead}
        if not new:
            _word(model, node, prefix, errors, faults)
            return None
        instead |= new


def _plain(node: Node, instead: Mapping[Path, Any], path: Path = ()) -> Any:
    if path in instead:
        return instead[path]
    if isinstance(node, Table):
        return {key: _plain(inner, instead, (*path, key)) for key, inner in node.entries.items()}
    if isinstance(node, Items):
        return [_plain(inner, instead, (*path, i)) for i, inner in enumerate(node.items)]
    return node.value


def _second_try(node: Node, errors: list[ErrorDetails]) -> Iterator[tuple[Path, Any]]:
    for error in errors:
        path, found, _ = _find(node, error["loc"])
        if not isinstance(found, Scalar) or isinstance(found.value, str):
            continue
        if found.value is None and error["type"] in _WANTS_MAPPING:
            yield path, {}  # a section whose keys are all commented out
        elif found.value is None and error["type"] == "list_type":
            yield path, []
        elif error["type"] in _WANTS_TEXT:
            yield path, found.text


def _find(node: Node, loc: Path) -> tuple[Path, Node, Path]:
    """Follow pydantic's location; parts that the tree does not have (union tags and the like) are skipped."""
    path: Path = ()
    skipped: Path = ()
    for part in loc:
        inner = child(node, part)
        if inner is None:
            skipped = (*skipped, part)
        else:
            node, path = inner, (*path, part)
    return path, node, skipped


def _word(model: type[BaseModel], node: Node, prefix: Path, errors: list[ErrorDetails], faults: Faults) -> None:
    wrong: dict[Path, list[ErrorDetails]] = {}
    node = _veiled(model, node)
    for error in errors:
        path, found, skipped = _find(node, error["loc"])
        key = dotted(prefix + path)
        if error["type"] == "extra_forbidden":
            faults.add(found.key, key, functools.partial(_unknown, model, path))
        elif error["type"] == "missing":
            key = dotted((*prefix, *path, error["loc"][-1]))
            faults.add(found.key, key, "expected a value (it has no default), got nothing")
        elif skipped[-1:] == ("[key]",):
            expected = _expectation(error, Table(found.key, found.key, {}))  # of the key, whatever the value is
            faults.add(found.key, key, f"{expected}, got {quoted(str(path[-1]))}")
        elif path in wrong:
            wrong[path].append(error)
        elif not (isinstance(found, Scalar) and found.broken):
            wrong[path] = [error]
            faults.add(found.place, key, functools.partial(_wrong, found, wrong[path]))


def _veiled(model: type[BaseModel], node: Node) -> Node:
    """Mark what the model does not show either as secret: faults go into logs, and to whoever may see the status."""
    if not isinstance(node, Table):
        return node
    entries = dict(node.entries)
    for name, info in model.model_fields.items():
        key = info.alias or name
        if key not in entries:
            continue
        kinds = [*_kinds(info.annotation), *info.metadata]
        if any(kind is each for kind in kinds for each in _NOT_SHOWN):
            entries[key] = _secret(entries[key])
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                entries[key] = _veiled(kind, entries[key])
    return dataclasses.replace(node, entries=entries)


def _kinds(annotation: object) -> Iterator[object]:
    """An annotation, and all that it is made of."""
    yield annotation
    for part in get_args(annotation):
        yield from _kinds(part)


def _secret(node: Node) -> Node:
    """Mark every value under a node as secret."""
    if isinstance(node, Scalar):
        return dataclasses.replace(node, secret=True)
    if isinstance(node, Items):
        return dataclasses.replace(node, items=tuple(map(_secret, node.items)))
    return dataclasses.replace(node, entries={key: _secret(inner) for key, inner in node.entries.items()})


def _wrong(node: Node, errors: list[ErrorDetails]) -> str:
    # A union reports each of its members; together they are one expectation.
    expected = list(dict.fromkeys(_expectation(error, node) for error in errors))
    text = " or ".join([expected[0], *(other.removeprefix("expected ") for other in expected[1:])])
    of_the_whole = isinstance(node, Table) and errors[0]["type"] in {"value_error", "assertion_error"}
    return f"{text}{'' if of_the_whole else ', got ' + shown(node)}{_hint(node, errors[0])}"


def _expectation(error: ErrorDetails, node: Node) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind in _BOUNDS:
        return "expected " + _BOUNDS[kind].format(**context)
    if choices := _choices(error):
        return "expected one of " + ", ".join(choices) if len(choices) > 1 else f"expected {choices[0]}"
    if kind in {"value_error", "assertion_error"}:
        text = str(context["error"]).partition(", got ")[0]
    elif kind.endswith(("_type", "_parsing", "_from_float", "_required")) and kind.split("_")[0] in _KINDS:
        return "expected " + _KINDS[kind.split("_")[0]]
    else:
        text = error["msg"].replace("Input should be ", "expected ")
    # Words that others chose may quote the value, whole or in parts.
    secrets = [scalar.text for _, scalar in scalars(node) if scalar.secret and scalar.text]
    if secrets and (not text.startswith("expected ") or any(secret in text for secret in secrets)):
        return "expected another value"
    return " ".join(text.split())


def _choices(error: ErrorDetails) -> list[str]:
    if error["type"] not in {"literal_error", "enum"}:
        return []
    expected = str(error.get("ctx", {})["expected"])
    return re.findall(r"'([^']*)'", expected) or [expected]


def _hint(node: Node, error: ErrorDetails) -> str:
    if not isinstance(node, Scalar) or node.secret:
        return ""
    kind = _UNQUOTED.get(error["type"])
    if kind and isinstance(node.value, str) and isinstance(core(node.text), kind):
        return " as text; write it without quotes"
    return did_you_mean(node.text, _choices(error))


def _unknown(model: type[BaseModel], path: Path) -> str:
    name, valid = str(path[-1]), keys_at(model, path[:-1])
    known = f"; known keys: {nearest_first(name, valid)}" if valid else ""
    return f"expected a known key, got {quoted(name)}{did_you_mean(name, valid)}{known}"


def keys_at(model: type[BaseModel], path: Path) -> list[str]:
    """List the keys that a model knows at a path, through its JSON Schema: that is where unions are flat."""
    schema = _schema(model)
    here = _alternatives(schema, schema)
    for part in path:
        inner = []
        for option in here:
            if isinstance(part, int):
                inner.append(option.get("items"))
            else:
                named = option.get("properties", {}).get(part)
                patterns = list(option.get("patternProperties", {}).values())
                inner += [named] if named else [*patterns, option.get("additionalProperties")]
        here = [deep for option in inner if isinstance(option, dict) for deep in _alternatives(option, schema)]
    return list(dict.fromkeys(key for option in here for key in option.get("properties", {})))


@functools.lru_cache(maxsize=64)
def _schema(model: type[BaseModel]) -> dict[str, Any]:
    try:
        return model.model_json_schema()
    except PydanticInvalidForJsonSchema:  # a field of somebody else's that JSON Schema cannot express
        return {}
    except ImportError:  # pydantic imports late, and the packages of a running daemon may have been replaced
        return {}


def _alternatives(option: dict[str, Any], schema: dict[str, Any]) -> list[dict[str, Any]]:
    if "$ref" in option:
        option = schema["$defs"][option["$ref"].removeprefix("#/$defs/")]
    deeper = [deep for kind in ("anyOf", "oneOf", "allOf") for deep in option.get(kind, [])]
    return [option, *(found for deep in deeper for found in _alternatives(deep, schema))]
