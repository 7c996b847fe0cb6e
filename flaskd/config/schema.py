"""The JSON Schema that ``flaskd schema`` prints, for editors and CI."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue, models_json_schema

from flaskd.config.fields import INTERPOLATION
from flaskd.config.model import Config, Policy

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic_core import core_schema

    from flaskd.config.model import Actions

_REF = "#/$defs/{model}"


class _Generator(GenerateJsonSchema):
    """Writes defaults as people do: ``5s``, where the model has 5.0."""

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        written = super().default_schema(schema)
        inner: Any = schema["schema"]
        while "serialization" not in inner and "schema" in inner:
            inner = inner["schema"]
        function = inner.get("serialization", {}).get("function")
        if function and written.get("default") is not None:
            written["default"] = function(written["default"])
        return written


def schema(actions: Actions) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a configuration file, with descriptions, for these actions.

    A policy's ``with`` follows its ``use``; actions that cannot be used are left out. An interpolation is allowed
    wherever a single value is.
    """
    actions = {name: spec for name, spec in actions.items() if not spec.fault}
    models: dict[type[BaseModel], None] = dict.fromkeys([Config, Policy])
    models |= dict.fromkeys(spec.strict_fields for spec in actions.values())
    inputs: list[tuple[type[BaseModel], Literal["validation"]]] = [(model, "validation") for model in models]
    references, whole = models_json_schema(inputs, ref_template=_REF, schema_generator=_Generator)

    def definition(model: type[BaseModel]) -> Any:
        return whole["$defs"][references[model, "validation"]["$ref"].removeprefix("#/$defs/")]

    policy = definition(Policy)
    policy["properties"]["use"]["enum"] = sorted(actions)
    policy["allOf"] = [
        {
            "if": {"properties": {"use": {"const": name}}, "required": ["use"]},
            "then": {"properties": {"with": references[actions[name].strict_fields, "validation"]}},
        }
        for name in sorted(actions)
    ]
    root = definition(Config)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **_interpolations_allowed(root),
        "title": "flaskd configuration",
        "$defs": {name: _interpolations_allowed(part) for name, part in whole["$defs"].items() if part is not root},
    }


def _interpolations_allowed(part: Any, *, name: bool = False) -> Any:
    """Copy a schema so that numbers, booleans and choices may also be an interpolation; text may already be.

    ``name``: the mapping's keys are the names of fields, not words of JSON Schema.
    """
    if isinstance(part, list):
        return [_interpolations_allowed(inner) for inner in part]
    if not isinstance(part, dict):
        return part
    copy = {
        key: inner
        if not name and key in {"if", "default", "enum"}
        else _interpolations_allowed(inner, name=not name and key in {"properties", "patternProperties", "$defs"})
        for key, inner in part.items()
    }
    if name or not ("enum" in part or part.get("type") in ["integer", "number", "boolean"]):
        return copy
    about = {key: copy.pop(key) for key in ("title", "description", "default", "restart") if key in copy}
    return {**about, "anyOf": [copy, {"type": "string", "pattern": INTERPOLATION}]}
