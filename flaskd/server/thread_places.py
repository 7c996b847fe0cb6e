"""The places in which requests run: how many there are, and which threads have left theirs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from flaskd.ledger import InFlight
from flaskd.server.request import Request


class Places:
    """The places of a pool of threads; one request at a time runs in each.

    A thread that still runs a request that is over (cut, given up, or a stream that was ended) is lost: until it comes
    back there is an extra place, but at most `size` extra ones. A thread that waits for a client leaves its place
    meanwhile, and afterwards waits for a free one.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        """How many requests may run at once, without those of lost threads."""
        self.lost: set[Request] = set()
        """The requests that lost threads still run; changed under the lock, read without it."""
        self.ending = False
        """Whether all threads are to end; no task begins any more."""
        self._places = size
        """How many requests may run at once, with those of lost threads."""
        self._running = 0
        self._numbers: dict[threading.Thread, int] = {}
        """The threads that have not ended, and the numbers in their names."""
        self._lock = threading.Lock()
        """Held while one of the above, or of the next two, changes."""
        self._away = self._back = 0
        """How many threads have left their place for a while, and how many of these wait for one again."""
        self._room = 0
        """How many tasks may run at once now: fewer than `_places` if threads are missing, or wait to come back."""
        self.surplus = False
        """Whether there is a thread too many, so that the leading one has to end."""
        self._returns = threading.Condition(self._lock)
        """Notified when a place has become free; threads that want one again wait for it."""
        self._wake: Callable[[], None] = lambda: None
        """Makes the leading thread look at the queue and at `surplus`."""
        self.on_place: Callable[[], None] | None = None
        """Called when a place has become free."""

    def _replenish(self) -> None:
        """Start the threads that are missing, or as many as can be started; the caller holds `_lock`."""
        raise NotImplementedError

    @property
    def full(self) -> bool:
        """Whether all places are taken (any thread)."""
        return not self._free

    @property
    def _free(self) -> int:
        return max(0, self._room - self._running)

    def _measure(self) -> None:
        """Compute `_room` and `surplus` anew, after what they depend on has changed; the caller holds `_lock`."""
        threads = len(self._numbers)
        self._room = 0 if self.ending else min(self._places, threads - self._away - 1) - self._back
        self.surplus = threads > self._wanted

    @property
    def _wanted(self) -> int:
        return 0 if self.ending else self._places + self._away + 1

    @property
    def busy(self) -> int:
        """How many threads run a task."""
        return self._running

    def _count_places(self) -> None:
        self._places = self.size + min(len(self.lost), self.size)
        self._measure()
        self._returns.notify_all()

    @property
    def short(self) -> int:
        """How many threads are lost and not replaced (any thread)."""
        return max(0, len(self.lost) - self.size)

    def _give_up(self) -> None:
        self._running -= 1
        if self._back:
            self._returns.notify()
        if self.on_place is not None:
            self.on_place()

    # --- threads that have left theirs -----------------------------------------------------------------------------

    @contextlib.contextmanager
    def without_place(self) -> Iterator[None]:
        """Give up this thread's place while the block runs; afterwards wait until a place is free."""
        with self._lock:
            self._away += 1
            self._measure()
            self._give_up()
            self._replenish()
        try:
            yield
        finally:
            with self._lock:
                self._back += 1
                self._measure()
                self._returns.wait_for(lambda: self._running < self._places or self.ending)
                self._back, self._away, self._running = self._back - 1, self._away - 1, self._running + 1
                self._measure()
            self._wake()  # another task may have a place now, or there may be a thread too many

    def lose(self, request: Request) -> None:
        """Note that a thread still runs a request that is over; it is lost until it comes back (any thread)."""
        with self._lock:
            self.lost.add(request)
            if request.over:  # it has just ended, and `come_back` did not find it here
                self.lost.discard(request)
            self._count_places()

    def come_back(self, request: Request) -> None:
        """Note that the app has finished a request, whose thread may have been lost (any thread)."""
        with self._lock:
            if request in self.lost:
                self.lost.discard(request)
                self._count_places()
                if not self.ending:
                    self._replenish()

    def left_behind(self) -> dict[threading.Thread, InFlight]:
        """The lost threads, and the requests that they still run (any thread)."""
        with self._lock:
            return {each.thread: each.snapshot() for each in self.lost if each.thread is not None}
