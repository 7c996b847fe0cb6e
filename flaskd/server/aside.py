"""How workers share a listener: each accepts one connection at a time, and none while all its places are taken."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from flaskd.server.context import Context
from flaskd.server.timers import NEVER

ASIDE = 0.02
"""Seconds that a busy worker leaves new connections to idle workers, before it accepts them itself."""
_MORE = 0.002
"""The same after a busy worker has found more waiting connections than it takes at once: then no worker is idle."""


class Aside:
    """Stops accepting from shared listeners while all places of this worker are taken, so that other workers do.

    `ASIDE` seconds later this worker accepts the connections that still wait, at most as many as it has places: all
    other workers are busy, too, so the requests wait for a place here, where `queue_timeout` limits their wait, which
    nothing does in the kernel; and the health path is answered. If there were more, it looks again after `_MORE`
    seconds. If there were none, it listens again, and leaves the next connection to idle workers for `ASIDE` seconds.
    As soon as one of its places is free, it accepts connections at once.
    """

    def __init__(self, context: Context, paused: Callable[[], bool]) -> None:
        self.next_moment = NEVER
        """The time.monotonic() moment at which `look` has something to do."""
        self._context = context
        self._pool = context.pool
        self._paused = paused
        """Whether accepting has stopped for another reason (`Admission`)."""
        self._away = False
        """Whether this worker does not accept at the moment."""
        self._watches = False
        """Whether this worker listens although all its places are taken."""
        self._lock = threading.Lock()
        """Held while the two above and the poller's listeners change."""

    @property
    def _acceptors(self) -> list[Any]:
        return [each for each in self._context.acceptors if each.listener.copied and each.accepting]

    def look(self, now: float) -> None:
        """Stop accepting if all places are taken, or accept again when it is time (leading thread, before a wait)."""
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
        """Stop accepting if all places are taken, and return whether it does (the leading thread)."""
        return self._pool.full and self.step(time.monotonic(), ASIDE)

    def step(self, now: float, seconds: float) -> bool:
        """Accept nothing for `seconds`, unless a place has become free; returns whether it stops accepting."""
        with self._lock:
            self._away, self._watches = True, False  # set first, so that place_free sees it if a place becomes free now
            if not self._pool.full:
                self._away = False
                return False
            self.next_moment = now + seconds
            for acceptor in self._acceptors:
                self._context.poller.listen(acceptor, on=False)
        return True

    def end(self) -> None:
        """Accept as if no other worker did, until the next `look` (the leading thread)."""
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
