"""What the cleanup is made of: actions, what is found, steps, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from flaskd.config import REPLACEMENTS, Fields, Phase, Scope
from flaskd.text import Redactor, listed

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


@dataclass(frozen=True)
class StepResult:
    """A step's fate.

    `why` is empty when it is ok; `started` is seconds after the runner was made, `took` seconds over all
    `attempts`; `detail` is what the action said of itself; `trace` the traceback of what it raised, or the
    stack of its thread when it was abandoned; `cut` names the work that it had to throw away.
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
        """Whether it was tried and did not succeed."""
        return self.fate in (Fate.FAILED, Fate.TIMED_OUT)


@dataclass(frozen=True)
class Verdict:
    """What came of one attempt; the fields mean what they mean in `StepResult`."""

    fate: Fate
    why: str = ""
    detail: str = ""
    trace: str = ""
    cut: tuple[str, ...] = ()


@dataclass(frozen=True)
class Action:
    """One thing a policy can do.

    `run` is called in a thread of its own with the context and the validated fields; it returns a short
    detail for the log, or None, and raises to fail. `prepare` imports what `run` will need, when the daemon
    starts or reloads; it raises to refuse the configuration. `grace` is for an action that watches its own
    time: the seconds it may need after its timeout to end what it started (without it, the runner abandons an
    action at its timeout). `restore` is called at the start, before READY, with the Flask app, the state directory
    (None: there is none to use) and the fields; it returns what it did, for the log, and raises to tell that it did
    not. `use_up` is called with the latter two, if it did, once the start has succeeded: what was kept can then be
    marked as used. `fault` is why it cannot be used at all, empty when it can; a policy that uses it is refused with
    these words.

    `needs` are the modules of which one must be installed, with what they are called at the package index.
    `takes` is set for an action on live objects: the action by which discovery finds what a policy without a
    target takes. `first` is what it does in an earlier phase already. `keeps` is the field that names its file under
    the state directory, which must be no other's. `kinds` are those of the objects that discovery finds for it.
    `scopes` are where it can run when there are worker processes, by default in the first of them: "worker", in each,
    and "service", once, in the daemon's own process, for what asks nothing of the app, which is not imported there
    (the context's `app` is None). Without `at_replacement` a worker whose place another one takes does not run it:
    only when the service stops. `summary` is what it does, for people.
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
"""The scopes of an action that asks nothing of the app: once for the service, unless a policy says otherwise."""


DISCOVERED = "found:"
"""What the name of a step begins with that no policy asked for; a policy's name has no colon."""


Outcome = Literal["clean", "degraded"]
"""Whether the drain before the cleanup lost nothing."""


_MOST_NAMED = 4


_RESERVED = frozenset({Phase.FLUSH, Phase.FINAL})


class Reason(Protocol):
    """Why the daemon stops: its `kind`, and the whole of it as text."""

    @property
    def kind(self) -> str:
        """One word, as `when.reason` lists it."""


@dataclass(frozen=True)
class Step:
    """One policy as it will run; `timeout` is in seconds, `reasons` empty for any reason.

    `found` is what discovery found for an action on live objects whose policy names no target; None where it names one,
    or where discovery has not run.
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
    """Hides what was interpolated into its fields."""

    @property
    def discovered(self) -> bool:
        """Whether discovery added it: no policy asks for it."""
        return self.name.startswith(DISCOVERED)

    @property
    def takes(self) -> str:
        """The action by which discovery finds what it ends; empty when it takes nothing that is found."""
        return "" if getattr(self.fields, "target", None) else self.action.takes

    @property
    def reserved(self) -> bool:
        """Whether it may use the time that is kept in reserve."""
        return self.always or self.phase in _RESERVED

    def may_be_wanted(self, reason: str) -> bool:
        """Whether it fits a stop for this reason, whatever comes of the drain."""
        return (not self.reasons or reason in self.reasons) and (self.at_replacement or reason not in REPLACEMENTS)

    @property
    def at_replacement(self) -> bool:
        """Whether it runs, too, when a worker is replaced while the service goes on."""
        return self.scope == "worker" and self.action.at_replacement

    def wanted(self, reason: str, outcome: Outcome) -> bool:
        """Whether it fits this stop."""
        return self.may_be_wanted(reason) and self.outcome in (None, outcome)

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
            "scope": self.scope,
            "at_replacement": self.at_replacement,
            "found": [each.name for each in self.found or ()],
        }

    def notes(self, *, workers: bool = False) -> str:
        """What of it differs from the defaults, for people, and where there are `workers`."""
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
    """The first few names, and how many more."""
    return listed([each.name for each in found], _MOST_NAMED)


def results_as_json(results: Iterable[StepResult]) -> dict[str, dict[str, Any]]:
    """Name → what became of the step.

    The keys are stable; `started` and `took` are float seconds; `why`, `detail` and `trace` are empty for
    none.
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
