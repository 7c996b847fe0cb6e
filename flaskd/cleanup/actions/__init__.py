"""The actions that a policy can `use`. Each family has a file, which is registered here.

Other packages add actions as entry points; see `flaskd.cleanup.registry`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from flaskd.cleanup.actions import (
    cache,
    call,
    command,
    connections,
    executors,
    files,
    logs,
    processes,
    schedulers,
    telemetry,
    threads,
    web,
)
from flaskd.cleanup.kinds import UNCLOSED
from flaskd.cleanup.registry import LazyMapping, Registry, brought
from flaskd.config import ActionSpec

if TYPE_CHECKING:
    from flaskd.cleanup.model import Action

_FAMILIES = (
    command, call, cache, web, files, logs, connections, schedulers, executors, threads, processes, telemetry,
)  # fmt: skip
_OWN = tuple(action for family in _FAMILIES for action in family.ACTIONS)

ACTIONS: Mapping[str, Action] = Registry({action.name: action for action in _OWN}, brought)
"""All actions by the name that a policy gives in `use`."""

KINDS = (*(replace(kind, use=action.name) for action in _OWN for kind in action.kinds), *UNCLOSED)
"""The kinds of objects that discovery finds."""


def action_specs(actions: Mapping[str, Action] = ACTIONS) -> Mapping[str, ActionSpec]:
    """What `flaskd.config` must know of each action, by the action's name."""

    def spec(action: Action) -> ActionSpec:
        return ActionSpec(
            action.fields, action.default_phase, action.fault, action.needs, action.keeps, action.scopes,
            action.at_replacement, action.summary,
        )  # fmt: skip

    return LazyMapping(actions, spec)
