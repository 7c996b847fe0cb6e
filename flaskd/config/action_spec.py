"""What the configuration must know of the cleanup: the phases of a stop, and each action's fields."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Literal, TypeAlias, Union

from flaskd.config.settings import Settings
from flaskd.values import value

if TYPE_CHECKING:
    from pydantic import BaseModel

Fields: TypeAlias = Union[Settings, "BaseModel"]
"""The fields of an action: flaskd's own actions have Settings, those of other packages pydantic models."""


class Phase(StrEnum):
    """The phases of a stop, in the order in which they run."""

    ANNOUNCE = "announce"
    DRAIN = "drain"
    QUIESCE = "quiesce"
    PERSIST = "persist"
    CLOSE = "close"
    FLUSH = "flush"
    FINAL = "final"

    @property
    def position(self) -> int:
        """The position in the order, from 0."""
        return list(Phase).index(self)


REPLACEMENTS = ("reload", "recycle")
"""The reasons for which a worker stops while the service goes on: new code or configuration, and all others."""

Scope = Literal["worker", "service"]
"""Where a policy runs if there are worker processes: in each worker, or once, in the daemon's own process.

The daemon's process never imports the app. Without workers both are the same process.
"""


@value
class ActionSpec:
    """What the configuration must know of a cleanup action: its fields, its phase, and more.

    `fault` says why the action cannot be used; empty if it can. `needs` maps modules, one of which must be installed,
    to their names in the package index. `keeps` is the field with the path of its file under the state directory, empty
    if it has none. `scopes` are those in which it can run, its default first. `at_replacement` says whether it also
    runs when a worker is replaced. `summary` says what it does, for people.
    """

    fields: type[Fields]
    default_phase: Phase
    fault: str = ""
    needs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    keeps: str = ""
    scopes: tuple[Scope, ...] = ("worker",)
    at_replacement: bool = True
    summary: str = ""

    def missing(self) -> str:
        """The packages that would have to be installed, empty if none; imports nothing."""
        return "" if not self.needs or any(map(_installed, self.needs)) else " or ".join(self.needs.values())


def _installed(module: str) -> bool:
    try:
        return module in sys.modules or importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # its parent package is missing, or is no package
        return False


Actions = Mapping[str, ActionSpec]
