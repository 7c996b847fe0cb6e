"""One drain as its owner sees it: begun once, joined by all who want it, over once, with a report."""

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
"""Seconds past its deadline after which a drain is over without a word of the server, where it is in this process."""
_LOOK = 0.5
"""Seconds between two looks of a thread that waits for a drain whether the server is still there to end it."""


class Drainable(Protocol):
    """A server that can be drained."""

    @property
    def counted(self) -> tuple[int, int]:
        """How many requests have been completed and rejected since the start."""

    @property
    def dead(self) -> str:
        """Why no word of it will come any more; empty while it is there."""

    def begin_drain(
        self,
        timeout: float,
        over: Callable[[DrainReport], object],
        *,
        announce: float = 0.0,
        counted_from: tuple[int, int] | None = None,
    ) -> None:
        """Finish what is in hand within `timeout` seconds; `announce` seconds before, new clients are still welcome.

        Returns at once; `over` is called with the report from a thread of the server.
        """

    def hasten_drain(self, timeout: float) -> None:
        """End the announce now, and leave the drain at most `timeout` seconds more."""

    def cut(self, reason: str) -> tuple[Cut, ...]:
        """What is in flight, as cut."""


class Drain:
    """A drain of `server` within `timeout` seconds, announced for `announce` seconds before; all from any thread.

    `over` is called once, with it, in the thread that found out that it is over. Its account has what was answered
    since `counted_from` (see `Drainable.counted`), by default since now. One that follows an `earlier` drain goes on
    with its account.
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
        """What came of it; None until it is over."""

    def begin(self) -> Self:
        """Begin it, and return at once; one that cannot be begun is over, and what is in flight counts as cut."""
        try:
            self._server.begin_drain(
                self._timeout, self._conclude, announce=self._announce, counted_from=self._counted_from
            )
        except Exception as error:  # whatever it was, a stop goes on
            log.exception("the drain broke off")
            self.give_up(f"the drain broke off: {error}")
        return self

    def shorten(self, timeout: float) -> None:
        """End its announce, and leave it at most `timeout` seconds more."""
        if self.report is None:
            self._until = min(self._until, time.monotonic() + timeout)
            self._server.hasten_drain(timeout)

    @property
    def left(self) -> float:
        """Seconds that it may still take, never below 0."""
        return max(0.0, self._until - time.monotonic()) if self.report is None else 0.0

    @property
    def looked_at(self) -> float:
        """The time.monotonic() moment at which `look` may find that it is over without a word of the server."""
        return self._until + self._guard

    def look(self) -> bool:
        """Give it up, if its server is dead or has let its time pass; whether it did."""
        overdue = time.monotonic() >= self._until + self._guard
        why = self._server.dead or ("the serving thread does not turn" if overdue else "")
        return self.report is None and bool(why) and self.give_up(why)

    def give_up(self, why: str) -> bool:
        """End it without a word of the server: all that is in flight counts as cut; whether it was not over by now."""
        return self._conclude(DrainReport(cut=self._server.cut(why), background=left_behind()))

    def account(self) -> dict[str, Any]:
        """What came of it, for an answer."""
        return (self.report or DrainReport()).as_json()

    def undo(self) -> None:
        """Tell all who wait for it that it was undone."""
        self._undone = True
        self._done.set()

    def wait(self, timeout: float = math.inf) -> DrainReport | None:
        """Wait until it is over, at most `timeout` seconds; None when it is not over by then.

        Raises NotNowError when it was undone.
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
    """Carry out a drain that waits in a thread of its own; where no thread can be had, in this one."""

    def run() -> None:
        try:
            report = drain()
        except Exception as error:  # whatever it was, its owner waits for a word
            log.exception("the drain broke off")
            report = DrainReport(cut=server.cut(f"the drain broke off: {error}"))
        over(report)

    thread = threading.Thread(target=run, name="flaskd-drain", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # can't start new thread
        run()
    return thread
