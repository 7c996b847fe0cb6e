"""Which new connections are let in: from which listeners, and how many at a time."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator, Sequence

from flaskd.server.aside import Aside
from flaskd.server.connections import Connections
from flaskd.sockets import Listener

log = logging.getLogger("flaskd.server")

_FILES_PAUSE = 0.5
"""Seconds without accepting after the process ran out of files."""
_LIMIT_PAUSE = 0.1
"""Seconds in which clients wait until others leave, or other workers let them in, before room is made for them."""
_MOST_ROOM = 64
"""Connections that are closed at once to make room."""


class Admission:
    """Opens and closes the way in, in the loop's thread."""

    reserved = False
    """Whether new connections may have descriptors of the reserve (`flaskd.process.descriptors`)."""

    def __init__(self, connections: Connections) -> None:
        self.connections = connections
        self.context = connections.context
        self.limit = 0
        """How many connections may be open."""
        self.paused = False
        """Whether new connections wait until there is room for them."""
        self._pause_until = 0.0
        self._said = False
        """Whether the log says that clients wait, and not yet that they do so no more."""
        self.held = False
        """Whether nothing is accepted before `accept` is called: the server is not ready."""
        self.aside: Aside | None = None
        """How connections are left to other workers; None where none accepts from the same listeners."""

    def share(self) -> None:
        """Leave connections to other workers from now on, if they accept from the same listeners."""
        if self.aside is None and any(acceptor.listener.copied for acceptor in self.context.acceptors):
            self.aside = Aside(self.context, lambda: self.paused or self.held)
            self.context.pool.on_place = self.aside.place_free

    def accept(self, *, on: bool) -> None:
        """Wait for new connections on all open listeners, or leave them to wait.

        In a drain those that others share stay closed, except while it is over and they answer with 503.
        """
        context = self.context
        self.held &= not on
        for acceptor in context.acceptors:
            if acceptor.accepting and not (on and context.drains and acceptor.listener.shared and not context.refusing):
                context.poller.listen(acceptor, on=on)

    @property
    def full(self) -> bool:
        """Whether there are as many connections as there may be; then accepting pauses until there are fewer."""
        if not self.paused and self.connections.count >= self.limit:
            self.paused = True
            self.accept(on=False)
            self._pause(_LIMIT_PAUSE if self.aside is not None else 0.0)
        return self.paused

    def _pause(self, seconds: float) -> None:
        self._pause_until = max(self._pause_until, time.monotonic() + seconds)
        self.context.timers.at(self._pause_until, lambda _: None)  # it wakes the loop, which looks for room then

    @contextlib.contextmanager
    def beyond_the_limit(self) -> Iterator[None]:
        """While open, all are let in who wait: the listener is about to be closed, which would reset them."""
        limit, paused = self.limit, self.paused
        self.limit, self.paused = sys.maxsize, False
        try:
            yield
        finally:
            self.limit, self.paused = limit, self.paused or paused

    def out_of_files(self, error: OSError) -> None:
        """Stop accepting for a moment: the process or the machine has no more files to give."""
        if not self.paused:
            self._said = True
            log.error(f"cannot accept connections: {error.strerror}; new ones wait")
        self.paused, self._pause_until = True, time.monotonic() + _FILES_PAUSE
        self.accept(on=False)

    def look_for_room(self, now: float) -> None:
        """End a pause, once there is room; where clients wait, it is made (`Connections.make_room`)."""
        if now < self._pause_until:
            return
        if self.connections.count >= self.limit and not self._make_room():
            self._pause(_LIMIT_PAUSE)
            return
        self.paused = False
        if self._said:
            self._said = False
            log.info("accepting connections again")
        self.accept(on=True)

    def _make_room(self) -> int:
        """Close as many connections as are needed by those that wait, if so many can be; returns how many."""
        waiting = sum(each.listener.callers() for each in self.context.acceptors if each.accepting)
        closed = self.connections.make_room(min(waiting, _MOST_ROOM))
        if waiting and not closed and not self._said:
            self._said = True
            log.warning(f"{self.limit} connections are open, the most there may be; new ones wait")
        return closed

    def refuse(self, *, on: bool) -> None:
        """Answer 503 on the listeners that others share, or leave them alone again."""
        self.context.refusing = on
        for acceptor in self.context.acceptors:
            if acceptor.accepting and acceptor.listener.shared:
                self.context.poller.listen(acceptor, on=on)

    def close_gates(self) -> None:
        """Take no new connections on the listeners that are ours alone, after a drain: what waited was answered."""
        for acceptor in self.context.acceptors:
            if acceptor.accepting and not acceptor.listener.shared and not acceptor.listener.gate():
                acceptor.close_listener()

    def close_listeners(self) -> None:
        """Close the listeners that are ours alone."""
        for acceptor in self.context.acceptors:
            if not acceptor.listener.shared:
                acceptor.close_listener()

    def reopen(self, listeners: Sequence[Listener]) -> None:
        """Accept again, from listeners that stand where the closed ones stood; shared ones were never closed."""
        for acceptor, listener in zip(self.context.acceptors, listeners, strict=True):
            if not acceptor.listener.shared:
                acceptor.reopen(listener)
        self.accept(on=True)
