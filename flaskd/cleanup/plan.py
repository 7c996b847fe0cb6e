"""The plan: which steps a stop runs, in which order. A plan does not change when the configuration does."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flaskd.cleanup.actions import ACTIONS
from flaskd.cleanup.model import DISCOVERED, Action, Step
from flaskd.cleanup.targets import loaded
from flaskd.config import WORKER, CleanupConfig, Phase, Scope
from flaskd.config.order import in_turn
from flaskd.errors import ConfigError, FlaskdError
from flaskd.process.forks import AppCode
from flaskd.text import Redactor
from flaskd.values import value

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping
    from pathlib import Path

    from flaskd.cleanup.found import Found

BEFORE_THE_DRAIN = (Phase.ANNOUNCE,)
BESIDE_THE_DRAIN = (Phase.DRAIN,)
AFTER_THE_DRAIN = tuple(phase for phase in Phase if phase not in {*BEFORE_THE_DRAIN, *BESIDE_THE_DRAIN})


_ORDER = {phase: place for place, phase in enumerate(Phase)}
_IN_ORDER = ("apscheduler.stop", "executor.stop")
"""These actions end discovered objects one after the other, in this order: a job may still use an executor."""


@value
class Plan:
    """The steps of a stop: ordered by phase, then by their `after` edges, then as they were given.

    `left` are the objects that were found and that no step ends, each with the reason. `elsewhere` are the steps that
    another process runs, if there are worker processes: the steps of the other scope.
    """

    steps: tuple[Step, ...] = ()
    left: tuple[Found, ...] = ()
    elsewhere: tuple[Step, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", _ordered(self.steps, {step.name for step in self.elsewhere}))

    def part(self, scope: Scope) -> Plan:
        """The plan of one scope: the steps of each worker, or of the service; the others are in `elsewhere`."""
        mine, others = ([step for step in self.steps if (step.scope == scope) is here] for here in (True, False))
        return Plan(tuple(mine), self.left, tuple(others))

    def of(self, phase: Phase) -> tuple[Step, ...]:
        """The steps of one phase, in order."""
        return tuple(step for step in self.steps if step.phase is phase)

    @property
    def later(self) -> bool:
        """Whether there are steps to run after the drain."""
        return any(step.phase in AFTER_THE_DRAIN for step in self.steps)

    @property
    def id(self) -> str:
        """12 hexadecimal digits, the same for all plans with the same steps, and different for others."""
        return hashlib.sha256(json.dumps(self.describe()).encode()).hexdigest()[:12]

    def dependents(self, name: str) -> tuple[str, ...]:
        """The names of the policies' steps that come after `name`, directly or through other steps."""
        found = [name]
        steps = _ordered((*self.steps, *self.elsewhere))
        found += (step.name for step in steps if not step.discovered and any(before in found for before in step.after))
        return tuple(found[1:])

    def one_file(self) -> list[str]:
        """The names of the steps that keep the same file in every worker: all but one worker's file would be lost."""
        return [
            step.name
            for step in self.steps
            if step.action.keeps
            and step.scope == "worker"
            and WORKER not in str(getattr(step.fields, step.action.keeps))
        ]

    def prepare(self) -> None:
        """Import what the steps will need; raises ConfigError with one line for each policy that fails."""
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
        """Let the steps restore what they kept; gives each step, its text for the log, and whether it succeeded."""
        said = []
        for step in self.steps:
            if step.action.restore is None:
                continue
            try:
                with AppCode():
                    words, done = step.action.restore(app, state, step.fields), True
            except FlaskdError as error:
                words, done = str(error), False
            except Exception as error:  # noqa: BLE001 - another package's action; the app starts all the same
                words, done = f"cannot restore: {error!r}", False
            if words:
                said.append((step, f"cleanup {step.phase}/{step.name}: {step.redact(words)}", done))
        return said

    def describe(self) -> list[dict[str, Any]]:
        """One mapping with stable keys for each step, in order."""
        return [step.describe() for step in self.steps]


def build_plan(cleanup: CleanupConfig, scope: Scope | None = None, *, actions: Mapping[str, Action] = ACTIONS) -> Plan:
    """Make the plan of the enabled policies of a validated configuration; with workers, of those of one `scope`.

    A step that comes after a disabled policy comes after that policy's own predecessors. Raises ConfigError for an
    action that `actions` does not have.
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
    """The step, and before it a step for what its action does in an earlier phase, for example NAME:pause.

    There is no such step if `when.outcome` is set, because in that phase the outcome of the drain is not known.
    """
    first = step.action.first
    if first is None or _ORDER[first.default_phase] >= _ORDER[step.phase] or step.outcome is not None:
        return [step]
    name = f"{step.name}:{first.name.rpartition('.')[2]}"
    return [replace(step, name=name, action=first, phase=first.default_phase, after=()), step]


def with_found(
    plan: Plan, found: Iterable[Found], cleanup: CleanupConfig, actions: Mapping[str, Action] = ACTIONS
) -> Plan:
    """Add what was found to a plan: to policies without a target, and in mode `auto` as one step per other action.

    A policy has precedence: the object that it names is left to it, or all objects of its action if it names none. What
    is excluded is left alone. The added steps have the default timeout and retries; if one fails, the others still run.
    """
    mode, excluded = cleanup.discovery.mode, set(cleanup.discovery.exclude)
    # Compared by identity as well: an object that two modules hold has two names, but discovery reports only one.
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
    """The step for objects that no policy ends; it runs after the policies of its phase, which may still use them."""
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
    """The enabled policies that `name` comes after; in place of a disabled one, those that it comes after."""
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
    """Sort the steps. An `after` that names a later or an unknown step is dropped, so no step waits in vain.

    An `after` that names a step of another process is kept: nothing waits for it here, but `dependents` needs it.
    """
    steps = tuple(steps)
    done: dict[str, Step] = {}
    for phase in Phase:
        of_phase = {step.name: step for step in steps if step.phase is phase}
        for name, _ in in_turn({name: step.after for name, step in of_phase.items()}):
            step = of_phase[name]
            done[name] = replace(step, after=tuple(each for each in step.after if each in done or each in elsewhere))
    return tuple(done.values())
