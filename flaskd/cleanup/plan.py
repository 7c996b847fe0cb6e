"""The plan: which steps a stop takes, in which order; a snapshot that later edits do not change."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from flaskd.cleanup.actions import ACTIONS, Action
from flaskd.config import CleanupConfig, Phase
from flaskd.errors import ConfigError, FlaskdError
from flaskd.units import format_duration

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from pydantic import BaseModel

Outcome = Literal["clean", "degraded"]
"""Whether the drain before the cleanup lost nothing."""

_ORDER = {phase: place for place, phase in enumerate(Phase)}
_RESERVED = frozenset({Phase.FLUSH, Phase.FINAL})


class Reason(Protocol):
    """Why the daemon stops: its `kind`, and the whole of it as text."""

    @property
    def kind(self) -> str:
        """One word, as `when.reason` lists it."""


@dataclass(frozen=True)
class Step:
    """One policy as it will run; `timeout` is in seconds, `reasons` empty for any reason."""

    name: str
    action: Action
    fields: BaseModel
    phase: Phase
    timeout: float
    retries: int = 0
    on_failure: Literal["continue", "skip_dependents", "abort"] = "continue"
    after: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    outcome: Outcome | None = None
    always: bool = False

    @property
    def reserved(self) -> bool:
        """Whether it may use the time that is kept in reserve."""
        return self.always or self.phase in _RESERVED

    def wanted(self, reason: str, outcome: Outcome) -> bool:
        """Whether its `when` fits this stop."""
        return (not self.reasons or reason in self.reasons) and self.outcome in (None, outcome)

    def describe(self) -> dict[str, Any]:
        """Stable keys for programs; the action's own fields stay out of it, for they may hold secrets."""
        return {
            "name": self.name,
            "phase": str(self.phase),
            "use": self.action.name,
            "timeout": self.timeout,
            "retries": self.retries,
            "on_failure": self.on_failure,
            "after": list(self.after),
            "when": {"reason": list(self.reasons), "outcome": self.outcome},
            "always": self.always,
        }

    def notes(self) -> str:
        """What of it differs from the defaults, for people."""
        return "; ".join(
            note
            for said, note in (
                (self.after, f"after {', '.join(self.after)}"),
                (self.always, "always"),
                (self.on_failure != "continue", f"on failure {self.on_failure.replace('_', ' ')}"),
                (self.retries, f"{self.retries} {'retry' if self.retries == 1 else 'retries'}"),
                (self.reasons, f"when reason is {' or '.join(self.reasons)}"),
                (self.outcome, f"when outcome is {self.outcome}"),
            )
            if said
        )


@dataclass(frozen=True)
class Plan:
    """The steps of a stop: ordered by phase, then by their `after` edges, then as they were given."""

    steps: tuple[Step, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", _ordered(self.steps))

    def of(self, phase: Phase) -> tuple[Step, ...]:
        """The steps of one phase, in order."""
        return tuple(step for step in self.steps if step.phase is phase)

    @property
    def id(self) -> str:
        """The same for plans of the same steps, another for others: 12 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.describe()).encode()).hexdigest()[:12]

    def dependents(self, name: str) -> tuple[str, ...]:
        """The names of all steps that come after `name`, directly or through others."""
        found = [name]
        found += (step.name for step in self.steps if any(before in found for before in step.after))
        return tuple(found[1:])

    def prepare(self) -> None:
        """Import what the steps will need; raises ConfigError with one line for each policy at fault."""
        faults = []
        for step in self.steps:
            if step.action.prepare is None:
                continue
            try:
                step.action.prepare(step.fields)
            except Exception as fault:  # noqa: BLE001 - code of the user runs here
                faults.append(f"cleanup.policies.{step.name}: {fault}")
        if faults:
            raise ConfigError("\n".join(faults))

    def restore(self, app: Any, state: Path | None) -> list[tuple[str, bool]]:
        """Let the steps bring back what they kept at the last stop; each one's words, and whether it did."""
        said = []
        for step in self.steps:
            if step.action.restore is None:
                continue
            try:
                words, done = step.action.restore(app, state, step.fields), True
            except FlaskdError as error:
                words, done = str(error), False
            except Exception as error:  # noqa: BLE001 - an action of another package: the app starts without it
                words, done = f"cannot restore: {error!r}", False
            if words:
                said.append((f"cleanup {step.phase}/{step.name}: {words}", done))
        return said

    def describe(self) -> list[dict[str, Any]]:
        """One mapping with stable keys for each step, in order."""
        return [step.describe() for step in self.steps]

    def text(self, deadline: float, reserve: float) -> str:
        """A table for people; `deadline` and `reserve` are lengths in seconds."""
        head = f"deadline {format_duration(deadline)}"
        if reserve:
            head += f", of which {format_duration(reserve)} are kept for flush, final and what is marked always"
        if not self.steps:
            return f"{head}\nno cleanup policies"
        rows = [("PHASE", "POLICY", "ACTION", "TIMEOUT", "NOTES")]
        rows += [
            (str(each.phase), each.name, each.action.name, format_duration(each.timeout), each.notes())
            for each in self.steps
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join([head, *(line.rstrip() for line in lines)])


def build_plan(cleanup: CleanupConfig, actions: Mapping[str, Action] = ACTIONS) -> Plan:
    """Take the enabled policies of a validated configuration.

    An edge to a disabled policy leads on to what that one came after. Raises ConfigError for an action that
    `actions` does not have.
    """
    policies = cleanup.policies
    steps = []
    for name, policy in policies.items():
        if not policy.enabled:
            continue
        if policy.use not in actions:
            raise ConfigError(f'cleanup.policies.{name}.use: there is no action "{policy.use}"')
        steps.append(
            Step(
                name=name,
                action=actions[policy.use],
                fields=policy.with_,
                phase=policy.phase,
                timeout=policy.timeout,
                retries=policy.retries,
                on_failure=policy.on_failure,
                after=_enabled_before(name, cleanup),
                reasons=tuple(policy.when.reason),
                outcome=policy.when.outcome,
                always=policy.always,
            )
        )
    return Plan(tuple(steps))


def _enabled_before(name: str, cleanup: CleanupConfig) -> tuple[str, ...]:
    """The enabled policies that `name` comes after, looking through disabled ones."""
    policies = cleanup.policies
    found: list[str] = []
    seen = {name}
    queue = list(policies[name].after)
    while queue:
        before = queue.pop(0)
        if before in seen:
            continue
        seen.add(before)
        if policies[before].enabled:
            found.append(before)
        else:
            queue += policies[before].after
    return tuple(found)


def _ordered(steps: Iterable[Step]) -> tuple[Step, ...]:
    """Sort; an edge to a later or unknown step is dropped, so that no step ever waits for nothing."""
    left = sorted(steps, key=lambda step: _ORDER[step.phase])
    names = {step.name for step in left}
    done: dict[str, Step] = {}
    while left:
        phase = left[0].phase
        free = (step for step in left if step.phase is phase and names.isdisjoint(set(step.after) - done.keys()))
        step = next(free, left[0])
        left.remove(step)
        done[step.name] = replace(step, after=tuple(before for before in step.after if before in done))
    return tuple(done.values())
