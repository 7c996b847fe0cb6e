"""The daemon's inbox: what happens or is asked for, as values that one thread takes one after the other."""

from __future__ import annotations

import heapq
import itertools
import queue
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from flaskd.lifecycle import StopReason
from flaskd.process.exit import Unfinished
from flaskd.protocol import Discard, Reply
from flaskd.readings import ReadingOver
from flaskd.serving.api import ServingEvent


@dataclass(frozen=True)
class Asked:
    """Somebody waits for the outcome in `reply`."""

    reply: Reply = field(default_factory=Discard, kw_only=True, repr=False)


@dataclass(frozen=True)
class DrainAsked(Asked):
    """Take no new work; with `wait` the reply comes when the drain is over. `by` is who asks, for people."""

    wait: bool = False
    by: str = ""


@dataclass(frozen=True)
class ResumeAsked(Asked):
    """Serve again."""


@dataclass(frozen=True)
class ReloadAsked(Asked):
    """Read the configuration anew; the reply comes after it.

    `since` is the time.monotonic() moment at which it was asked for. `signalled`: by SIGHUP, for which a service
    manager waits (Type=notify-reload). `only_configuration`: workers, where there are any, are not replaced.
    """

    since: float = field(default_factory=time.monotonic)
    signalled: bool = False
    only_configuration: bool = False


@dataclass(frozen=True)
class ScaleAsked(Asked):
    """Have so many workers; the reply comes when the new ones are ready."""

    count: int


@dataclass(frozen=True)
class RestartAsked(Asked):
    """Replace the worker of one slot, or of all; the reply comes when the new ones are ready."""

    slot: int | None = None


@dataclass(frozen=True)
class StopAsked(Asked):
    """Stop; `now` cuts drain and cleanup short, with `wait` the reply comes at the very end.

    `within`: it has so many seconds, so many of them in reserve, and is announced for so many, where that is less than
    the configuration says.
    """

    reason: StopReason
    wait: bool = False
    now: bool = False
    within: tuple[float, float, float] | None = None


@dataclass(frozen=True)
class FileChanged:
    """The configuration file has another content, of this digest."""

    digest: str


@dataclass(frozen=True)
class IdleOver:
    """Nothing that counts was asked for as long as `shutdown.idle.after` says."""


@dataclass(frozen=True)
class Raised:
    """Code of the app raised this in the main thread."""

    error: BaseException


@dataclass(frozen=True)
class ExitBegan:
    """What the app has left to the end of the process has its time now; `left` gives the seconds of it."""

    left: Callable[[], float]


@dataclass(frozen=True)
class ExitOver:
    """That time is over; what is `unfinished` was cut, and then the main thread is in it for good."""

    unfinished: tuple[Unfinished, ...] = ()
    cut: bool = False


@dataclass(frozen=True)
class ReadingLate:
    """A reading of the configuration has had its time, if it is not over."""


@dataclass(frozen=True)
class PulseDue:
    """The service manager is to hear that the thread of the events turns."""


@dataclass(frozen=True)
class Tick:
    """A second of a drain or stop is over."""


Wish = DrainAsked | ResumeAsked | ReloadAsked | StopAsked | ScaleAsked | RestartAsked
"""What is asked for."""

InboxEvent = (
    Wish
    | FileChanged
    | ReadingOver
    | ReadingLate
    | IdleOver
    | Raised
    | ExitBegan
    | ExitOver
    | PulseDue
    | Tick
    | ServingEvent
)


class Inbox:
    """Events from all threads, and those that its owner has put off."""

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[InboxEvent] = queue.SimpleQueue()
        self._later: list[tuple[float, int, InboxEvent]] = []
        self._numbers = itertools.count()

    def post(self, event: InboxEvent) -> None:
        """Put an event in (any thread, any signal handler)."""
        self._events.put(event)

    def post_at(self, moment: float, event: InboxEvent) -> None:
        """Put an event in at a time.monotonic() moment; its owner alone."""
        heapq.heappush(self._later, (moment, next(self._numbers), event))

    def take(self) -> InboxEvent:
        """Wait for the next event; its owner alone."""
        while True:
            left = self._later[0][0] - time.monotonic() if self._later else None
            if left is not None and left <= 0:
                return heapq.heappop(self._later)[2]
            try:
                return self._events.get(timeout=left)
            except queue.Empty:  # what was put off is due
                continue

    def rest(self) -> list[InboxEvent]:
        """Take all that is in it without waiting, for an owner that takes no more."""
        found = []
        while True:
            try:
                found.append(self._events.get_nowait())
            except queue.Empty:
                return found
