"""Functions that the loop calls at given moments."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

NEVER = float("inf")
"""A time.monotonic() moment that never comes."""


class Timers:
    """Functions to be called at time.monotonic() moments, in the loop's thread."""

    next_moment = NEVER
    """When the next function is due."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Callable[[float], None]]] = []
        self._ids = itertools.count()

    def at(self, moment: float, function: Callable[[float], None]) -> None:
        """Call `function` at `moment` or soon after, with the time.monotonic() moment of the call."""
        heapq.heappush(self._heap, (moment, next(self._ids), function))
        self.next_moment = self._heap[0][0]

    def run(self, now: float) -> None:
        """Call the functions that are due at `now`."""
        while self.next_moment <= now:
            _, _, function = heapq.heappop(self._heap)
            self.next_moment = self._heap[0][0] if self._heap else NEVER
            function(now)
