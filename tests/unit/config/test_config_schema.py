"""The JSON Schema accepts and refuses the same as a check, as far as a schema can."""

import json
import random
import re
from pathlib import Path

import pytest
import yaml
from schema_kit import takes

from flaskd.cleanup import ACTIONS, action_specs
from flaskd.config import Config, Settings, load, schema
from flaskd.config.schema import EXAMPLE, ID
from flaskd.errors import ConfigError

ROOT = Path(__file__).parents[3]
SCHEMA = schema(action_specs())

BEYOND = re.compile(
    r"less than shutdown\.deadline|either token_file or credential|listen along with|server\.trusted_proxy to be set"
    r"|either forwarded or|at most 366d|a file of its own|an address of its own|none under profile|at most 107 bytes"
    r"|an IPv[46] address and a port|whole network|IP address, a network|a policy that|an order, got|an action, got"
    r"|a URL such as|an address such as|16 characters|the program as the first|a path of files|one directory a star"
    r"|another value|at least 4096|the name of a policy"
    r"|expected a path with \{worker\}|JSON can say|of at most \d+ KiB|in the phase|earlier|is fixed|to run in"
)
"""Faults that no schema reports: about keys together, and about more than a pattern can say."""

NEEDED = {
    "server.trusted_proxy_count": {"server": {"trusted_proxy": "*"}},
    "server.trusted_proxy_headers": {"server": {"trusted_proxy": "*"}},
    "cleanup.policies": {},
    "shutdown.endpoint.listen": {"shutdown": {"endpoint": {"token_file": "t"}}},
    "shutdown.endpoint.token_file": {"shutdown": {"endpoint": {"listen": ":1"}}},
    "shutdown.endpoint.credential": {"shutdown": {"endpoint": {"listen": ":1"}}},
    "shutdown.endpoint.allowed_hosts": {"shutdown": {"endpoint": {"listen": ":1", "token_file": "t"}}},
}
"""Keys that must be there beside a key."""

WHATEVER = [
    None, True, False, 0, 1, -1, 2, 8, 512, 513, 600, 1024, 1025, 660, 432, 2**31, 8000, 1.5, -0.5, "", " ", "x", "X", "0", "1",
    "8", "0660", "0o660", "660", "0606", "0999", "a b", "a\nb", "\u00e9", "~", "null", "true", "no", "off", "auto", "AUTO", "Auto", "*",
    "localhost", "5s", " 5s ", "1m 30s", "1h30m", "250ms", "0s", "0.0s", "0ms", "5", "5 s", "s", "-5s", "1.5", "1e3s", "64MiB", "64M",
    "10kB", "0B", "1.5GiB", "10 kB", "4096", "-1", "/", "/x", "/x*", "/*/x", "/x?y", "x/y", "/a b", "http://x", "HTTPS://x/y", "ftp://x",
    ":80", "127.0.0.1:80", "0.0.0.0:65535", ":65536", ":99999", "1.2.3:80", "256.1.1.1:80", "01.2.3.4:80", "[::1]:80", "[1.2.3.4]:80",
    "a.b-c:80", "a.:80", "-a:80", "a b:80", "unix:/x", "unix:x", "fd:http", "fd:a:b", "fd:", "10.0.0.0/8", "10.0.0.1/8", "::1", "fe80::/10",
    "info", "INFO", "Warn", "warning", "warnig", "X-Forwarded-For", "x-forwarded-for", "forwarded", "drain", "stop", "root", "@ops", "@",
    "a:b", "a,b", "..", "shop:app", "shop.jobs:stop", "shop", "a-b:c", "POST", "post", "last.json", "a/b", "development", "production",
    [], ["x"], [1], [None], [[]], [":80"], ["/x", "/y"], ["5s"], ["info", "drain"], ["drain"], {}, {"a": "b"}, {"/x": "5s"}, {"/x": None},
    {"A B": "5s"}, {"PATH": "x"}, {"A=B": "x"}, {"X-Y": "x"}, {"a": 1}, {"viewer": "root"},
]  # fmt: skip


def keys(section, path=()):
    for each in section.model_fields.values():
        yield (*path, each.key), each
        if isinstance(each.annotation, type) and issubclass(each.annotation, Settings):
            yield from keys(each.annotation, (*path, each.key))


KEYS = {".".join(path): path for path, _ in keys(Config)}
POLICY = ("cleanup", "policies", "it")
FIELDS = {
    f"{name} {each.key}": (name, each.key) for name, action in ACTIONS.items() if issubclass(action.fields, Settings)
    for each in action.fields.model_fields.values()
}  # fmt: skip


def document(path, value, needed):
    """A configuration with a value at a path, and with the keys that must be beside it."""
    whole = json.loads(json.dumps(needed))
    inner = whole
    for part in path[:-1]:
        inner = inner.setdefault(part, {})
    inner[path[-1]] = value
    return whole


def written(value):
    """The ways to write a value in a file: null in three spellings, all else as JSON has it."""
    text = json.dumps(value)
    yield text
    if value is None:
        yield from ("", "~")


def faults_of(path, value, needed, place):
    """The faults of each way to write it."""
    for text in written(value):
        place.write_text(json.dumps(document(path, "@@", needed)).replace('"@@"', f" {text}"))
        try:
            load(place, actions=action_specs(), environ={})
        except ConfigError as error:
            yield [each.message for each in error.faults]
        else:
            yield []


def agree(path, needed, place, seed):
    chance = random.Random(seed)
    texts = [each for each in WHATEVER if isinstance(each, str)]
    mixed = [chance.choice(texts)[: chance.randint(1, 9)] + chance.choice(texts) for _ in range(15)]
    for value in [*WHATEVER, *mixed, [chance.choice(texts), chance.choice(texts)]]:
        found = list(faults_of(path, value, needed, place))
        valid = takes(SCHEMA, document(path, value, needed), SCHEMA)
        if [] in found:
            assert valid, f"a check takes {value!r}, the schema does not"
        elif not any(BEYOND.search(each) for each in found[0]):
            assert not valid, f"the schema takes {value!r}, a check says {found[0]}"


@pytest.mark.parametrize("key", KEYS)
def test_the_schema_and_a_check_agree(key, tmp_path):
    """Schema and check agree on every value of a key; what only a check can know is listed here."""
    agree(KEYS[key], NEEDED.get(key, {}), tmp_path / "flaskd.yaml", key)


@pytest.mark.parametrize("field", FIELDS)
def test_the_schema_and_a_check_agree_on_fields(field, tmp_path):
    """Schema and check agree on every value under `with`, for each action."""
    action, key = FIELDS[field]
    others = {
        each.key: EXAMPLES[each.key] for each in ACTIONS[action].fields.model_fields.values()
        if each.is_required() and each.key != key
    }  # fmt: skip
    needed = {"cleanup": {"policies": {"it": {"use": action, "with": others}}}}
    agree((*POLICY, "with", key), needed, tmp_path / "flaskd.yaml", field)


EXAMPLES = {
    "argv": ["true"], "target": "shop.jobs:stop", "url": "https://hooks.example.com/x", "service_id": "a", "paths": ["x"], "stop": "a:b",
}  # fmt: skip


@pytest.mark.parametrize(
    "key", ["use", "phase", "timeout", "retries", "on_failure", "scope", "after", "when", "always", "enabled"]
)
def test_the_schema_and_a_check_agree_on_policies(key, tmp_path):
    """Schema and check agree on every value of a policy's keys."""
    agree((*POLICY, key), {"cleanup": {"policies": {"it": {"use": "logging.flush"}}}}, tmp_path / "flaskd.yaml", key)


@pytest.mark.parametrize(
    "path",
    [ROOT / "config/flaskd.yaml", *sorted((ROOT / "deploy").rglob("*flaskd.yaml")), ROOT / "deploy/image.yaml"],
    ids=str,
)
def test_files_of_the_project_are_valid(path):
    """The schema accepts all files of the project that a check accepts."""
    assert takes(SCHEMA, yaml.safe_load(path.read_text()), SCHEMA)


def test_it_has_a_name_an_example_and_the_text_of_each_action(tmp_path):
    """The schema has an `$id`, the text of each action for editors, and an example that passes a check without a doubt."""
    assert SCHEMA["$id"] == ID
    (tmp_path / "flaskd.yaml").write_text(yaml.safe_dump(EXAMPLE))
    assert load(tmp_path / "flaskd.yaml", actions=action_specs(), environ={}).doubts == ()
    assert SCHEMA["examples"] == [EXAMPLE]
    *uses, _ = SCHEMA["$defs"]["Policy"]["properties"]["use"]["anyOf"]
    assert {each["const"]: each["description"] for each in uses} == {
        name: action.summary for name, action in ACTIONS.items()
    }
    assert all(action.summary.endswith(".") for action in ACTIONS.values())


def test_every_example_is_one(tmp_path):
    """Every example of a key passes a check, if nothing else prevents that."""
    shown = 0
    for path in KEYS.values():
        part = SCHEMA
        for name in path:
            part = definition_of(part)["properties"][name]
        for value in [value for each in (part, *part.get("anyOf", ())) for value in each.get("examples", ())]:
            shown += 1
            found = list(faults_of(path, value, NEEDED.get(".".join(path), {}), tmp_path / "flaskd.yaml"))
            assert [] in found or BEYOND.search(found[0][0]), (path, value, found)
    assert shown > 50


def definition_of(part):
    """The definition that a property refers to, or the property itself."""
    (reference,) = [each["$ref"] for each in (part, *part.get("anyOf", ())) if "$ref" in each] or [""]
    return SCHEMA["$defs"][reference.removeprefix("#/$defs/")] if reference else part
