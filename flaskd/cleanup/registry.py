"""The registry of actions: flaskd's own, and those that other packages bring as entry points.

A package brings an action with::

    [project.entry-points."flaskd.cleanup"]
    "shop.receipts" = "shop.cleanup:receipts"       # a flaskd.cleanup.Action

An entry point is loaded when its name is first looked up. Looking up one of flaskd's own actions loads none.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from flaskd.cleanup.context import StepContext, StepFailedError
from flaskd.cleanup.model import Action
from flaskd.config import Phase, Settings
from flaskd.process.forks import AppCode

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

_Item = TypeVar("_Item")
_Other = TypeVar("_Other")
_log = logging.getLogger("flaskd.cleanup")

GROUP = "flaskd.cleanup"
"""The group of entry points (packaging.python.org, "Entry points specification")."""


class Registry(Mapping[str, _Item]):
    """A mapping of names to items; `load` makes an item of an entry point at its first look-up and never raises."""

    def __init__(self, own: Mapping[str, _Item], load: Callable[[EntryPoint], _Item]) -> None:
        self._items = dict(own)
        self._load = load

    def __getitem__(self, name: str) -> _Item:
        if name not in self._items:
            self._items[name] = self._load(self._found[name])
        return self._items[name]

    def __contains__(self, name: object) -> bool:
        return name in self._items or name in self._found

    def __iter__(self) -> Iterator[str]:
        return iter({**self._items, **self._found})

    def __len__(self) -> int:
        return len({**self._items, **self._found})

    @functools.cached_property
    def _found(self) -> dict[str, EntryPoint]:
        from importlib.metadata import entry_points  # noqa: PLC0415 - 20 ms, for such an action alone

        found: dict[str, EntryPoint] = {}
        for each in entry_points(group=GROUP):
            if each.name in self._items:
                _log.warning(f'the action "{each.name}" of {origin(each)} is left out: flaskd has its own')
            elif each.name in found and found[each.name].value != each.value:
                other = origin(found[each.name])
                _log.warning(f'the action "{each.name}" of {origin(each)} is left out: {other} has it too')
            else:
                found[each.name] = each
        return found


class LazyMapping(Mapping[str, _Other]):
    """A mapping whose values a function makes from the values of another mapping, each when it is looked up."""

    def __init__(self, mapping: Mapping[str, _Item], make: Callable[[_Item], _Other]) -> None:
        self._mapping: Mapping[str, Any] = mapping
        self._make: Callable[[Any], _Other] = make

    def __getitem__(self, name: str) -> _Other:
        return self._make(self._mapping[name])

    def __contains__(self, name: object) -> bool:
        return name in self._mapping

    def __iter__(self) -> Iterator[str]:
        return iter(self._mapping)

    def __len__(self) -> int:
        return len(self._mapping)


def origin(entry_point: EntryPoint) -> str:
    """The package and the object of an entry point, as text for messages."""
    return f"{entry_point.dist.name if entry_point.dist else 'a package'} ({entry_point.value})"


def brought(entry_point: EntryPoint) -> Action:
    """The action of an entry point; if it cannot be loaded, an action with a `fault` that says why."""
    try:
        with AppCode():
            action = entry_point.load()
        if not isinstance(action, Action):
            raise TypeError(f"expected a flaskd.cleanup.Action, got {type(action).__name__}")
    except (Exception, SystemExit) as error:  # noqa: BLE001 - code of others runs here
        why = " ".join(f"{type(error).__name__}: {error}".split())
        return _unusable(entry_point.name, f"cannot load it from {origin(entry_point)}: {why}")
    return replace(action, name=entry_point.name)


def _unusable(name: str, fault: str) -> Action:
    def run(_context: StepContext, _fields: Any) -> NoReturn:
        raise StepFailedError(fault)

    return Action(name, Settings, Phase.FINAL, run, fault=fault)
