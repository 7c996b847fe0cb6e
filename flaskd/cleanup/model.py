"""The data of the cleanup: actions, steps, and the results of steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from flaskd.config import REPLACEMENTS, Fields, Phase, Scope
from flaskd.text import Redactor, listed
from flaskd.values import value

if TYPE_CHECKING:
    from flaskd.cleanup.context import StepContext
    from flaskd.cleanup.found import Found
    from flaskd.cleanup.kinds import Kind


class Fate(StrEnum):
    """What became of a step."""

    OK = "ok"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    SKIPPED = "skipped"


@value
class StepResult:
    """The result of a step.

    `why` is empty if the fate is OK. `started` is in seconds after the runner was made; `took` is the seconds that all
    `attempts` took together. `detail` is the text that the action returned. `trace` is the traceback of the exception,
    or the stack of the step's thread if the step was abandoned. `cut` names the accepted work that the step threw away.
    """

    name: str
    phase: str
    use: str
    fate: Fate
    why: str = ""
    started: float = 0.0
    took: float = 0.0
    attempts: int = 0
    detail: str = ""
    trace: str = ""
    cut: tuple[str, ...] = ()

    @property
    def broken(self) -> bool:
        """Whether the step ran and did not succeed."""
        return self.fate in (Fate.FAILED, Fate.TIMED_OUT)


@value
class Verdict:
    """The result of one attempt; the fields mean the same as in `StepResult`."""

    fate: Fate
    why: str = ""
    detail: str = ""
    trace: str = ""
    cut: tuple[str, ...] = ()


@dataclass(frozen=True)
class Action:
    """One thing a policy can do.

    `run(context, fields)` is called in a thread of its own; it returns a short text for the log or None, and raises to
    fail. `prepare(fields)` imports what `run` will need when the daemon starts or reloads; it raises to refuse the
    configuration. `grace(fields)` is for an action that watches its own time: how many seconds after its timeout it may
    need to end what it started (without `grace`, the runner abandons the step at its timeout). `restore(app, state
    directory or None, fields)` is called at the start, before READY; it returns what it did, for the log, and raises if
    it could not. `use_up(state directory or None, fields)` is called once the start has succeeded, if `restore` did, so
    that it can mark what was restored as used. `fault` says why the action cannot be used; a policy that uses it is
    refused with these words. It is empty if the action can be used.

    `needs` maps modules, one of which must be installed, to their names in the package index. `takes` is set for an
    action on live objects: the name of the action for which discovery finds objects if the policy names no target.
    `first` is an action that runs before it, in an earlier phase. `keeps` is the name of the field that holds the path
    of its file under the state directory; no two policies may use the same path. `kinds` are the kinds of objects that
    discovery finds for it. `scopes` say where it can run if there are worker processes; the first one is the default:
    "worker" is in each worker, "service" is once, in the daemon's own process. The daemon has not imported the app, so
    "service" is for actions that do not need it (the context's `app` is None). If `at_replacement` is false, a worker
    that is replaced does not run it: it runs only when the service stops. `summary`
    says what it does, for people.
    """

    name: str
    fields: type[Fields]
    default_phase: Phase
    run: Callable[[StepContext, Any], str | None]
    prepare: Callable[[Any], None] | None = None
    grace: Callable[[Any], float] | None = None
    restore: Callable[[Any, Path | None, Any], str] | None = None
    use_up: Callable[[Path | None, Any], None] | None = None
    fault: str = ""
    needs: Mapping[str, str] = field(default_factory=dict)
    takes: str = ""
    first: Action | None = None
    keeps: str = ""
    kinds: tuple[Kind, ...] = ()
    scopes: tuple[Scope, ...] = ("worker",)
    at_replacement: bool = True
    summary: str = ""


ANYWHERE: tuple[Scope, ...] = ("service", "worker")
"""The scopes of an action that does not need the app: by default it runs once, for the service."""


DISCOVERED = "found:"
"""How the names of the steps begin that discovery added. A policy's name has no colon."""


Outcome = Literal["clean", "degraded"]
"""Clean: the drain before the cleanup lost nothing. Degraded: it lost something."""


_MOST_NAMED = 4


_RESERVED = frozenset({Phase.FLUSH, Phase.FINAL})


class Reason(Protocol):
    """Why the daemon stops; ``str()`` gives the whole reason as text."""

    @property
    def kind(self) -> str:
        """One of the words that `when.reason` accepts."""


@value
class Step:
    """One policy, ready to run. `timeout` is in seconds; with empty `reasons` the step runs for any reason.

    `found` are the objects that discovery found for an action on live objects whose policy names no target. It is None
    if the policy names a target, or if discovery has not run.
    """

    name: str
    action: Action
    fields: Fields
    phase: Phase
    timeout: float
    retries: int = 0
    on_failure: Literal["continue", "skip_dependents", "abort"] = "continue"
    after: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    outcome: Outcome | None = None
    always: bool = False
    found: tuple[Found, ...] | None = None
    scope: Scope = "worker"
    redact: Redactor = field(default_factory=Redactor, repr=False, compare=False)
    """Hides the secrets that were interpolated into its fields."""

    @property
    def discovered(self) -> bool:
        """Whether discovery added the step, and not a policy."""
        return self.name.startswith(DISCOVERED)

    @property
    def takes(self) -> str:
        """The action for which discovery finds the objects that the step ends; empty if it takes no found ones."""
        return "" if getattr(self.fields, "target", None) else self.action.takes

    @property
    def reserved(self) -> bool:
        """Whether the step may use the time that is kept in reserve."""
        return self.always or self.phase in _RESERVED

    def may_be_wanted(self, reason: str) -> bool:
        """Whether the step fits a stop for this reason; the outcome of the drain is not looked at."""
        return (not self.reasons or reason in self.reasons) and (self.at_replacement or reason not in REPLACEMENTS)

    @property
    def at_replacement(self) -> bool:
        """Whether the step also runs when a worker is replaced while the service goes on."""
        return self.scope == "worker" and self.action.at_replacement

    def wanted(self, reason: str, outcome: Outcome) -> bool:
        """Whether the step fits a stop for this reason, after a drain with this outcome."""
        return self.may_be_wanted(reason) and self.outcome in (None, outcome)

    def describe(self) -> dict[str, Any]:
        """Stable keys for programs. The action's own fields are left out, because they may hold secrets."""
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
            "scope": self.scope,
            "at_replacement": self.at_replacement,
            "found": [each.name for each in self.found or ()],
        }

    def notes(self, *, workers: bool = False) -> str:
        """How the step differs from the defaults, for people; `workers` says whether there are worker processes."""
        return "; ".join(
            note
            for said, note in (
                (self.after and not self.discovered, f"after {', '.join(self.after)}"),
                (self.always, "always"),
                (self.on_failure != "continue", f"on failure {self.on_failure.replace('_', ' ')}"),
                (self.retries, f"{self.retries} {'retry' if self.retries == 1 else 'retries'}"),
                (self.reasons, f"when reason is {' or '.join(self.reasons)}"),
                (self.outcome, f"when outcome is {self.outcome}"),
                (workers and self.scope == "worker" and not self.at_replacement, "only when the service stops"),
                (self.found, names(self.found or ())),
            )
            if said
        )


def names(found: Sequence[Found]) -> str:
    """The first few names, and how many more there are."""
    return listed([each.name for each in found], _MOST_NAMED)


def results_as_json(results: Iterable[StepResult]) -> dict[str, dict[str, Any]]:
    """The result of each step by the step's name, under stable keys.

    `started` and `took` are in seconds; `why`, `detail` and `trace` are empty strings if there is nothing to say.
    """
    return {
        each.name: {
            "phase": each.phase,
            "use": each.use,
            "fate": str(each.fate),
            "why": each.why,
            "started": round(each.started, 3),
            "took": round(each.took, 3),
            "attempts": each.attempts,
            "detail": each.detail,
            "trace": each.trace,
            **({"cut": list(each.cut)} if each.cut else {}),
        }
        for each in results
    }
