"""The plan: which steps a stop takes, in which order; a snapshot that later edits do not change."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from flaskd.cleanup.actions import ACTIONS
from flaskd.cleanup.model import DISCOVERED, Action, Step
from flaskd.cleanup.targets import loaded
from flaskd.config import WORKER, CleanupConfig, Phase, Scope
from flaskd.config.order import in_turn
from flaskd.errors import ConfigError, FlaskdError
from flaskd.process.forks import AppCode
from flaskd.text import Redactor

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping
    from pathlib import Path

    from flaskd.cleanup.found import Found

BEFORE_THE_DRAIN = (Phase.ANNOUNCE,)
BESIDE_THE_DRAIN = (Phase.DRAIN,)
AFTER_THE_DRAIN = tuple(phase for phase in Phase if phase not in {*BEFORE_THE_DRAIN, *BESIDE_THE_DRAIN})


_ORDER = {phase: place for place, phase in enumerate(Phase)}
_IN_ORDER = ("apscheduler.stop", "executor.stop")
"""Of what is found, what is ended one after the other: a job may still use an executor."""


@dataclass(frozen=True)
class Plan:
    """The steps of a stop: ordered by phase, then by their `after` edges, then as they were given.

    `left` is what was found and no step ends, each with the reason. `elsewhere` are the steps of the other scope, where
    there are worker processes: another process runs them.
    """

    steps: tuple[Step, ...] = ()
    left: tuple[Found, ...] = ()
    elsewhere: tuple[Step, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", _ordered(self.steps, {step.name for step in self.elsewhere}))

    def part(self, scope: Scope) -> Plan:
        """What runs in each worker, or once for the service; see `elsewhere`."""
        mine, others = ([step for step in self.steps if (step.scope == scope) is here] for here in (True, False))
        return Plan(tuple(mine), self.left, tuple(others))

    def of(self, phase: Phase) -> tuple[Step, ...]:
        """The steps of one phase, in order."""
        return tuple(step for step in self.steps if step.phase is phase)

    @property
    def later(self) -> bool:
        """Whether there is something to run after the drain."""
        return any(step.phase in AFTER_THE_DRAIN for step in self.steps)

    @property
    def id(self) -> str:
        """The same for plans of the same steps, another for others: 12 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.describe()).encode()).hexdigest()[:12]

    def dependents(self, name: str) -> tuple[str, ...]:
        """The names of all steps that come after `name`, directly or through others, as the policies say it."""
        found = [name]
        steps = _ordered((*self.steps, *self.elsewhere))
        found += (step.name for step in steps if not step.discovered and any(before in found for before in step.after))
        return tuple(found[1:])

    def one_file(self) -> list[str]:
        """The names of the steps that keep the same file in each worker, of which all but one would be lost."""
        return [
            step.name
            for step in self.steps
            if step.action.keeps
            and step.scope == "worker"
            and WORKER not in str(getattr(step.fields, step.action.keeps))
        ]

    def prepare(self) -> None:
        """Import what the steps will need; raises ConfigError with one line for each policy at fault."""
        faults = []
        for step in self.steps:
            if step.action.prepare is None:
                continue
            try:
                with AppCode():
                    step.action.prepare(step.fields)
            except Exception as fault:  # noqa: BLE001 - code of the user runs here
                faults.append(f"cleanup.policies.{step.name}: {step.redact(str(fault))}")
        if faults:
            raise ConfigError("\n".join(faults))

    def restore(self, app: Any, state: Path | None) -> list[tuple[Step, str, bool]]:
        """Let the steps bring back what they kept at the last stop; each one with its words, and whether it did."""
        said = []
        for step in self.steps:
            if step.action.restore is None:
                continue
            try:
                with AppCode():
                    words, done = step.action.restore(app, state, step.fields), True
            except FlaskdError as error:
                words, done = str(error), False
            except Exception as error:  # noqa: BLE001 - an action of another package: the app starts without it
                words, done = f"cannot restore: {error!r}", False
            if words:
                said.append((step, f"cleanup {step.phase}/{step.name}: {step.redact(words)}", done))
        return said

    def describe(self) -> list[dict[str, Any]]:
        """One mapping with stable keys for each step, in order."""
        return [step.describe() for step in self.steps]


def build_plan(cleanup: CleanupConfig, scope: Scope | None = None, *, actions: Mapping[str, Action] = ACTIONS) -> Plan:
    """Take the enabled policies of a validated configuration: all, or where there are workers those of one `scope`.

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
        steps += _with_first(
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
                scope=policy.scope,
                redact=Redactor(policy.hidden),
            )
        )
    plan = Plan(tuple(steps))
    return plan if scope is None else plan.part(scope)


def _with_first(step: Step) -> list[Step]:
    """The step, after one for what its action does in an earlier phase already: NAME:pause for apscheduler.pause.

    None when the drain's outcome decides, which is not known by then.
    """
    first = step.action.first
    if first is None or _ORDER[first.default_phase] >= _ORDER[step.phase] or step.outcome is not None:
        return [step]
    name = f"{step.name}:{first.name.rpartition('.')[2]}"
    return [replace(step, name=name, action=first, phase=first.default_phase, after=()), step]


def with_found(
    plan: Plan, found: Iterable[Found], cleanup: CleanupConfig, actions: Mapping[str, Action] = ACTIONS
) -> Plan:
    """Give a plan in which policies without a target have what was found, and with `auto` a step for each other kind.

    A policy beats discovery: what it names, or all of its action when it names nothing, is left to it. What is excluded
    is left alone. Steps for what was found take the defaults for time and retries, and go on when one fails.
    """
    mode, excluded = cleanup.discovery.mode, set(cleanup.discovery.exclude)
    # By identity as well: what two modules hold has two names, and goes by one of them.
    excluded_ids = {id(thing) for name in excluded for thing in loaded(name)}
    named = {
        id(thing): step.name
        for step in plan.steps
        if step.action.takes
        for name in getattr(step.fields, "target", [])
        for thing in loaded(name)
    }
    taken = {step.takes for step in plan.steps if step.takes}
    free: dict[str, list[Found]] = {}
    left = []
    for each in found:
        if id(each.object) in excluded_ids or not excluded.isdisjoint({each.name, each.use}):
            left.append(replace(each, left="excluded"))
        elif each.use in taken:
            free.setdefault(each.use, []).append(each)
        elif policy := named.get(id(each.object)):
            left.append(replace(each, left=f"left to {policy}"))
        elif each.left or mode != "auto":
            left.append(replace(each, left=each.left or f"discovery: {mode}"))
        else:
            free.setdefault(each.use, []).append(each)
    steps = [replace(step, found=tuple(free.get(step.takes, ()))) if step.takes else step for step in plan.steps]
    for use in [*_IN_ORDER, *(use for use in free if use not in _IN_ORDER)]:
        if use in free and use not in taken:
            steps += _discovered(actions[use], tuple(free[use]), cleanup, steps)
    return Plan(tuple(steps), tuple(left), plan.elsewhere)


def _discovered(action: Action, found: tuple[Found, ...], cleanup: CleanupConfig, before: list[Step]) -> list[Step]:
    """The step for what no policy ends: after the policies of its phase, for they may still use it."""
    phase = action.default_phase
    ordered = {DISCOVERED + use for use in _IN_ORDER}
    after = [step.name for step in before if step.phase is phase and (not step.discovered or step.name in ordered)]
    return _with_first(
        Step(
            DISCOVERED + action.name,
            action,
            action.fields(),
            phase,
            cleanup.defaults.timeout,
            cleanup.defaults.retries,
            after=tuple(after),
            found=found,
        )
    )


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


def _ordered(steps: Iterable[Step], elsewhere: Collection[str] = ()) -> tuple[Step, ...]:
    """Sort; an edge to a later or unknown step is dropped, so that no step ever waits for nothing.

    Edges to steps that another process runs stay. Here they wait for nothing, and say what depends on those.
    """
    steps = tuple(steps)
    done: dict[str, Step] = {}
    for phase in Phase:
        of_phase = {step.name: step for step in steps if step.phase is phase}
        for name, _ in in_turn({name: step.after for name, step in of_phase.items()}):
            step = of_phase[name]
            done[name] = replace(step, after=tuple(each for each in step.after if each in done or each in elsewhere))
    return tuple(done.values())
