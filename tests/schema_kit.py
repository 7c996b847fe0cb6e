"""Judges a value by a JSON Schema; it knows only the words that the schema of flaskd's configuration uses."""

import re

_TYPES = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "number": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
    "integer": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool) and value == int(value),
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}
ABOUT = {
    "$schema", "$id", "$defs", "title", "description", "default", "examples", "format", "writeOnly",
    "unit", "restart", "new_workers",
}  # fmt: skip
"""Words that describe a value and judge nothing."""


def same(one, other):
    """Whether two values are equal in JSON: 1 equals 1.0, and not true."""
    return one == other and isinstance(one, bool) is isinstance(other, bool)


def takes(schema, value, root):
    """Whether a value is valid; `root` is the whole schema. An unknown word is an error of the test."""
    return all(_WORDS[word](wanted, value, schema, root) for word, wanted in schema.items() if word not in ABOUT)


def _takes_entries(_wanted, value, schema, root):
    return not isinstance(value, dict) or all(_takes_entry(schema, *each, root) for each in value.items())


def _takes_entry(schema, name, value, root):
    found = [schema["properties"][name]] if name in schema.get("properties", {}) else []
    found += [each for pattern, each in schema.get("patternProperties", {}).items() if re.search(pattern, name)]
    others = schema.get("additionalProperties", {})
    return (
        all(takes(each, value, root) for each in found) if found else others is not False and takes(others, value, root)
    )


_WORDS = {
    "$ref": lambda wanted, value, _, root: takes(root["$defs"][wanted.removeprefix("#/$defs/")], value, root),
    "type": lambda wanted, value, *_: any(_TYPES[each](value) for each in ([wanted] if isinstance(wanted, str) else wanted)),
    "enum": lambda wanted, value, *_: any(same(each, value) for each in wanted),
    "const": lambda wanted, value, *_: same(wanted, value),
    "pattern": lambda wanted, value, *_: not isinstance(value, str) or re.search(wanted, value) is not None,
    "minimum": lambda wanted, value, *_: not _TYPES["number"](value) or value >= wanted,
    "maximum": lambda wanted, value, *_: not _TYPES["number"](value) or value <= wanted,
    "exclusiveMinimum": lambda wanted, value, *_: not _TYPES["number"](value) or value > wanted,
    "anyOf": lambda wanted, value, _, root: any(takes(each, value, root) for each in wanted),
    "allOf": lambda wanted, value, _, root: all(takes(each, value, root) for each in wanted),
    "if": lambda wanted, value, schema, root: not takes(wanted, value, root) or takes(schema["then"], value, root),
    "then": lambda *_: True,  # see "if"
    "items": lambda wanted, value, _, root: not isinstance(value, list) or all(takes(wanted, each, root) for each in value),
    "minItems": lambda wanted, value, *_: not isinstance(value, list) or len(value) >= wanted,
    "required": lambda wanted, value, *_: not isinstance(value, dict) or set(wanted) <= value.keys(),
    "properties": _takes_entries, "patternProperties": _takes_entries, "additionalProperties": _takes_entries,
}  # fmt: skip
