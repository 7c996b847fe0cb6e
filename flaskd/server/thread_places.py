"""The places in which requests run: how many there are, and the threads that have left theirs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from flaskd.ledger import InFlight
from flaskd.server.request import Request


class Places:
    """The places of a pool of threads, each of which runs one request at a time.

    A thread that goes on with a request that is over (cut, given up, or a stream that was ended) is lost: there is one
    place more in exchange, until it comes back; but at most twice as many as there should be. A thread that waits for a
    client leaves its place for a while, and comes back to one that is free.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        """How many requests may run at once; without those that are lost."""
        self.lost: set[Request] = set()
        """What the threads that are lost go on with; changed under a lock, looked at without."""
        self.ending = False
        """Whether all threads are to end, and nothing more is begun."""
        self._places = size
        """How many requests may run at once, with those that are lost."""
        self._running = 0
        self._numbers: dict[threading.Thread, int] = {}
        """The threads that have not ended, with the numbers in their names."""
        self._lock = threading.Lock()
        """Held when one of the above, or of the next three, changes."""
        self._away = self._back = 0
        """How many threads have given their place up for a while, and how many of them want one again."""
        self._room = 0
        """How many requests may run at once as things are: some threads may be missing, and some places kept for others."""
        self._returns = threading.Condition(self._lock)
        """Is notified when a place has become free, for those that want one again."""
        self._wake: Callable[[], None] = lambda: None
        """Makes the thread that leads look at what has changed."""
        self.on_place: Callable[[], None] | None = None
        """Is called when a place has become free."""

    def _replenish(self) -> None:
        """Have as many threads as there should be, or as many of them as can be had; `_lock` is held."""
        raise NotImplementedError

    @property
    def full(self) -> bool:
        """Whether all places are taken (any thread)."""
        return not self._free

    @property
    def _free(self) -> int:
        return max(0, self._room - self._running)

    def _measure(self) -> None:
        """Compute `_room` anew, after what it depends on has changed; `_lock` is held."""
        self._room = 0 if self.ending else min(self._places, len(self._numbers) - self._away - 1) - self._back

    @property
    def busy(self) -> int:
        """How many threads run something."""
        return self._running

    def _count_places(self) -> None:
        self._places = self.size + min(len(self.lost), self.size)
        self._measure()
        self._returns.notify_all()

    @property
    def short(self) -> int:
        """How many of the threads that should be there are lost, and not replaced (any thread)."""
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
        """Leave the place of this thread to another request meanwhile; afterwards wait until one is free again."""
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
            self._wake()  # a place that was kept for this thread may be free, or a thread one too many

    def lose(self, request: Request) -> None:
        """Note that a thread goes on with a request that is over; it is missing until it comes back (any thread)."""
        with self._lock:
            self.lost.add(request)
            if request.over:  # in this moment, and so `come_back` did not see it among the lost
                self.lost.discard(request)
            self._count_places()

    def come_back(self, request: Request) -> None:
        """Note that the app is done with a request; its thread may have been lost (any thread)."""
        with self._lock:
            if request in self.lost:
                self.lost.discard(request)
                self._count_places()
                if not self.ending:
                    self._replenish()

    def left_behind(self) -> dict[threading.Thread, InFlight]:
        """The threads that are lost, and what they go on with (any thread)."""
        with self._lock:
            return {each.thread: each.snapshot() for each in self.lost if each.thread is not None}
