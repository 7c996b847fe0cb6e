"""The time that cleanup has, what a running step knows of it, and how a step says that it failed.

All moments are on one monotonic clock, all lengths are float seconds.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flaskd.errors import FlaskdError
from flaskd.units import format_duration

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from flaskd.cleanup.discovery import Found
    from flaskd.config import Phase

ENDING_SLACK = 0.1
"""Seconds past the limit in which a step that ends itself may say so, and the last log lines get out."""


ENDING_PATIENCE = 1.0
"""Seconds that a step which ends itself has to say so, where the limit is further away than that."""


class StepFailedError(FlaskdError):
    """Raised by an action whose message tells all there is to tell; no traceback is logged for it."""


class StepTimedOutError(StepFailedError):
    """Raised by an action that watches its own time (see `Action.grace`); `trace` is a stack of what hangs."""

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message)
        self.trace = trace


class Budget:
    """The time all of cleanup has: an absolute `deadline`, and the `reserve` kept from ordinary steps."""

    def __init__(self, deadline: float, reserve: float, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        # One tuple, replaced as a whole: whoever reads it without the lock never sees half a change.
        self._now_in_force = (deadline, reserve, clock())

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

    def limit(self, *, reserved: bool) -> float:
        """The last moment of a step; one that is `reserved` may use the reserve too."""
        deadline, reserve, _ = self._now_in_force
        return deadline if reserved else deadline - reserve

    def hurry(self, seconds: float) -> None:
        """Leave `seconds` from now for everything, without a reserve; a deadline that is nearer stays."""
        with self._lock:
            now = self._clock()
            self._now_in_force = (min(self.deadline, now + max(0.0, seconds)), 0.0, now)


@dataclass(eq=False)
class StepContext:
    """What an action, or the function of a ``call``, is given: who asks, why, for which app, for how long.

    `app` is the Flask app, or None; `reason` the kind of the stop ("signal", "control", …), `reason_text` the
    whole of it; `attempt` counts from 1; `started` is the moment this attempt began and `timeout` its
    seconds; `state` is the state directory, None where there is none to write to; `found` what discovery found for it,
    None where nobody has looked.

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
    state: Path | None = None
    found: tuple[Found, ...] | None = field(default=None, repr=False)
    on_hurry: Callable[[], None] | None = field(default=None, repr=False)
    last_resort: Callable[[], None] | None = field(default=None, repr=False)

    @property
    def limit(self) -> float:
        """The moment past which this step may do nothing, however long its own timeout."""
        return self.budget.limit(reserved=self.reserved)

    @property
    def ends(self) -> float:
        """The moment at which this attempt has timed out."""
        return min(self.started + self.timeout, self.limit)

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
        return min(self.started + self.timeout + grace + ENDING_PATIENCE, self.limit + ENDING_SLACK)

    def overrun(self) -> str:
        """Say which of its limits the attempt met."""
        if self.started + self.timeout <= self.limit:
            return f"not done within its timeout of {format_duration(self.timeout)}"
        took = format_duration(self.budget.now() - self.started)
        return f"not done after {took}, when the stop's time was used up"
