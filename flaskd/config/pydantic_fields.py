"""The fields of actions from other packages: pydantic models, read like flaskd's own sections.

No other module of flaskd imports pydantic, so a daemon without such an action does not load it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, SecretBytes, SecretStr, ValidationError, create_model
from pydantic.errors import PydanticInvalidForJsonSchema
from pydantic.json_schema import GenerateJsonSchema, models_json_schema

from flaskd.config.faults import Faults, dotted
from flaskd.config.nodes import Items, Node, Path, Scalar, Table, child, plain, shown
from flaskd.config.wording import NO_VALUE, hidden, hint, one_of, unknown_key, without_secrets
from flaskd.text import quoted

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from pydantic.json_schema import JsonSchemaValue
    from pydantic_core import ErrorDetails, core_schema


class Section(BaseModel):
    """Base class for the fields of an action from another package: unknown keys are refused, values never change."""

    model_config = ConfigDict(frozen=True, extra="forbid")


_WANTS_TEXT = {"string_type", "path_type", "url_type", "bytes_type", "literal_error", "enum"}
_WANTS_MAPPING = {"model_type", "model_attributes_type", "dict_type", "dataclass_type"}
_KINDS = {
    "int": "an integer", "bool": "true or false", "float": "a number", "string": "text", "path": "text",
    "url": "text", "bytes": "text", "list": "a list", "tuple": "a list", "set": "a list", "frozen": "a list",
    "model": "a mapping", "dict": "a mapping", "dataclass": "a mapping", "none": "null",
}  # fmt: skip
_UNQUOTED = {"int_type": int, "float_type": float, "bool_type": bool}
_NOT_SHOWN = (SecretStr, SecretBytes)
"""Types of fields whose values are never shown."""
_BOUNDS = {
    "greater_than_equal": "at least {ge:g}", "greater_than": "more than {gt:g}",
    "less_than_equal": "at most {le:g}",
    "less_than": "less than {lt:g}", "string_too_short": "at least {min_length} characters",
    "string_too_long": "at most {max_length} characters", "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}", "string_pattern_mismatch": "text that matches {pattern}",
    "finite_number": "a finite number",
}  # fmt: skip


@functools.lru_cache(maxsize=256)
def _closed(model: type[BaseModel]) -> type[BaseModel]:
    """The model, changed to refuse unknown keys if its author did not choose."""
    if "extra" in model.model_config:
        return model
    return create_model(model.__name__, __base__=model, __cls_kwargs__={"extra": "forbid"})


def read(model: type[BaseModel], node: Node, prefix: Path, faults: Faults) -> BaseModel | None:
    """Build the model from a tree, or note the faults; ``prefix`` is the path of the tree's top.

    The tree goes in as JSON under strict rules: text is no number and 1 is not true, but paths, enums and tuples may be
    written. A field that refuses a number because it wants text then gets the number's text as it was written.
    """
    model = _closed(model)
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
    """The value of a node as JSON would hold it; paths in `instead` have another value."""
    if not instead:
        return plain(node)
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
            yield path, {}  # all keys of the section are commented out
        elif found.value is None and error["type"] == "list_type":
            yield path, []
        elif error["type"] in _WANTS_TEXT:
            yield path, found.text


def _find(node: Node, loc: Path) -> tuple[Path, Node, Path]:
    """Follow the location that pydantic gives; parts that the tree does not have (such as union tags) are skipped."""
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
            faults.add(found.key, key, NO_VALUE)
        elif skipped[-1:] == ("[key]",):
            expected = _expectation(error, Table(found.key, found.key, {}))  # the fault is in the key, not in the value
            faults.add(found.key, key, f"{expected}, got {quoted(str(path[-1]))}")
        elif path in wrong:
            wrong[path].append(error)
        elif not (isinstance(found, Scalar) and found.broken):
            wrong[path] = [error]
            faults.add(found.place, key, functools.partial(_wrong, found, wrong[path]))


def _veiled(model: type[BaseModel], node: Node) -> Node:
    """Mark as secret what the model does not show, because faults go into logs and into the status."""
    if not isinstance(node, Table):
        return node
    entries = dict(node.entries)
    for name, info in model.model_fields.items():
        key = info.alias or name
        if key not in entries:
            continue
        kinds = [*_kinds(info.annotation), *info.metadata]
        if any(kind is each for kind in kinds for each in _NOT_SHOWN):
            entries[key] = hidden(entries[key])
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                entries[key] = _veiled(kind, entries[key])
    return dataclasses.replace(node, entries=entries)


def _kinds(annotation: object) -> Iterator[object]:
    """An annotation and all its parts."""
    yield annotation
    for part in get_args(annotation):
        yield from _kinds(part)


def _wrong(node: Node, errors: list[ErrorDetails]) -> str:
    # A union reports an error for each member; they are joined to one expectation.
    expected = list(dict.fromkeys(_expectation(error, node) for error in errors))
    text = " or ".join([expected[0], *(other.removeprefix("expected ") for other in expected[1:])])
    of_the_whole = isinstance(node, Table) and errors[0]["type"] in {"value_error", "assertion_error"}
    meant = hint(node, quotes=_UNQUOTED.get(errors[0]["type"]), choices=_choices(errors[0]))
    return f"{text}{'' if of_the_whole else ', got ' + shown(node)}{meant}"


def _expectation(error: ErrorDetails, node: Node) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind in _BOUNDS:
        return "expected " + _BOUNDS[kind].format(**context)
    if choices := _choices(error):
        return one_of(choices)
    if kind in {"value_error", "assertion_error"}:
        text = str(context["error"])
    elif kind.endswith(("_type", "_parsing", "_from_float", "_required")) and kind.split("_")[0] in _KINDS:
        return "expected " + _KINDS[kind.split("_")[0]]
    else:
        text = error["msg"].replace("Input should be ", "expected ")
    return without_secrets(text, node)


def _choices(error: ErrorDetails) -> list[str]:
    if error["type"] not in {"literal_error", "enum"}:
        return []
    expected = str(error.get("ctx", {})["expected"])
    return re.findall(r"'([^']*)'", expected) or [expected]


def _unknown(model: type[BaseModel], path: Path) -> str:
    return unknown_key(str(path[-1]), keys_at(model, path[:-1]))


def keys_at(model: type[BaseModel], path: Path) -> list[str]:
    """The keys that a model has at a path; taken from its JSON Schema, in which unions are flat."""
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
    except PydanticInvalidForJsonSchema:  # a field that JSON Schema cannot express
        return {}
    except ImportError:  # pydantic imports late, and its files may have been replaced
        return {}


def _alternatives(option: dict[str, Any], schema: dict[str, Any]) -> list[dict[str, Any]]:
    if "$ref" in option:
        option = schema["$defs"][option["$ref"].removeprefix("#/$defs/")]
    deeper = [deep for kind in ("anyOf", "oneOf", "allOf") for deep in option.get(kind, [])]
    return [option, *(found for deep in deeper for found in _alternatives(deep, schema))]


class _Generator(GenerateJsonSchema):
    """Writes defaults as people do: ``5s`` for 5.0."""

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        written = super().default_schema(schema)
        inner: Any = schema["schema"]
        while "serialization" not in inner and "schema" in inner:
            inner = inner["schema"]
        function = inner.get("serialization", {}).get("function")
        if function and written.get("default") is not None:
            written["default"] = function(written["default"])
        return written


def definitions(models: Sequence[type[BaseModel]], taken: Iterable[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A reference to each model's JSON Schema, and the definitions by names that are not in `taken`."""
    inputs: list[tuple[type[BaseModel], Literal["validation"]]] = [(_closed(each), "validation") for each in models]
    for prefix in ("", "action."):
        references, whole = models_json_schema(
            list(dict.fromkeys(inputs)), ref_template=f"#/$defs/{prefix}{{model}}", schema_generator=_Generator
        )
        found = {prefix + name: each for name, each in whole.get("$defs", {}).items()}
        if found.keys().isdisjoint(taken):
            break
    return [references[each] for each in inputs], found
