"""The daemon's inbox: events and requests as values, which one thread takes one after the other."""

from __future__ import annotations

import heapq
import itertools
import queue
import time
from collections.abc import Callable
from dataclasses import field

from flaskd.lifecycle import StopReason
from flaskd.process.exit import Unfinished
from flaskd.protocol import Discard, Reply
from flaskd.readings import ReadingOver
from flaskd.serving.api import ServingEvent
from flaskd.values import value


@value
class Asked:
    """A request whose outcome goes to `reply`."""

    reply: Reply = field(default_factory=Discard, kw_only=True, repr=False)


@value
class DrainAsked(Asked):
    """Drain; with `wait` the reply comes when the drain is over. `by` says who asked, as text for people."""

    wait: bool = False
    by: str = ""


@value
class ResumeAsked(Asked):
    """Serve again after a drain."""


@value
class ReloadAsked(Asked):
    """Read the configuration again; the reply comes after the reload.

    `since` is the time.monotonic() moment at which it was asked for. `signalled`: by SIGHUP, on which a service manager
    waits (Type=notify-reload). `only_configuration`: workers, if there are any, are not replaced.
    """

    since: float = field(default_factory=time.monotonic)
    signalled: bool = False
    only_configuration: bool = False


@value
class ScaleAsked(Asked):
    """Run `count` workers; the reply comes when the new ones are ready."""

    count: int


@value
class RestartAsked(Asked):
    """Replace the worker of one slot, or all workers; the reply comes when the new ones are ready."""

    slot: int | None = None


@value
class StopAsked(Asked):
    """Stop; `now` cuts drain and cleanup short. With `wait` the reply comes at the very end.

    `within` are the deadline, the reserve and the announce time in seconds, used if they are less than the
    configuration's.
    """

    reason: StopReason
    wait: bool = False
    now: bool = False
    within: tuple[float, float, float] | None = None


@value
class FileChanged:
    """The configuration file has new content, with this digest."""

    digest: str


@value
class IdleOver:
    """For `shutdown.idle.after` there was no request that counts."""


@value
class Raised:
    """The app's code raised this exception in the main thread."""

    error: BaseException


@value
class ExitBegan:
    """The app's exit callbacks and threads have their time now; `left` gives the remaining seconds."""

    left: Callable[[], float]


@value
class ExitOver:
    """That time is over. `unfinished` is what was not done; with `cut` the main thread still hangs in it."""

    unfinished: tuple[Unfinished, ...] = ()
    cut: bool = False


@value
class ReadingLate:
    """The time for reading the configuration is over, in case that still runs."""


@value
class PulseDue:
    """The service manager is to be told that the events thread works."""


@value
class Tick:
    """Another second of a drain or stop has passed."""


Wish = DrainAsked | ResumeAsked | ReloadAsked | StopAsked | ScaleAsked | RestartAsked
"""All requests."""

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
    """Events from all threads, and events that the owner has scheduled."""

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[InboxEvent] = queue.SimpleQueue()
        self._later: list[tuple[float, int, InboxEvent]] = []
        self._numbers = itertools.count()

    def post(self, event: InboxEvent) -> None:
        """Add an event; any thread and any signal handler may call this."""
        self._events.put(event)

    def post_at(self, moment: float, event: InboxEvent) -> None:
        """Schedule an event for a time.monotonic() moment; only the owner may call this."""
        heapq.heappush(self._later, (moment, next(self._numbers), event))

    def take(self) -> InboxEvent:
        """Wait for the next event; only the owner may call this."""
        while True:
            left = self._later[0][0] - time.monotonic() if self._later else None
            if left is not None and left <= 0:
                return heapq.heappop(self._later)[2]
            try:
                return self._events.get(timeout=left)
            except queue.Empty:  # a scheduled event is due
                continue

    def rest(self) -> list[InboxEvent]:
        """Take all events without waiting, because the owner ends."""
        found = []
        while True:
            try:
                found.append(self._events.get_nowait())
            except queue.Empty:
                return found
