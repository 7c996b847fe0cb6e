"""Targets: the objects of the app that a policy names, as MODULE:ATTRIBUTE."""

from __future__ import annotations

import importlib
import operator
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from flaskd.cleanup.context import StepFailedError
from flaskd.config import Fields, OneOrMany, Settings
from flaskd.config.kind import matching
from flaskd.config.settings import field
from flaskd.objects import contents_of
from flaskd.process.forks import AppCode

TARGET = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
"""How a target is written: MODULE:ATTRIBUTE."""


Target = Annotated[str, matching(TARGET.pattern, "expected MODULE:ATTRIBUTE, such as shop.db:pool")]
"""An object of the app, as MODULE:ATTRIBUTE; dots lead on to attributes of it."""


class TargetFields(Settings):
    """Fields of the actions on live objects."""

    target: OneOrMany[Target] = field(
        default=[], description="What to end, as MODULE:ATTRIBUTE; none: all of the kind that discovery finds."
    )


def look_up(target: str) -> Any:
    """Import ``pkg.mod:attribute``; raises StepFailedError, which names the target and what is wrong with it."""
    module, _, attribute = target.partition(":")
    try:
        with AppCode():
            return operator.attrgetter(attribute)(importlib.import_module(module))
    except (Exception, SystemExit) as error:
        raise StepFailedError(f'cannot import target "{target}": {type(error).__name__}: {error}') from error


def look_up_targets(fields: Fields) -> None:
    """Raise StepFailedError if an object that a policy names does not exist now; it may change until the stop."""
    for target in [*getattr(fields, "target", []), *filter(None, [getattr(fields, "stop", None)])]:
        look_up(target)


def targets(fields: Fields) -> list[tuple[str, Any]]:
    """The objects that a policy names, each with its name. A collection stands for its items, None for no object."""
    return [(name, each) for name in getattr(fields, "target", []) for each in _each_in(look_up(name))]


def loaded(name: str) -> list[Any]:
    """The objects at MODULE:ATTRIBUTE if the module is loaded and has the attribute, else none; imports nothing."""
    if not TARGET.fullmatch(name):
        return []
    module, _, attributes = name.partition(":")
    try:
        first, *more = attributes.split(".")
        found = contents_of(module)[first]
        return list(_each_in(operator.attrgetter(".".join(more))(found) if more else found))
    except Exception:  # noqa: BLE001 - the app's own object was asked; its policy will tell what is wrong with it
        return []


def _each_in(value: Any) -> Iterable[Any]:
    if value is None:
        return ()
    if isinstance(value, Mapping):
        return tuple(value.values())
    return tuple(value) if isinstance(value, (list, tuple, set, frozenset)) else (value,)
