"""The time that cleanup has, what a running step knows of it, and how a step says that it failed.

All moments are on one monotonic clock, all lengths are float seconds.
"""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flaskd.errors import FlaskdError
from flaskd.text import Redactor
from flaskd.units import format_duration

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from flaskd.cleanup.found import Found
    from flaskd.config import Phase

ENDING_SLACK = 0.1
"""Seconds past the limit in which a step that ends itself may say so, and the last log lines get out."""


ENDING_PATIENCE = 1.0
"""Seconds that a step which ends itself has to say so, where the limit is further away than that."""


_ENDING = 0.5
"""Seconds before the deadline of a stop at which its steps are over, for the record and the exit; never more than a
tenth of the whole."""


def for_steps(deadline: float, reserve: float) -> tuple[float, float]:
    """The `deadline` and `reserve` of a stop, less what its end takes: that is out of the reserve, if there is any."""
    ending = min(_ENDING, deadline / 10)
    return deadline - ending, max(0.0, reserve - ending)


def in_app_context(app: Any) -> AbstractContextManager[Any]:
    """The app's own context, in which `current_app` and the extensions work; nothing where there is no Flask app."""
    return nullcontext() if app is None else app.app_context()


class StepFailedError(FlaskdError):
    """Raised by an action whose message tells all there is to tell; no traceback is logged for it."""


class StepTimedOutError(StepFailedError):
    """Raised by an action that watches its own time (see `Action.grace`); `trace` is a stack of what hangs.

    `cut` names the accepted work that was thrown away, as the account of the stop will have it.
    """

    def __init__(self, message: str, trace: str = "", cut: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.trace = trace
        self.cut = cut


_SHARE_OF_THE_DEADLINE, _SHARE_OF_A_HURRY = 1 / 5, 1 / 2
"""What steps marked `always` have of all the time, where there is no reserve."""


@dataclass(frozen=True)
class Times:
    """What one process has of a stop, in seconds: its `deadline`, its `reserve`, and what of that is its own.

    The latter is `kept`, or the whole reserve where that is 0.
    """

    deadline: float
    reserve: float
    kept: float = 0.0

    def for_steps(self) -> Times:
        """The same for its steps, less what its end takes."""
        deadline, reserve = for_steps(self.deadline, self.reserve)
        return Times(deadline, reserve, max(0.0, self.kept - (self.deadline - deadline)))


def divided(deadline: float, reserve: float, *, later: bool) -> tuple[Times, Times]:
    """What the workers have of a stop, and what the daemon has for its own steps; `later`: it has some after the drain.

    Those begin when all workers have ended, and have half of the reserve whatever hangs there: so much earlier is the
    workers' deadline. Steps of the daemon before the drain, for which workers wait, leave these their
    reserve, unless they are marked `always` themselves.
    """
    pot = reserve or deadline * _SHARE_OF_THE_DEADLINE
    if not later:
        return Times(deadline, reserve), Times(deadline, pot)
    kept = max(pot / 2, 2 * min(_ENDING, deadline / 10))  # a worker's steps end before it does
    workers = Times(deadline - kept, reserve / 2)
    return workers, Times(deadline, kept + (workers.reserve or workers.deadline * _SHARE_OF_THE_DEADLINE), kept)


class Budget:
    """The time all of cleanup has: an absolute `deadline`, and the `reserve` kept from ordinary steps.

    `always` is the number of steps that are marked so. Whatever hangs, each has a share of the reserve for itself (of
    `kept`, if that is above 0): all that runs before it ends early enough for that, flush, final and others marked
    `always` too.
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
        # One tuple, replaced as a whole: a reader without the lock never sees half a change.
        self._now_in_force = (deadline, reserve, clock(), share)

    def now(self) -> float:
        """The present moment."""
        return self._clock()

    @property
    def deadline(self) -> float:
        """The moment past which nothing may run."""
        return self._now_in_force[0]

    @property
    def since(self) -> float:
        """The moment from which the present deadline is in force."""
        return self._now_in_force[2]

    def kept(self, *, reserved: bool, waiting: int) -> float:
        """Seconds before the deadline that a step may not use; one that is `reserved` may use the reserve.

        `waiting` is how many steps marked `always` have not begun yet.
        """
        _, reserve, _, share = self._now_in_force
        return max(0.0 if reserved else reserve, waiting * share)

    def limit(self, *, reserved: bool, waiting: int = 0) -> float:
        """The last moment of a step; see `kept`."""
        return self.deadline - self.kept(reserved=reserved, waiting=waiting)

    def slack(self, waiting: int) -> float:
        """Seconds past its limit that a step may use to end itself, when `waiting` steps still have their shares."""
        return min(ENDING_SLACK, self._now_in_force[3] / 2) if waiting else ENDING_SLACK

    def hurry(self, seconds: float) -> None:
        """Leave `seconds` from now for everything, without a reserve; a deadline that is nearer stays."""
        with self._lock:
            now = self._clock()
            deadline = min(self.deadline, now + max(0.0, seconds))
            share = max(0.0, deadline - now) * _SHARE_OF_A_HURRY / (self._always + 1)
            self._now_in_force = (deadline, 0.0, now, share)


@dataclass(eq=False)
class StepContext:
    """What an action, or the function of a ``call``, is given: who asks, why, for which app, for how long.

    `app` is the Flask app, or None; `reason` the kind of the stop ("signal", "control", …), `reason_text` the
    whole of it; `attempt` counts from 1; `started` is the moment this attempt began and `timeout` its
    seconds; `waiting` is how many steps marked `always` had not begun by then; `state` is the state directory,
    None where there is none to write to; `found` what discovery found for it, None where discovery has not run;
    `redact` hides in a text what was interpolated into its fields.

    An action that waits outside Python sets `on_hurry`, called when less time is left than before, and
    `last_resort`, called when the runner abandons the step; each in a thread of its own.
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
        """The moment past which this step may do nothing, however long its own timeout."""
        return self.budget.limit(reserved=self.reserved, waiting=self.waiting)

    @property
    def ends(self) -> float:
        """The moment at which this attempt has timed out."""
        return min(self.started + self.timeout, self.limit)

    @property
    def slack(self) -> float:
        """Seconds past the limit in which a step that ends itself may say so; see `ENDING_SLACK`."""
        return self.budget.slack(self.waiting)

    def remaining(self) -> float:
        """Seconds until this attempt times out, never below 0; a hurried stop shrinks it at once."""
        return max(0.0, self.ends - self.budget.now())

    def ends_with(self, grace: float) -> float:
        """The moment to begin an ending that takes `grace` seconds.

        That is the timeout; where the limit comes first, `grace` before the limit, so that the ending fits
        too, but never before half of the time is used.
        """
        since = max(self.started, self.budget.since)
        return min(self.started + self.timeout, max(self.limit - grace, (since + self.limit) / 2))

    def given_up_at(self, grace: float | None) -> float:
        """The moment at which the runner abandons this attempt, `grace` being that of its action."""
        if grace is None:
            return self.ends
        return min(self.started + self.timeout + grace + ENDING_PATIENCE, self.limit + self.slack)

    def overrun(self) -> str:
        """Say which of its limits the attempt met."""
        if self.started + self.timeout <= self.limit:
            return f"not done within its timeout of {format_duration(self.timeout)}"
        took = format_duration(self.budget.now() - self.started)
        return f"not done after {took}, when the stop's time was used up"
