"""Which new connections are accepted: from which listeners, and how many may be open at once."""

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
"""Seconds for which nothing is accepted after the process ran out of file descriptors."""
_LIMIT_PAUSE = 0.1
"""Seconds that new clients wait at the connection limit before other connections are closed to make room for them.

Meanwhile other clients may leave, or other workers may accept the new ones."""
_MOST_ROOM = 64
"""Most connections that are closed at once to make room."""


class Admission:
    """Starts, pauses and ends accepting on all listeners; all methods run in the loop's thread."""

    reserved = False
    """Whether new connections may use the reserve of descriptors (`flaskd.process.descriptors`)."""

    def __init__(self, connections: Connections) -> None:
        self.connections = connections
        self.context = connections.context
        self.limit = 0
        """How many connections may be open."""
        self.paused = False
        """Whether accepting has stopped until there is room for new connections."""
        self._pause_until = 0.0
        self._said = False
        """Whether the log says that new connections wait, and does not yet say that this is over."""
        self.held = False
        """Whether nothing is accepted until `accept` is called, because the server is not ready."""
        self.aside: Aside | None = None
        """Leaves connections to other workers; None where no other worker accepts from the same listeners."""

    def share(self) -> None:
        """Leave connections to other workers from now on, if they accept from the same listeners."""
        if self.aside is None and any(acceptor.listener.copied for acceptor in self.context.acceptors):
            self.aside = Aside(self.context, lambda: self.paused or self.held)
            self.context.pool.on_place = self.aside.place_free

    def accept(self, *, on: bool) -> None:
        """Start or stop accepting on all open listeners.

        During a drain, nothing is accepted from listeners that are shared with other processes; once the drain is
        over, connections are accepted from them if they are to be answered with 503.
        """
        context = self.context
        self.held &= not on
        for acceptor in context.acceptors:
            if acceptor.accepting and not (on and context.drains and acceptor.listener.shared and not context.refusing):
                context.poller.listen(acceptor, on=on)

    @property
    def full(self) -> bool:
        """Whether the connection limit is reached; if so, accepting pauses until there are fewer connections."""
        if not self.paused and self.connections.count >= self.limit:
            self.paused = True
            self.accept(on=False)
            self._pause(_LIMIT_PAUSE if self.aside is not None else 0.0)
        return self.paused

    def _pause(self, seconds: float) -> None:
        self._pause_until = max(self._pause_until, time.monotonic() + seconds)
        self.context.timers.at(self._pause_until, lambda _: None)  # wakes the loop, which then calls look_for_room

    @contextlib.contextmanager
    def beyond_the_limit(self) -> Iterator[None]:
        """Accept all waiting connections, whatever the limit: closing their listener, which comes next, resets them."""
        limit, paused = self.limit, self.paused
        self.limit, self.paused = sys.maxsize, False
        try:
            yield
        finally:
            self.limit, self.paused = limit, self.paused or paused

    def out_of_files(self, error: OSError) -> None:
        """Stop accepting for `_FILES_PAUSE` seconds: the process or the machine has no more descriptors or memory."""
        if not self.paused:
            self._said = True
            log.error(f"cannot accept connections: {error.strerror}; new connections wait")
        self.paused, self._pause_until = True, time.monotonic() + _FILES_PAUSE
        self.accept(on=False)

    def look_for_room(self, now: float) -> None:
        """End a pause once there is room; if clients wait, make room for them (`Connections.make_room`)."""
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
        """Close up to as many connections as clients wait for; returns how many were closed."""
        waiting = sum(each.listener.callers() for each in self.context.acceptors if each.accepting)
        closed = self.connections.make_room(min(waiting, _MOST_ROOM))
        if waiting and not closed and not self._said:
            self._said = True
            log.warning(f"{self.limit} connections are open, which is the limit; new connections wait")
        return closed

    def refuse(self, *, on: bool) -> None:
        """Answer 503 on the listeners that other processes share, or stop accepting from them again."""
        self.context.refusing = on
        for acceptor in self.context.acceptors:
            if acceptor.accepting and acceptor.listener.shared:
                self.context.poller.listen(acceptor, on=on)

    def close_gates(self) -> None:
        """After a drain, take no new connections on the listeners of this process alone; what waited was answered."""
        for acceptor in self.context.acceptors:
            if acceptor.accepting and not acceptor.listener.shared and not acceptor.listener.gate():
                acceptor.close_listener()

    def close_listeners(self) -> None:
        """Close the listeners that no other process shares."""
        for acceptor in self.context.acceptors:
            if not acceptor.listener.shared:
                acceptor.close_listener()

    def reopen(self, listeners: Sequence[Listener]) -> None:
        """Accept again, from new listeners in the order of the closed ones; shared ones were never closed."""
        for acceptor, listener in zip(self.context.acceptors, listeners, strict=True):
            if not acceptor.listener.shared:
                acceptor.reopen(listener)
        self.accept(on=True)
