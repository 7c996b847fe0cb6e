"""What the loop has to do at some moment, beside what happens on sockets."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

NEVER = float("inf")
"""The moment that does not come."""


class Timers:
    """Functions to be called at time.monotonic() moments, in the loop's thread."""

    next_moment = NEVER
    """When the next one is due."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Callable[[float], None]]] = []
        self._ids = itertools.count()

    def at(self, moment: float, function: Callable[[float], None]) -> None:
        """Call `function` with the time that it is by then, at `moment` or soon after."""
        heapq.heappush(self._heap, (moment, next(self._ids), function))
        self.next_moment = self._heap[0][0]

    def run(self, now: float) -> None:
        """Call those that are due."""
        while self.next_moment <= now:
            _, _, function = heapq.heappop(self._heap)
            self.next_moment = self._heap[0][0] if self._heap else NEVER
            function(now)
