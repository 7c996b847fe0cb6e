"""One drain as its owner sees it: it begins once, several callers may wait for it, and it ends once, with a report."""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol, Self

from flaskd.background_work import left_behind
from flaskd.errors import NotNowError
from flaskd.ledger import Cut, DrainReport

log = logging.getLogger("flaskd.server")

DRAIN_GUARD = 0.5
"""Seconds after its deadline at which a drain is given up, if a server in this process has not reported its end."""
_LOOK = 0.5
"""Seconds after which a thread that waits for a drain checks again whether the server is still alive."""


class Drainable(Protocol):
    """A server that can be drained."""

    @property
    def counted(self) -> tuple[int, int]:
        """How many requests have been completed and rejected since the start."""

    @property
    def dead(self) -> str:
        """Why the server cannot report the end of a drain any more; empty while it can."""

    def begin_drain(
        self,
        timeout: float,
        over: Callable[[DrainReport], object],
        *,
        announce: float = 0.0,
        counted_from: tuple[int, int] | None = None,
    ) -> None:
        """Announce a drain for `announce` seconds, then take no new work and finish what is in hand within `timeout`.

        While the drain is announced, new connections are accepted. Returns at once; `over` is called with the report
        from a thread of the server. `counted_from` is the value of `counted` from which the report counts.
        """

    def hasten_drain(self, timeout: float) -> None:
        """End the announce now, and leave the drain at most `timeout` seconds more."""

    def cut(self, reason: str) -> tuple[Cut, ...]:
        """Entries for all requests in flight, as cut for this reason."""


class Drain:
    """A drain of `server` within `timeout` seconds, after `announce` seconds of announce; for any thread.

    When the drain is over, `over` is called once with this object, in the thread that found it out. The account has
    what was answered since `counted_from` (see `Drainable.counted`), by default since now. A drain that follows an
    `earlier` one continues the account of that.
    """

    def __init__(
        self,
        server: Drainable,
        timeout: float,
        *,
        announce: float = 0.0,
        counted_from: tuple[int, int] | None = None,
        earlier: Drain | None = None,
        guard: float = DRAIN_GUARD,
        over: Callable[[Drain], None] = lambda _: None,
    ) -> None:
        self._server = server
        self._timeout, self._announce = timeout, announce
        self._until = time.monotonic() + announce + timeout
        self._guard = guard
        self._over = over
        self._counted_from = server.counted if counted_from is None else counted_from
        self._earlier = DrainReport()
        if earlier is not None and earlier.report is not None:
            self._counted_from, self._earlier = earlier._counted_from, earlier.report  # noqa: SLF001 - of this class
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._undone = False
        self.report: DrainReport | None = None
        """What became of the requests; None until the drain is over."""

    def begin(self) -> Self:
        """Begin the drain and return at once. If it cannot begin it is over, and requests in flight count as cut."""
        try:
            self._server.begin_drain(
                self._timeout, self._conclude, announce=self._announce, counted_from=self._counted_from
            )
        except Exception as error:  # whatever was raised, a stop must go on
            log.exception("the drain broke off")
            self.give_up(f"the drain broke off: {error}")
        return self

    def shorten(self, timeout: float) -> None:
        """End its announce now, and let it take at most `timeout` more seconds."""
        if self.report is None:
            self._until = min(self._until, time.monotonic() + timeout)
            self._server.hasten_drain(timeout)

    @property
    def left(self) -> float:
        """Seconds that it may still take, never below 0."""
        return max(0.0, self._until - time.monotonic()) if self.report is None else 0.0

    @property
    def looked_at(self) -> float:
        """The time.monotonic() moment from which on `look` gives the drain up, even if its server has not reported."""
        return self._until + self._guard

    def look(self) -> bool:
        """Give the drain up if its server is dead or overdue; returns whether it did."""
        overdue = time.monotonic() >= self._until + self._guard
        why = self._server.dead or ("the serving thread does not respond" if overdue else "")
        return self.report is None and bool(why) and self.give_up(why)

    def give_up(self, why: str) -> bool:
        """End the drain without the server's report: requests in flight count as cut. False if it was over before."""
        return self._conclude(DrainReport(cut=self._server.cut(why), background=left_behind()))

    def account(self) -> dict[str, Any]:
        """The report as JSON, for an answer; an empty one until the drain is over."""
        return (self.report or DrainReport()).as_json()

    def undo(self) -> None:
        """End the waiting of all callers of `wait`: the drain was undone."""
        self._undone = True
        self._done.set()

    def wait(self, timeout: float = math.inf) -> DrainReport | None:
        """Wait at most `timeout` seconds until the drain is over; returns its report, or None if it is not over.

        Raises NotNowError if the drain was undone.
        """
        until = time.monotonic() + timeout
        while not self._done.wait(max(0.0, min(_LOOK, until - time.monotonic()))) and time.monotonic() < until:
            self.look()
        if self.report is None and self._undone:
            raise NotNowError("cannot drain: resume undid it")
        return self.report

    def _conclude(self, report: DrainReport) -> bool:
        with self._lock:
            if self.report is not None or self._undone:
                return False
            before = self._earlier
            self.report = dataclasses.replace(report, cut=before.cut + report.cut, took=before.took + report.took)
        self._done.set()
        self._over(self)
        return True


def in_thread_of_its_own(
    server: Drainable, drain: Callable[[], DrainReport], over: Callable[[DrainReport], object]
) -> threading.Thread:
    """Run `drain`, which waits, in a thread of its own, or in this one if none can be started; then call `over`."""

    def run() -> None:
        try:
            report = drain()
        except Exception as error:  # whatever was raised, the drain's owner waits for a report
            log.exception("the drain broke off")
            report = DrainReport(cut=server.cut(f"the drain broke off: {error}"))
        over(report)

    thread = threading.Thread(target=run, name="flaskd-drain", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # can't start new thread
        run()
    return thread
