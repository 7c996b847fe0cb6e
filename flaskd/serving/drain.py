"""One drain: how long it may take, what came of it, and who waits to be told."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from flaskd.ledger import DrainReport
from flaskd.protocol import Reply
from flaskd.server import WaitressThread

_GUARD = 0.5
"""Seconds past its deadline after which a drain is over without the serving thread's word."""


class Drain:
    """A drain of `server` within `timeout` seconds, announced for `announce` seconds before.

    `over` is called from the serving thread with it and its report; all else belongs to the thread of the daemon's
    events. Its account has what was answered since `counted_from`, default: now. One that follows an `earlier` drain
    goes on with its account.
    """

    def __init__(
        self,
        server: WaitressThread,
        timeout: float,
        over: Callable[[Drain, DrainReport], None],
        *,
        announce: float = 0.0,
        counted_from: tuple[int, int] | None = None,
        earlier: Drain | None = None,
    ) -> None:
        self.report: DrainReport | None = None
        self.waiters: list[Reply] = []
        self._server = server
        self._announced = False
        self._begins = time.monotonic() + announce
        self._until = self._begins + timeout
        self._over = over
        self._counted_from = server.counted if counted_from is None else counted_from
        self._earlier = DrainReport()
        if earlier is not None and earlier.report is not None:
            self._counted_from, self._earlier = earlier._counted_from, earlier.report  # noqa: SLF001 - of this class

    def announce(self) -> None:
        """Say no to new clients while still accepting them; it begins by itself at `next_moment`, or at once."""
        self._announced = True
        self._server.announce()
        self.advance()

    def advance(self) -> None:
        """Begin, if it has been announced for long enough."""
        if self._announced and time.monotonic() >= self._begins:
            self._announced = False
            left = max(0.0, self._until - time.monotonic())
            self._server.begin_drain(left, lambda report: self._over(self, report), counted_from=self._counted_from)

    def shorten(self, timeout: float) -> None:
        """Leave it at most `timeout` seconds more, whether it has begun or not."""
        if self.report is None:
            now = time.monotonic()
            self._begins = min(self._begins, now)
            self._until = min(self._until, now + timeout)
            self.advance()
            self._server.hasten_drain(timeout)

    @property
    def left(self) -> float:
        """Seconds that it may still take, never below 0."""
        return max(0.0, self._until - time.monotonic()) if self.report is None else 0.0

    @property
    def next_moment(self) -> float:
        """The time.monotonic() moment at which it wants to be looked at."""
        return self._begins if self._announced else self._until + _GUARD

    @property
    def overdue(self) -> bool:
        """Whether the serving thread should have reported and has not: it is not waited for any more."""
        return self.report is None and time.monotonic() >= self._until + _GUARD

    def conclude(self, report: DrainReport) -> DrainReport:
        """It is over: keep and return the report, with what the earlier drain had cut."""
        before = self._earlier
        self.report = dataclasses.replace(report, cut=before.cut + report.cut, took=before.took + report.took)
        return self.report

    def account(self) -> dict[str, Any]:
        """What came of it, for an answer."""
        return (self.report or DrainReport()).as_json()

    def release(self) -> list[Reply]:
        """Take those who wait for it, to tell them."""
        waiters, self.waiters = self.waiters, []
        return waiters
