"""Loads a configuration: source, command line, interpolation, model, policies; gives a result or all faults."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from flaskd.config.configuration import Configuration
from flaskd.config.doubts import doubts
from flaskd.config.faults import COMMAND_LINE, Faults, Place, dotted
from flaskd.config.interpolate import Sources, interpolated
from flaskd.config.listeners import check_listeners
from flaskd.config.model import Config
from flaskd.config.nodes import Node, Scalar, Table, child, scalars
from flaskd.config.nodes import Path as NodePath
from flaskd.config.policies import action_of, check_policies, policy_tables
from flaskd.config.python_source import from_python
from flaskd.config.settings import Settings
from flaskd.config.state_paths import check_state_paths
from flaskd.config.yaml_loader import MAX_BYTES, parse
from flaskd.errors import ConfigError
from flaskd.text import Redactor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from flaskd.config.action_spec import Actions, Fields

_POLICIES = ("cleanup", "policies")
_INHERITED = ("timeout", "on_failure", "retries")


def load(
    path: Path | None,
    *,
    actions: Actions,
    overrides: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Configuration:
    """Read a configuration file; without a path, all defaults.

    ``overrides`` are dotted keys from the command line. They override the file; a value of None means that the option
    was not given. ``environ`` is used by interpolations; default: the process' environment. Raises ConfigError with one
    line if the file cannot be read, else InvalidConfigError with every fault.
    """
    faults = Faults(functools.partial(_places_of, actions))
    if path is None:
        top = Place("<defaults>")
        tree, base, source = Table(top, top, {}), Path.cwd(), b""
    else:
        # The path is not resolved: in a Kubernetes ConfigMap the file and its neighbours are links.
        source = read_source(path)
        tree, base = parse(source, str(path), faults), path.absolute().parent
    empty = _says_nothing(tree)
    tree, origins = _filled(tree, base, faults, overrides, environ)
    values, secrets = _validated(tree, base, actions, environ, faults)
    doubted = doubts(values, tree, secrets)
    return Configuration(values, path, secrets, digest(source), origins, empty, _redactor(tree), doubted)


def load_mapping(
    data: Mapping[str, object],
    *,
    actions: Actions,
    overrides: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
) -> Configuration:
    """Read a configuration from a Python mapping like from a file; its paths are relative to the working directory.

    Raises InvalidConfigError with every fault; their source is ``<mapping>``, and they have no lines.
    """
    faults = Faults(functools.partial(_places_of, actions))
    tree = from_python(data, Place("<mapping>"), faults)
    if not isinstance(tree, Table):
        raise ConfigError(f"expected the configuration as a mapping, got {type(data).__name__}")
    base, empty = Path.cwd(), _says_nothing(tree)
    tree, origins = _filled(tree, base, faults, overrides, environ)
    values, secrets = _validated(tree, base, actions, environ, faults)
    doubted = doubts(values, tree, secrets)
    return Configuration(values, None, secrets, "", origins, empty, _redactor(tree), doubted)


def load_again(load: Callable[[], Configuration], old: Configuration) -> Configuration:
    """Load a configuration that is to replace `old`, which is in force; raises ConfigError like `load`.

    It refuses a source that can be read only once, such as a pipe, and one that has lost all its values: the file is
    being written or was truncated. At a start an empty file means the defaults.
    """
    if old.path is not None and (kind := _read_once(old.path)):
        raise ConfigError(f"cannot reload {old.path}: it is {kind}, which can be read only once; give a file with -c")
    new = load()
    if new.empty and not old.empty:
        raise ConfigError(
            f"cannot reload {new.path or 'the configuration'}: there is no value in it, as if it were just being "
            "written; if all defaults are meant, write version: 1"
        )
    return new


_CALLED_ELSEWHERE = {
    "bind": "listen", "host": "listen", "port": "listen", "address": "listen",
    "loglevel": "level", "log_level": "log.level", "accesslog": "access", "access_log": "access",
    "timeout": "request_timeout", "graceful_timeout": "shutdown.drain.timeout", "keepalive": "channel_timeout",
    "wsgi_app": "target", "module": "target", "directory": "chdir", "preload_app": "preload",
    "forwarded_allow_ips": "trusted_proxy", "root_path": "url_prefix",
}  # fmt: skip
"""Names that other servers, or users, give to some keys."""


def _places_of(actions: Actions, name: str) -> list[str]:
    """The dotted keys of that name, or of flaskd's name for it, in all sections and actions: ``server.listen``."""
    name = name.lower().replace("-", "_")
    wanted = {name, _CALLED_ELSEWHERE.get(name, name)}
    found = [dotted(path) for path in _keys(Config, ()) if not wanted.isdisjoint({path[-1], dotted(path)})]
    fields = (field.key for each in actions.values() if issubclass(each.fields, Settings)
              for field in each.fields.model_fields.values())  # fmt: skip
    return found or ["cleanup.policies.NAME.with." + name] * (name in fields)


def _keys(section: type[Settings], path: NodePath) -> Iterator[NodePath]:
    for each in section.model_fields.values():
        yield (*path, each.key)
        if isinstance(each.annotation, type) and issubclass(each.annotation, Settings):
            yield from _keys(each.annotation, (*path, each.key))


def _says_nothing(tree: Table) -> bool:
    return all(scalar.value is None for _, scalar in scalars(tree))


def _read_once(path: Path) -> str:
    """What is at a path if only the first reader gets its content, such as a pipe; else empty."""
    try:
        found = path.stat()
        if stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode) or path.samefile(os.devnull):
            return ""  # `read_source` refuses a directory
    except (OSError, ValueError):
        return ""
    return "a pipe" if stat.S_ISFIFO(found.st_mode) else "a socket" if stat.S_ISSOCK(found.st_mode) else "a device"


_SAID: tuple[NodePath, ...] = (
    ("app", "chdir"), ("control", "group"), ("control", "roles"), ("health", "path"),
    ("health", "probe"), ("shutdown", "record"), ("shutdown", "endpoint", "token_file"),
    ("shutdown", "endpoint", "credential"),
)  # fmt: skip
"""Keys whose values messages may quote, so that interpolated ones are masked; not the addresses and the app."""


def _redactor(tree: Table) -> Redactor:
    """The redactor for all interpolated values that a message may quote."""
    policies = [(*_POLICIES, name, "with") for name in policy_tables(tree)]
    return Redactor(text for path in (*_SAID, *policies) for text in interpolated_in(tree, path))


def digest(source: bytes) -> str:
    """A digest that differs between two contents of a file."""
    return hashlib.sha256(source).hexdigest()


def read_source(path: Path) -> bytes:
    """Read a configuration file, at most one byte more than its allowed length; raises ConfigError."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    raise ConfigError(f"cannot read {path}: {reason}; check the path given with -c or in $FLASKD_CONFIG")


def _filled(
    tree: Table, base: Path, faults: Faults, overrides: Mapping[str, object] | None, environ: Mapping[str, str] | None
) -> tuple[Table, dict[NodePath, str]]:
    """Put in command line values and interpolations; also gives where each value came from."""
    for key, value in (overrides or {}).items():
        if value is not None:
            parts = tuple(key.split("."))
            tree = _put(tree, parts, from_python(value, Place(COMMAND_LINE), faults, parts))
    origins = {path: _origin(scalar) for path, scalar in scalars(tree)}
    filled = interpolated(tree, Sources(os.environ if environ is None else environ, base), faults)
    assert isinstance(filled, Table)
    return filled, origins


_SOURCE = re.compile(r"(?<!\$)\$\{[a-z]+:[^}:]*")


def _origin(scalar: Scalar) -> str:
    """Where a value was written, and which interpolation, but never its result."""
    place = scalar.place
    at = f"{place.source}:{place.line}:{place.column}" if place.line else place.source
    return ", ".join([at, *(f"{found}}}" for found in _SOURCE.findall(scalar.text))])


def _validated(
    tree: Table, base: Path, actions: Actions, environ: Mapping[str, str] | None, faults: Faults
) -> tuple[Config, frozenset[NodePath]]:
    config = Config.read(tree, (), faults)
    check_policies(tree, actions, faults)
    check_listeners(tree, faults)
    fields = _action_fields(tree, actions, faults)
    check_state_paths(tree, fields, actions, os.environ if environ is None else environ, faults)
    faults.check()
    assert config is not None
    return _complete(config, tree, fields, actions, base), _secrets(tree)


def _put(table: Table, parts: tuple[str, ...], node: Node) -> Table:
    first, *rest = parts
    if rest:
        inner = table.entries.get(first) or Table(node.key, node.place, {})
        if isinstance(inner, Scalar) and inner.value is None:
            inner = Table(inner.key, inner.place, {})
        if not isinstance(inner, Table):
            return table  # the file has its own fault here
        node = _put(inner, tuple(rest), node)
    return dataclasses.replace(table, entries={**table.entries, first: node})


def _action_fields(tree: Table, actions: Actions, faults: Faults) -> dict[str, Fields | None]:
    fields: dict[str, Fields | None] = {}
    for name, policy in policy_tables(tree).items():
        if (spec := action_of(policy, actions)) and not spec.fault:
            written = policy.entries.get("with") or Table(policy.key, policy.place, {})
            fields[name] = _read_fields(spec.fields, written, (*_POLICIES, name, "with"), faults)
    return fields


def _read_fields(fields: type[Fields], written: Node, path: NodePath, faults: Faults) -> Fields | None:
    if issubclass(fields, Settings):
        return fields.read(written, path, faults)
    from flaskd.config.pydantic_fields import read  # noqa: PLC0415 - the action's package has imported pydantic

    return read(fields, written, path, faults)


def interpolated_in(tree: Table, path: NodePath) -> list[str]:
    """What was filled in under a path: the present values, and each piece of them."""
    node: Node | None = tree
    for part in path:
        node = node and child(node, part)
    found = [scalar for _, scalar in scalars(node) if scalar.secret] if node else []
    return [text for each in found for text in (each.text, *each.pieces)]


def _complete(config: Config, tree: Table, fields: Mapping[str, Fields | None], actions: Actions, base: Path) -> Config:
    """Fill in what depends on other values: each policy's defaults, phase and fields, absolute paths."""
    policies = {}
    for name, policy in config.cleanup.policies.items():
        update = {key: getattr(config.cleanup.defaults, key) for key in _INHERITED}
        update["phase"] = actions[policy.use].default_phase
        update["scope"] = actions[policy.use].scopes[0]
        update = {key: value for key, value in update.items() if key not in policy.model_fields_set}
        whole = policy.model_copy(update={**update, "with_": fields[name]})
        policies[name] = whole.hiding(interpolated_in(tree, (*_POLICIES, name, "with")))
    cleanup = config.cleanup.model_copy(update={"policies": policies})
    chdir = config.app.chdir and base / config.app.chdir
    app = config.app.model_copy(update={"chdir": chdir})
    token_file = config.shutdown.endpoint.token_file and base / config.shutdown.endpoint.token_file
    endpoint = config.shutdown.endpoint.model_copy(update={"token_file": token_file})
    shutdown = config.shutdown.model_copy(update={"endpoint": endpoint})
    return config.model_copy(update={"app": app, "shutdown": shutdown, "cleanup": cleanup})


def _secrets(tree: Table) -> frozenset[NodePath]:
    """The paths of all secrets, and of values that were filled in from a secret."""
    secrets: set[NodePath] = {path for path, scalar in scalars(tree) if scalar.secret}
    for key in _INHERITED:
        if ("cleanup", "defaults", key) in secrets:
            policies = policy_tables(tree).items()
            secrets |= {(*_POLICIES, name, key) for name, policy in policies if child(policy, key) is None}
    shutdown = child(tree, "shutdown")
    if ("shutdown", "deadline") in secrets and shutdown and child(shutdown, "reserve") is None:
        secrets.add(("shutdown", "reserve"))
    return frozenset(secrets)
