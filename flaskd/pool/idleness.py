"""Whether no request has come to any worker for as long as `shutdown.idle.after` says."""

from __future__ import annotations

from collections.abc import Callable

from flaskd.pool.sums import Sums

_AGAIN = 1.0
"""Seconds until `over` is called again if the service still runs."""


class Idleness:
    """Calls `over` when the idle time is over and `wanted` is true; in the thread of the daemon's events."""

    def __init__(
        self,
        sums: Sums,
        later: Callable[[float, Callable[[], None]], None],
        *,
        over: Callable[[], None],
        wanted: Callable[[], bool],
    ) -> None:
        self._sums, self._later, self._over, self._wanted = sums, later, over, wanted
        self._watch = 0
        """How often `watch` was called."""
        self.after: float | None = None
        """The idle time in seconds; None while idleness is not watched (any thread may read it)."""

    def watch(self, after: float | None) -> None:
        """Watch from now on for `after` seconds without a request that counts; None: stop watching."""
        self._watch += 1
        self.after = after
        self._look(self._watch)

    def _look(self, watch: int) -> None:
        if self.after is None or watch != self._watch:
            return
        left = self.after - self._sums.idle_for
        if left <= 0 and self._wanted():
            self._over()
        self._later(left if left > 0 else _AGAIN, lambda: self._look(watch))
