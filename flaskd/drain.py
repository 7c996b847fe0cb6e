"""One drain: how long it may take, what came of it, and who waits to be told."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from flaskd.ledger import DrainReport
from flaskd.protocol import Reply
from flaskd.server import ServerThread

_GUARD = 0.5
"""Seconds past its deadline after which a drain is over without the serving thread's word."""


class Drain:
    """A drain of `server` within `timeout` seconds; `over` is called from the serving thread with it and its report.

    All else belongs to the main thread. Its account has what was completed since `completed_before`, default: now.
    """

    def __init__(
        self,
        server: ServerThread,
        timeout: float,
        over: Callable[[Drain, DrainReport], None],
        completed_before: int | None = None,
    ) -> None:
        self.report: DrainReport | None = None
        self.waiters: list[Reply] = []
        self._server = server
        self._until = time.monotonic() + timeout
        self._over = over
        self._completed_before = completed_before

    def begin(self) -> None:
        """Let the serving thread begin."""
        self._server.begin_drain(
            self.left, lambda report: self._over(self, report), completed_before=self._completed_before
        )

    def shorten(self, timeout: float) -> None:
        """Leave it at most `timeout` seconds more."""
        if self.report is None:
            self._until = min(self._until, time.monotonic() + timeout)
            self._server.hasten_drain(timeout)

    @property
    def left(self) -> float:
        """Seconds that it may still take, never below 0."""
        return max(0.0, self._until - time.monotonic()) if self.report is None else 0.0

    @property
    def overdue_at(self) -> float:
        """The time.monotonic() moment from which the serving thread is not waited for any more."""
        return self._until + _GUARD

    def account(self) -> dict[str, Any]:
        """What came of it, for an answer."""
        return (self.report or DrainReport()).as_json()

    def release(self) -> list[Reply]:
        """Take those who wait for it, to tell them."""
        waiters, self.waiters = self.waiters, []
        return waiters
