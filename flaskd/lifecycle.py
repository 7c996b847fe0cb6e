"""The life cycle: the states, the events, and the one table that says which event leads to which state.

Only the events thread calls `Lifecycle.handle`; all other threads post events to it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from flaskd.errors import NotNowError


class State(StrEnum):
    """The state of the daemon."""

    STARTING = "starting"
    READY = "ready"
    RELOADING = "reloading"
    DRAINING = "draining"
    DRAINED = "drained"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


class Event(StrEnum):
    """What can happen to the daemon; the first four are asked for by a client or signal."""

    DRAIN = "drain"
    RESUME = "resume"
    RELOAD = "reload"
    STOP = "stop"
    STARTED = "started"
    START_FAILED = "start failed"
    RELOADED = "reloaded"
    DRAIN_OVER = "drain over"
    STOP_OVER = "stop over"


_S, _E = State, Event

TABLE: dict[tuple[State, Event], State] = {
    (_S.STARTING, _E.STARTED): _S.READY,
    (_S.STARTING, _E.START_FAILED): _S.FAILED,
    (_S.STARTING, _E.STOP): _S.STOPPING,
    (_S.READY, _E.RELOAD): _S.RELOADING,
    (_S.READY, _E.DRAIN): _S.DRAINING,
    (_S.READY, _E.RESUME): _S.READY,
    (_S.READY, _E.STOP): _S.STOPPING,
    (_S.RELOADING, _E.RELOAD): _S.RELOADING,
    (_S.RELOADING, _E.RELOADED): _S.READY,
    (_S.RELOADING, _E.DRAIN): _S.DRAINING,
    (_S.RELOADING, _E.STOP): _S.STOPPING,
    (_S.DRAINING, _E.DRAIN): _S.DRAINING,
    (_S.DRAINING, _E.DRAIN_OVER): _S.DRAINED,
    (_S.DRAINING, _E.RESUME): _S.READY,
    (_S.DRAINING, _E.STOP): _S.STOPPING,
    (_S.DRAINED, _E.DRAIN): _S.DRAINED,
    (_S.DRAINED, _E.RESUME): _S.READY,
    (_S.DRAINED, _E.STOP): _S.STOPPING,
    (_S.STOPPING, _E.STOP): _S.STOPPING,
    (_S.STOPPING, _E.DRAIN_OVER): _S.STOPPING,
    (_S.STOPPING, _E.STOP_OVER): _S.STOPPED,
}
"""(state, event) → next state. An event that has no entry for a state is refused."""


class Lifecycle:
    """The current state and when it began; `handle` is the only way to change it.

    `since` is wall-clock time (Unix time) for people; ages come from the monotonic clock, which is never set.
    """

    def __init__(self) -> None:
        self.state = State.STARTING
        self.since = time.time()
        self._began = self._entered = time.monotonic()

    @property
    def age(self) -> float:
        """Seconds in the current state."""
        return time.monotonic() - self._entered

    @property
    def uptime(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began

    def check(self, event: Event) -> State:
        """The state to which an event would lead; raises NotNowError "cannot X: flaskd is Y" if it is refused."""
        following = TABLE.get((self.state, event))
        if following is None:
            raise NotNowError(f"cannot {event}: flaskd is {self.state}")
        return following

    def handle(self, event: Event) -> State:
        """Change the state for an event and return the new one; raises like `check`."""
        following = self.check(event)
        if following is not self.state:
            self.state, self.since, self._entered = following, time.time(), time.monotonic()
        return following


@dataclass(frozen=True)
class StopReason:
    """Why flaskd stops; the first reason is kept.

    A worker also stops when another one replaces it while the service goes on: after a `reload`, or for another cause
    (`recycle`).
    """

    kind: Literal["signal", "control", "endpoint", "idle", "failure", "reload", "recycle"]
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"
