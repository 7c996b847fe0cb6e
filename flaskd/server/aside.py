"""How workers share a listener: each takes one connection at a time, and leaves it to others while it is busy."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from flaskd.server.context import Context
from flaskd.server.timers import NEVER

ASIDE = 0.02
"""Seconds in which a worker that is idle may take a connection, before one that is busy does."""
_MORE = 0.002
"""The same while more wait than one that is busy takes at once: no worker is idle then."""


class Aside:
    """Leaves the listeners that other workers accept from, too, while all places of this one are taken.

    After `ASIDE` seconds it takes what waits there, at most as many connections as there are places: their requests
    wait for a place here, as all other workers are busy, too; and the health path is answered. When there were more, it
    comes back soon: how long they wait can be limited here, and not in the kernel. Is nothing there, it waits for
    connections again, and when one comes, an idle worker has the same time to take it. As soon as a place is free,
    connections are accepted at once.
    """

    def __init__(self, context: Context, paused: Callable[[], bool]) -> None:
        self.next_moment = NEVER
        """The time.monotonic() moment at which `look` has something to do."""
        self._context = context
        self._pool = context.pool
        self._paused = paused
        """Whether no connections are accepted, for another reason."""
        self._away = False
        """Whether the listeners are left alone."""
        self._watches = False
        """Whether they are not, though all places are taken."""
        self._lock = threading.Lock()
        """Held when the poller is told."""

    @property
    def _acceptors(self) -> list[Any]:
        return [each for each in self._context.acceptors if each.listener.copied and each.accepting]

    def look(self, now: float) -> None:
        """Step aside where all places are taken, or end that (the thread that leads, before it waits)."""
        if self._away:
            if now < self.next_moment:
                return
            self._come_back(watches=True)
            acceptors = [] if self._paused() else self._acceptors
            most = max(1, self._pool.size)
            taken = [each.accept_some(most) for each in acceptors]
            if any(taken) and self._pool.full:
                self.step(now, _MORE if most in taken else ASIDE)
        elif not self._watches and self._pool.full:
            self.step(now, ASIDE)

    def steps(self) -> bool:
        """Whether it leaves the connection that has come to others first (the thread that leads)."""
        return self._pool.full and self.step(time.monotonic(), ASIDE)

    def step(self, now: float, seconds: float) -> bool:
        """Leave the listeners alone for so long, unless a place is free by now; whether it does."""
        with self._lock:
            self._away, self._watches = True, False  # first: a place may become free in this moment
            if not self._pool.full:
                self._away = False
                return False
            self.next_moment = now + seconds
            for acceptor in self._acceptors:
                self._context.poller.listen(acceptor, on=False)
        return True

    def end(self) -> None:
        """Accept as if the listeners were not copied, until the next `look` (the thread that leads)."""
        self._come_back(watches=False)

    def place_free(self) -> None:
        """Accept again at once, if a place is free (any thread)."""
        if (self._away or self._watches) and not self._pool.full:
            self._come_back(watches=False)

    def _come_back(self, *, watches: bool) -> None:
        with self._lock:
            self._watches = watches
            if self._away:
                self._away, self.next_moment = False, NEVER
                for acceptor in () if self._paused() else self._acceptors:
                    self._context.poller.listen(acceptor, on=True)
