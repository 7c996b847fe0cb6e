"""Whether nothing was asked of the whole service for as long as `shutdown.idle.after` says."""

from __future__ import annotations

from collections.abc import Callable

from flaskd.pool.sums import Sums

_AGAIN = 1.0
"""Seconds until `over` is called again, where the first call changed nothing."""


class Idleness:
    """Calls `over` when time is up, unless it is not `wanted` at that moment; in the thread of the daemon's events."""

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
        """How often it was set anew."""
        self.after: float | None = None
        """Seconds; None while it is not watched (any thread may look)."""

    def watch(self, after: float | None) -> None:
        """Look for so many seconds without a request that counts from now on; None: no more."""
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
