"""Waitress' dispatcher, with threads that can be joined and replaced, and tasks that can be taken back."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from waitress.task import ThreadedTaskDispatcher

from flaskd.errors import CannotCreateError, shortage
from flaskd.ledger import InFlight
from flaskd.process.threads import AppThread
from flaskd.server.request import Request

log = logging.getLogger("flaskd.server")

_LEAST_WAIT = 0.1
"""Seconds that even an end in a hurry leaves to idle threads, so that they are not taken for stuck ones."""


class ThreadPool(ThreadedTaskDispatcher):  # type: ignore[misc]  # waitress is untyped
    """The threads that run the app, one request at a time each.

    A thread that goes on with a request that is over (cut, or a stream that was ended) is lost: the pool has one more
    in its place, until it comes back.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        """How many threads there should be, without those that are lost; see `set_thread_count`."""
        self.started: list[threading.Thread] = []
        self.lost: set[Request] = set()
        """What the threads that are lost go on with; changed under a lock, looked at without."""
        self.ending = False
        """Whether threads that come back are not missed any more."""
        self.queue_cv = _Queue(self.lock)
        self._lost_lock = threading.Lock()
        self._working: set[threading.Thread] = set()
        self._last_ended: Callable[[], None] | None = None

    def start_new_thread(self, target: Callable[[int], object], thread_no: int) -> None:
        """Start a thread and remember it."""

        def work() -> None:
            try:
                target(thread_no)
            finally:
                self._ended(thread)

        thread = AppThread(target=work, name=f"flaskd-thread-{thread_no}")
        try:
            thread.start()
        except RuntimeError:  # no thread can be had; Waitress has counted it already
            self.threads.discard(thread_no)
            raise
        self.started = [each for each in self.started if each.is_alive()]
        self.started.append(thread)
        self.queue_cv.not_there_yet.add(thread)
        self._working.add(thread)  # in time: it cannot end before the lock, which is held here, is released

    # --- how many -------------------------------------------------------------------------------------------------

    @property
    def count(self) -> int:
        """How many there are, without those that are to end."""
        return int(len(self.threads) - self.stop_count)

    def resize(self, size: int) -> None:
        """Change how many there should be (any thread).

        Raises CannotCreateError where no more can be had; the number is then what it was.
        """
        before = self.count
        try:
            self.set_thread_count(size + len(self.lost))
        except RuntimeError as error:
            had = self.count
            self.set_thread_count(before)
            lack = shortage(error)
            raise (CannotCreateError(f"server.threads: {had} of {size}: {lack}") if lack else error) from error
        self.size = size

    def replenish(self) -> None:
        """Have as many free threads as there should be, or as many of them as can be had."""
        with self._lost_lock:
            self._replenish()

    def _replenish(self) -> None:
        try:
            self.set_thread_count(self.size + len(self.lost))
        except RuntimeError as error:
            log.warning(f"{self.count - len(self.lost)} of {self.size} worker threads: {shortage(error)}")

    def lose(self, request: Request) -> None:
        """Note that a thread goes on with a request that is over; it is missing until it comes back (any thread)."""
        with self._lost_lock:
            self.lost.add(request)
            if request.over:  # in this moment, and so `come_back` did not see it among the lost
                self.lost.discard(request)

    def come_back(self, request: Request) -> None:
        """Note that the app is done with a request; its thread may have been lost (any thread)."""
        with self._lost_lock:
            if request in self.lost:
                self.lost.discard(request)
                if not self.ending:
                    self._replenish()

    def left_behind(self) -> dict[threading.Thread, InFlight]:
        """The threads that are lost, and what they go on with (any thread)."""
        with self._lost_lock:
            return {each.thread: each.snapshot() for each in self.lost if each.thread is not None}

    # --- tasks ----------------------------------------------------------------------------------------------------

    def add_task(self, task: Any) -> None:
        """Queue a task, and warn as Waitress does when no thread is free for it (any thread).

        To Waitress a thread is busy until it waits for the first time, so that the first request would be warned of.
        """
        with self.lock:
            self.queue.append(task)
            self.queue_cv.notify()
            depth = len(self.queue) - (self.count - self.active_count) - len(self.queue_cv.not_there_yet)
        if depth > 0:
            self.queue_logger.warning("Task queue depth is %d", depth)

    def run(self, function: Callable[[], None]) -> None:
        """Run a function in one of the threads (any thread)."""
        self.add_task(_FunctionTask(function))

    @property
    def wanted(self) -> bool:
        """Whether a thread that is done with a request has better to do than to wait for its client's next one."""
        return bool(self.queue) or self.stop_count > 0 or self.active_count >= len(self.threads)

    def take_back(self) -> list[Any]:
        """Take every task that no thread has begun out of the queue."""
        with self.lock:
            tasks = [task for task in self.queue if not isinstance(task, _FunctionTask)]
            for task in tasks:
                self.queue.remove(task)
        return tasks

    # --- the end --------------------------------------------------------------------------------------------------

    def join(self, timeout: float) -> list[threading.Thread]:
        """Let all threads end, wait at most `timeout` seconds, and return those that did not (any thread)."""
        self.set_thread_count(0)
        until = time.monotonic() + max(timeout, _LEAST_WAIT)
        for thread in self.started:
            thread.join(max(0.0, until - time.monotonic()))
        return [thread for thread in self.started if thread.is_alive()]

    def when_the_last_ends(self, function: Callable[[], None]) -> None:
        """Call `function` once, in the last of the threads that `join` left behind; at once if that is over by now."""
        with self.lock:
            if self._working:
                self._last_ended = function
                return
        function()

    def _ended(self, thread: threading.Thread) -> None:
        with self.lock:
            self._working.discard(thread)
            self.queue_cv.not_there_yet.discard(thread)
            function = None if self._working else self._last_ended
        if function is not None:
            function()


class _Queue(threading.Condition):
    """What the threads wait at; it knows those that were started and have not come to it yet."""

    def __init__(self, lock: threading.Lock) -> None:
        super().__init__(lock)
        self.not_there_yet: set[threading.Thread] = set()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for a task, or for the end."""
        self.not_there_yet.discard(threading.current_thread())
        return super().wait(timeout)


class _FunctionTask:
    """A function in the shape of waitress' tasks."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def service(self) -> None:
        """Run it."""
        self._function()

    def cancel(self) -> None:
        """Nothing is owed to anybody."""
