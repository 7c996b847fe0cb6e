"""The JSON Schema that ``flaskd schema`` prints, for editors and CI."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flaskd.config.kind import INTERPOLATION
from flaskd.config.model import Config
from flaskd.config.settings import Settings, definition

if TYPE_CHECKING:
    from flaskd.config.action_spec import Actions, Fields


ID = "urn:flaskd:configuration:1"
"""The `$id` of the schema, with the version of the file's format; it cannot be fetched."""

EXAMPLE = {
    "version": 1,
    "app": {"target": "shop.wsgi:app", "chdir": "/srv/shop"},
    "profile": "production",
    "server": {"listen": ["127.0.0.1:8000"], "workers": 2, "threads": 8, "request_timeout": "10s"},
    "health": {"path": "/healthz"},
    "admin": {"listen": "127.0.0.1:9090"},
    "shutdown": {"deadline": "25s", "announce": "5s", "drain": {"timeout": "15s"}},
    "cleanup": {"policies": {"warm-cache": {"use": "cache.persist", "with": {"path": "cache-{worker}.bin"}}}},
}
"""A complete file, as an example."""


def schema(actions: Actions) -> dict[str, Any]:
    """The JSON Schema (2020-12) of a configuration file, with descriptions, for these actions.

    A policy's ``with`` depends on its ``use``; actions that cannot be used are left out. An interpolation is allowed in
    place of each single value.
    """
    fields = {name: spec.fields for name, spec in sorted(actions.items()) if not spec.fault}
    parts: dict[str, Any] = {}
    definition(Config, parts)
    references: dict[type[Fields], Any] = {
        each: definition(each, parts) for each in fields.values() if issubclass(each, Settings)
    }
    if theirs := [each for each in fields.values() if not issubclass(each, Settings)]:
        from flaskd.config.pydantic_fields import definitions  # noqa: PLC0415 - such an action brings pydantic

        of_theirs, more = definitions(theirs, parts)
        references |= dict(zip(theirs, of_theirs, strict=True))
        parts |= more
    policy = parts["Policy"]
    summaries = ({"const": name, "description": actions[name].summary or f"The action {name}."} for name in fields)
    policy["properties"]["use"] |= {"type": "string", "anyOf": [*summaries, {"pattern": INTERPOLATION}]}
    policy["allOf"] = [
        {
            "if": {"properties": {"use": {"const": name}}, "required": ["use"]},
            "then": {"properties": {"with": references[each]}},
        }
        for name, each in fields.items()
    ]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": ID,
        **_interpolations_allowed(parts.pop("Config")),
        "title": "flaskd configuration",
        "examples": [EXAMPLE],
        "$defs": {name: _interpolations_allowed(parts[name]) for name in sorted(parts)},
    }


def _interpolations_allowed(part: Any, *, name: bool = False) -> Any:
    """Copy a schema so that numbers, booleans and choices may also be an interpolation; texts may be one anyway.

    ``name``: the keys of the mapping are names of fields, not words of JSON Schema.
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
    names = ("title", "description", "default", "restart", "new_workers")
    about = {key: copy.pop(key) for key in names if key in copy}
    return {**about, "anyOf": [copy, {"type": "string", "pattern": INTERPOLATION}]}
