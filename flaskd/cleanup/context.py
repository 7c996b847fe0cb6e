"""The time that cleanup has, what a running step knows of it, and how a step says that it failed.

All moments are on one monotonic clock; all lengths of time are float seconds.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flaskd.errors import FlaskdError
from flaskd.text import Redactor
from flaskd.units import format_duration
from flaskd.values import value

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from flaskd.cleanup.found import Found
    from flaskd.config import Phase

ENDING_SLACK = 0.1
"""Seconds past the limit in which a step that ends itself can report that, and the last log lines are written."""


ENDING_PATIENCE = 1.0
"""Seconds after its grace in which a step that ends itself can report that, if the limit is further away than that."""


_ENDING = 0.5
"""Seconds before the deadline of a stop at which its steps must be over, so that there is time for the record and the
exit; at most a tenth of the deadline."""


def for_steps(deadline: float, reserve: float) -> tuple[float, float]:
    """The `deadline` and `reserve` of the steps of a stop; the reserve, if any, gives the time for its end."""
    ending = min(_ENDING, deadline / 10)
    return deadline - ending, max(0.0, reserve - ending)


def in_app_context(app: Any) -> AbstractContextManager[Any]:
    """The app's context, in which `current_app` and the extensions work; an empty one if there is no Flask app."""
    return nullcontext() if app is None else app.app_context()


class StepFailedError(FlaskdError):
    """Raised by an action that failed; its message says everything, so no traceback is logged."""


class StepTimedOutError(StepFailedError):
    """Raised by an action that watches its own time (see `Action.grace`). `trace` is the stack of what hangs.

    `cut` names the accepted work that was thrown away; the account of the stop lists it.
    """

    def __init__(self, message: str, trace: str = "", cut: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.trace = trace
        self.cut = cut


_SHARE_OF_THE_DEADLINE, _SHARE_OF_A_HURRY = 1 / 5, 1 / 2
"""The share of all the time that steps marked `always` have if there is no reserve."""


@value
class Times:
    """The time that one process has for a stop, in seconds: its `deadline`, its `reserve` and `kept`.

    `kept` is the part of the reserve that is its own; 0 means the whole reserve.
    """

    deadline: float
    reserve: float
    kept: float = 0.0

    def for_steps(self) -> Times:
        """The time that the steps have: the same, less the time that the end of the stop takes."""
        deadline, reserve = for_steps(self.deadline, self.reserve)
        return Times(deadline, reserve, max(0.0, self.kept - (self.deadline - deadline)))


def divided(deadline: float, reserve: float, *, later: bool) -> tuple[Times, Times]:
    """Divide the time of a stop between the workers and the daemon's own steps, in this order.

    `later` says whether the daemon has steps after the drain. These begin when all workers have ended, and have half of
    the reserve whatever hangs in the workers: the workers' deadline is that much earlier. The workers wait for the
    daemon's steps before the drain; those leave the workers their reserve, unless they are marked `always` themselves.
    """
    pot = reserve or deadline * _SHARE_OF_THE_DEADLINE
    if not later:
        return Times(deadline, reserve), Times(deadline, pot)
    kept = max(pot / 2, 2 * min(_ENDING, deadline / 10))  # the steps of a worker end before the worker
    workers = Times(deadline - kept, reserve / 2)
    return workers, Times(deadline, kept + (workers.reserve or workers.deadline * _SHARE_OF_THE_DEADLINE), kept)


class Budget:
    """The time that all of the cleanup has: an absolute `deadline`, and the `reserve` that ordinary steps may not use.

    `always` is the number of steps that are marked so. Each of them has a share of the reserve for itself (of `kept`,
    if that is above 0), whatever hangs: all other steps end early enough for it, those of the phases flush and final
    and the others marked `always` too.
    """

    def __init__(
        self, deadline: float, reserve: float, clock: Callable[[], float], *, always: int = 0, kept: float = 0.0
    ) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._always = always
        left = max(0.0, deadline - clock())
        # One share more than there are steps, for flush and final.
        share = min(kept or reserve or left * _SHARE_OF_THE_DEADLINE, left) / (always + 1)
        # One tuple, replaced as a whole: so a reader needs no lock and never sees half a change.
        self._now_in_force = (deadline, reserve, clock(), share)

    def now(self) -> float:
        """The present moment on the clock."""
        return self._clock()

    @property
    def deadline(self) -> float:
        """The moment after which nothing may run."""
        return self._now_in_force[0]

    @property
    def since(self) -> float:
        """The moment at which the present deadline was set."""
        return self._now_in_force[2]

    def kept(self, *, reserved: bool, waiting: int) -> float:
        """How many seconds before the deadline a step must end; a `reserved` one may use the reserve.

        `waiting` is the number of steps marked `always` that have not begun.
        """
        _, reserve, _, share = self._now_in_force
        return max(0.0 if reserved else reserve, waiting * share)

    def limit(self, *, reserved: bool, waiting: int = 0) -> float:
        """The last moment at which a step may run; the arguments are those of `kept`."""
        return self.deadline - self.kept(reserved=reserved, waiting=waiting)

    def slack(self, waiting: int) -> float:
        """Seconds past its limit in which a step may end itself, while `waiting` steps still need their shares."""
        return min(ENDING_SLACK, self._now_in_force[3] / 2) if waiting else ENDING_SLACK

    def hurry(self, seconds: float) -> None:
        """Leave `seconds` from now for everything, without a reserve; an earlier deadline stays."""
        with self._lock:
            now = self._clock()
            deadline = min(self.deadline, now + max(0.0, seconds))
            share = max(0.0, deadline - now) * _SHARE_OF_A_HURRY / (self._always + 1)
            self._now_in_force = (deadline, 0.0, now, share)


@dataclass(eq=False)
class StepContext:
    """What an action, or the function of a ``call``, is given.

    `app` is the Flask app, or None. `reason` is the kind of the stop ("signal", "control", …), `reason_text` the whole
    reason. `attempt` counts from 1. `started` is the moment at which this attempt began, `timeout` how many seconds it
    has, `waiting` how many steps marked `always` had not begun at that moment. `state` is the state directory, or None
    if there is none to write to. `found` are the objects that discovery found for it, None if discovery has not run.
    `redact` hides in a text what was interpolated into the fields.

    An action that waits outside of Python sets `on_hurry`, which is called when less time is left than before, and
    `last_resort`, which is called when the runner abandons the step; each in a thread of its own.
    """

    policy: str
    phase: Phase
    reason: str
    reason_text: str
    app: Any
    attempt: int
    started: float
    timeout: float
    reserved: bool
    budget: Budget
    waiting: int = 0
    state: Path | None = None
    found: tuple[Found, ...] | None = field(default=None, repr=False)
    redact: Redactor = field(default_factory=Redactor, repr=False)
    on_hurry: Callable[[], None] | None = field(default=None, repr=False)
    last_resort: Callable[[], None] | None = field(default=None, repr=False)

    @property
    def limit(self) -> float:
        """The moment after which this step may not run, however long its own timeout is."""
        return self.budget.limit(reserved=self.reserved, waiting=self.waiting)

    @property
    def ends(self) -> float:
        """The moment at which this attempt times out."""
        return min(self.started + self.timeout, self.limit)

    @property
    def slack(self) -> float:
        """Seconds past the limit in which a step that ends itself can report that; see `ENDING_SLACK`."""
        return self.budget.slack(self.waiting)

    def remaining(self) -> float:
        """Seconds until this attempt times out, never below 0; less as soon as the stop is hurried."""
        return max(0.0, self.ends - self.budget.now())

    def ends_with(self, grace: float) -> float:
        """The moment at which an ending that takes `grace` seconds must begin.

        That is the moment of the timeout. If the limit comes first, it is `grace` seconds before the limit, so that
        there is time for the ending, but never before half of the time is used.
        """
        since = max(self.started, self.budget.since)
        return min(self.started + self.timeout, max(self.limit - grace, (since + self.limit) / 2))

    def given_up_at(self, grace: float | None) -> float:
        """The moment at which the runner abandons this attempt; `grace` is that of its action, in seconds."""
        if grace is None:
            return self.ends
        return min(self.started + self.timeout + grace + ENDING_PATIENCE, self.limit + self.slack)

    def overrun(self) -> str:
        """Which limit the attempt has reached: its timeout, or the end of the stop's time."""
        if self.started + self.timeout <= self.limit:
            return f"not done within its timeout of {format_duration(self.timeout)}"
        took = format_duration(self.budget.now() - self.started)
        return f"not done after {took}, when the stop's time was used up"
