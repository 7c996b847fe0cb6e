"""What the configuration needs to know of the cleanup: the phases of a stop, and each action's fields."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Literal, TypeAlias, Union

from flaskd.config.settings import Settings

if TYPE_CHECKING:
    from pydantic import BaseModel

Fields: TypeAlias = Union[Settings, "BaseModel"]
"""The fields of an action: flaskd's own are Settings, those of other packages pydantic's models."""


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
        """Position in the order, from 0."""
        return list(Phase).index(self)


REPLACEMENTS = ("reload", "recycle")
"""The reasons for which a worker stops while the service goes on: new code or configuration, or any other one."""

Scope = Literal["worker", "service"]
"""Where a policy runs when there are worker processes: in each of them, or once, in the daemon's own process.

That process never imports the app. Without workers the two are one.
"""


@dataclass(frozen=True)
class ActionSpec:
    """What the configuration needs to know of a cleanup action: its fields, and the phase it belongs in.

    `fault` is why it cannot be used, empty when it can. `needs` are the modules of which one must be installed, each
    with its name at the package index. `keeps` is the field that names its file under the state directory,
    empty when it has none. `scopes` are those that it can run in, its default first. `at_replacement`: whether it runs,
    too, when a worker is replaced. `summary` is what it does, for people.
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
        """What would have to be installed; empty when the action can do its work. Imports none of it."""
        return "" if not self.needs or any(map(_installed, self.needs)) else " or ".join(self.needs.values())


def _installed(module: str) -> bool:
    try:
        return module in sys.modules or importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # its parent is not there, or is no package
        return False


Actions = Mapping[str, ActionSpec]
