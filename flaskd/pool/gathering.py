"""One drain of all workers: who still has to report, what they reported, and when the listeners can be closed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from flaskd.background_work import Background
from flaskd.ledger import Cut, DrainReport
from flaskd.pool.handle import Handle
from flaskd.pool.sums import Sums, as_cut


class Gathering:
    """In the thread of the daemon's events. `over` is called once, with the report of all.

    `closed` is called once no worker has an own copy of the listeners any more.
    """

    def __init__(
        self,
        workers: Iterable[Handle],
        *,
        counted_from: tuple[int, int],
        counted: Callable[[], tuple[int, int]],
        closed: Callable[[], int],
        over: Callable[[DrainReport], object],
    ) -> None:
        all_of_them = set(workers)
        self._expected = {each for each in all_of_them if each.report is None}
        self._open = {each for each in all_of_them if not each.closed}
        self._counted_from, self._counted = counted_from, counted
        self._closed, self._over = closed, over
        self._began = time.monotonic()
        self._cut: list[Cut] = []
        self._background: list[Background] = []
        self._unaccepted = 0
        self._is_closed = self.is_over = False

    @property
    def is_closed(self) -> bool:
        """Whether no worker has a copy of the listeners any more."""
        return self._is_closed

    def end_the_late(self) -> None:
        """Kill the workers that have not reported in time: they hang, and would keep the drain from being undone."""
        for each in () if self.is_over else tuple(self._expected):
            each.kill("its drain did not end in time")

    def look(self) -> None:
        """Go on where nothing is left to wait for."""
        if not self._open and not self._is_closed:
            self._is_closed = True
            self._unaccepted += self._closed()
        if not self._expected and self._is_closed and not self.is_over:
            self.is_over = True
            completed, rejected = self._counted()
            self._over(
                DrainReport(
                    completed=completed - self._counted_from[0],
                    rejected=rejected - self._counted_from[1],
                    cut=tuple(self._cut),
                    took=time.monotonic() - self._began,
                    background=tuple(self._background),
                    unaccepted=self._unaccepted,
                )
            )

    def closed(self, worker: Handle) -> None:
        """It has closed its copies."""
        self._open.discard(worker)
        self.look()

    def reported(self, worker: Handle, report: DrainReport) -> None:
        """Its drain is over."""
        if worker in self._expected:
            self._expected.discard(worker)
            self._cut += report.cut
            self._background += report.background
            self._unaccepted += report.unaccepted
        self.closed(worker)

    def gone(self, worker: Handle, cut: tuple[Cut, ...]) -> None:
        """Its process has ended; `cut` is what was in flight in it."""
        self._cut += cut
        self._expected.discard(worker)
        self.closed(worker)


class AllWorkers:
    """What a `flaskd.server.Drain` drains: all workers; each method is for any thread.

    `begin` begins the drain in the thread of the events; it is given the seconds that the drain has, what is called
    with the report, and how many requests had been completed and rejected before.
    """

    dead = ""
    """A worker that dies is counted, and another one comes."""

    def __init__(
        self, sums: Sums, begin: Callable[[float, Callable[[DrainReport], object], tuple[int, int]], None]
    ) -> None:
        self._sums, self._begin = sums, begin

    @property
    def counted(self) -> tuple[int, int]:
        """How many requests have been completed and rejected."""
        return self._sums.counted

    def begin_drain(
        self,
        timeout: float,
        over: Callable[[DrainReport], object],
        *,
        announce: float = 0.0,
        counted_from: tuple[int, int] | None = None,
    ) -> None:
        """Have all workers drain by their configuration, which says the same; see `flaskd.server.Drainable`."""
        self._begin(announce + timeout, over, counted_from or self.counted)

    def hasten_drain(self, timeout: float) -> None:
        """Nothing here: a stop, which alone hastens a drain, is told to each worker."""

    def cut(self, reason: str) -> tuple[Cut, ...]:
        """What is in flight, as cut."""
        return tuple(as_cut(each, reason) for each in self._sums.in_flight())
