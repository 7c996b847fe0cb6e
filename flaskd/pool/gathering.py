"""One drain of all workers: it collects their reports, and finds out when the listeners can be closed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from flaskd.background_work import Background
from flaskd.ledger import Cut, DrainReport
from flaskd.pool.handle import Handle
from flaskd.pool.sums import Sums, as_cut


class Gathering:
    """Collects the reports of `workers`, in the thread of the daemon's events; calls `over` once, with their sum.

    `closed` is called once no worker has a copy of the listeners any more; it returns how many connections were reset.
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
        """Kill the workers that have not reported in time: they hang, and the drain could not be undone."""
        for each in () if self.is_over else tuple(self._expected):
            each.kill("its drain did not end in time")

    def look(self) -> None:
        """Call `closed` and `over`, as soon as there is nothing left to wait for."""
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
        """Note that a worker has closed its copies of the listeners."""
        self._open.discard(worker)
        self.look()

    def reported(self, worker: Handle, report: DrainReport) -> None:
        """Note the report of a worker, whose drain is over."""
        if worker in self._expected:
            self._expected.discard(worker)
            self._cut += report.cut
            self._background += report.background
            self._unaccepted += report.unaccepted
        self.closed(worker)

    def gone(self, worker: Handle, cut: tuple[Cut, ...]) -> None:
        """Note that the process of a worker has ended; `cut` are the requests that were in flight in it."""
        self._cut += cut
        self._expected.discard(worker)
        self.closed(worker)


class AllWorkers:
    """All workers as one server that a `flaskd.server.Drain` drains; each method is for any thread.

    `begin` begins the drain in the thread of the events. Its arguments are the seconds that the drain has, the function
    to call with the report, and how many requests had been completed and rejected before.
    """

    dead = ""
    """Always empty: the death of a worker is counted, and another worker takes its place."""

    def __init__(
        self, sums: Sums, begin: Callable[[float, Callable[[DrainReport], object], tuple[int, int]], None]
    ) -> None:
        self._sums, self._begin = sums, begin

    @property
    def counted(self) -> tuple[int, int]:
        """How many requests all workers have completed and rejected."""
        return self._sums.counted

    def begin_drain(
        self,
        timeout: float,
        over: Callable[[DrainReport], object],
        *,
        announce: float = 0.0,
        counted_from: tuple[int, int] | None = None,
    ) -> None:
        """Have all workers drain by their configuration, which has the same times; see `flaskd.server.Drainable`."""
        self._begin(announce + timeout, over, counted_from or self.counted)

    def hasten_drain(self, timeout: float) -> None:
        """Do nothing: only a stop hastens a drain, and each worker is told of that."""

    def cut(self, reason: str) -> tuple[Cut, ...]:
        """Entries for all requests in flight, as cut for this reason."""
        return tuple(as_cut(each, reason) for each in self._sums.in_flight())
