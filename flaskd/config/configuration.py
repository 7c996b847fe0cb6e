"""A configuration that is in force: its values, how it is shown, and how it differs from another."""

from __future__ import annotations

from dataclasses import field, replace
from typing import TYPE_CHECKING, Any

import yaml

from flaskd.config.faults import dotted
from flaskd.config.nodes import core
from flaskd.config.settings import Settings
from flaskd.errors import ConfigError
from flaskd.text import MASK, Redactor, without_password
from flaskd.values import value

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from flaskd.config.faults import Fault
    from flaskd.config.model import Config
    from flaskd.config.nodes import Path as NodePath
    from flaskd.config.settings import Field


@value
class Configuration:
    """The validated values, the file that they came from (None: no file), and the digest of its content."""

    # Neither is in the repr, which ends up in logs and tracebacks, because values may be secret.
    values: Config = field(repr=False)
    path: Path | None
    _secrets: frozenset[NodePath] = field(default=frozenset(), repr=False)
    digest: str = field(default="", repr=False)
    _origins: Mapping[NodePath, str] = field(default_factory=dict, repr=False)
    empty: bool = False
    """Whether its source held no value at all, apart from the command line."""
    redact: Redactor = field(default_factory=Redactor, repr=False, compare=False)
    """Hides in any text what was interpolated."""
    doubts: tuple[Fault, ...] = field(default=(), repr=False)
    """Values that are valid but surely not meant, with their places."""

    def describe(self) -> str:
        """The configuration in force as YAML: every key, units for people, secrets masked."""
        tree = self.values.model_dump()
        for path in self._secrets:
            _mask(tree, path)
        return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**31)

    def annotated(self) -> str:
        """The same as `describe`, with a remark where each value came from that is not a default."""
        text = self.describe()
        lines, marks = text.splitlines(), dict[int, str]()
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        assert root is not None
        for path, line in _last_lines(root):
            if origin := self._origin_of(path):
                marks[line] = origin
        return "\n".join(
            [_DEFAULTS, *(f"{line}  # {marks[i]}" if i in marks else line for i, line in enumerate(lines))]
        )

    def _origin_of(self, path: NodePath) -> str:
        # A single value may be written in place of a list; then its entry is written at the list's own place.
        return self._origins.get(path) or (self._origins.get(path[:-1], "") if path[-1:] == (0,) else "")

    @property
    def origins(self) -> dict[str, str]:
        """Where each value came from that is not a default, by dotted key."""
        return {dotted(path): origin for path, origin in self._origins.items()}

    def within(self, times: tuple[float, float, float] | None) -> Configuration:
        """The same configuration with at most these seconds for a stop: deadline, reserve and announce.

        None: unchanged.
        """
        shutdown = self.values.shutdown
        if times is None:
            return self
        deadline, reserve, announce = times
        less = {"announce": min(announce, shutdown.announce)}
        if deadline < shutdown.deadline:
            less |= {"deadline": deadline, "reserve": min(reserve, deadline)}
        return replace(self, values=self.values.model_copy(update={"shutdown": shutdown.model_copy(update=less)}))

    def restart_keys(self, new: Configuration) -> list[str]:
        """The dotted keys that differ in ``new`` and that only a restart of the daemon can change.

        If there are workers before and after, these are only the keys of the daemon itself; see `renewal_keys`.
        """
        workers = self._keeps_workers(new)
        return [
            key
            for key, each in _changed(self.values, new.values)
            if each.restart and not (workers and (each.renewal or key == _WORKERS))
        ]

    def renewal_keys(self, new: Configuration) -> list[str]:
        """The dotted keys that differ in ``new`` and that only new workers can have; none without workers."""
        return [key for key, each in _changed(self.values, new.values) if each.renewal and self._keeps_workers(new)]

    def _keeps_workers(self, new: Configuration) -> bool:
        return 0 not in {self.values.server.workers, new.values.server.workers}

    def refuse_given_app(self) -> None:
        """Raise ConfigError for an app given as an object if there are to be workers, which could not import it."""
        if workers := self.values.server.workers:
            place = " ".join(filter(None, (self.origins.get(_WORKERS), _WORKERS)))
            shown = MASK if tuple(_WORKERS.split(".")) in self._secrets else workers
            raise ConfigError(
                f"{place}: expected 0 for an app that is given as an object, got {shown}: each worker imports the "
                'app by its name; set app.target to "MODULE:NAME" and start it with "flaskd serve"'
            )


_WORKERS = "server.workers"
_DEFAULTS = "# what has no remark is a default"


def _last_lines(node: yaml.Node, path: NodePath = ()) -> Iterator[tuple[NodePath, int]]:
    """Each value's path, and the line it ends on."""
    if isinstance(node, yaml.MappingNode) and node.value:
        for key, value in node.value:
            yield from _last_lines(value, (*path, key.value))
    elif isinstance(node, yaml.SequenceNode) and node.value:
        for index, value in enumerate(node.value):
            yield from _last_lines(value, (*path, index))
    else:
        yield path, node.end_mark.line


def _changed(old: Settings, new: Settings, prefix: str = "") -> Iterator[tuple[str, Field]]:
    """Each dotted key whose value is another one, with its field."""
    for name, each in old.model_fields.items():
        was, becomes = getattr(old, name), getattr(new, name)
        if isinstance(was, Settings) and isinstance(becomes, Settings):
            yield from _changed(was, becomes, f"{prefix}{name}.")
        elif was != becomes:
            yield prefix + name, each


def _mask(tree: dict[str, Any], path: NodePath) -> None:
    """Put the mask where a secret stands; where validation changed the shape, over all that may hold it."""
    parent: Any = None
    at: str | int = ""
    here: Any = tree
    for part in path:
        known = part in here if isinstance(here, dict) else isinstance(here, list) and part in range(len(here))
        if not known:
            break
        parent, at, here = here, part, here[part]
    if parent is not None:
        parent[at] = MASK


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.2 would not read as text, and what would be an interpolation."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - PyYAML's signature
        return True


def _text(dumper: _Dumper, text: str) -> yaml.Node:
    text = without_password(text)
    style = None if isinstance(core(text), str) else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text.replace("${", "$${"), style=style)


_Dumper.add_representer(str, _text)
