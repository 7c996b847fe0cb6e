"""Waitress' dispatcher, with threads that can be joined and tasks that can be taken back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from waitress.task import ThreadedTaskDispatcher

from flaskd.process.threads import AppThread

_LEAST_WAIT = 0.1
"""Seconds that even an end in a hurry leaves to idle workers, so that they are not taken for stuck ones."""


class ThreadPool(ThreadedTaskDispatcher):  # type: ignore[misc]  # waitress is untyped
    """The worker threads."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[threading.Thread] = []
        self._working: set[threading.Thread] = set()
        self._last_ended: Callable[[], None] | None = None

    def start_new_thread(self, target: Callable[[int], object], thread_no: int) -> None:
        """Start a worker thread and remember it."""

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
        self._working.add(thread)  # in time: it cannot end before the lock, which is held here, is released

    @property
    def count(self) -> int:
        """How many there are, without those that are to end."""
        return int(len(self.threads) - self.stop_count)

    @property
    def wanted(self) -> bool:
        """Whether a worker that is done with a request has better to do than to wait for its client's next one."""
        return bool(self.queue) or self.stop_count > 0 or self.active_count >= len(self.threads)

    def take_back(self) -> list[Any]:
        """Take every task that no thread has begun out of the queue."""
        with self.lock:
            tasks = [task for task in self.queue if not isinstance(task, FunctionTask)]
            for task in tasks:
                self.queue.remove(task)
        return tasks

    def join(self, timeout: float) -> list[threading.Thread]:
        """Let all workers end, wait at most `timeout` seconds, and return those that did not (any thread)."""
        self.set_thread_count(0)
        until = time.monotonic() + max(timeout, _LEAST_WAIT)
        for thread in self.started:
            thread.join(max(0.0, until - time.monotonic()))
        return [thread for thread in self.started if thread.is_alive()]

    def when_the_last_ends(self, function: Callable[[], None]) -> None:
        """Call `function` once, in the last of the workers that `join` left behind; at once if that is over by now."""
        with self.lock:
            if self._working:
                self._last_ended = function
                return
        function()

    def _ended(self, thread: threading.Thread) -> None:
        with self.lock:
            self._working.discard(thread)
            function = None if self._working else self._last_ended
        if function is not None:
            function()


class FunctionTask:
    """A function in the shape of waitress' tasks."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def service(self) -> None:
        """Run it."""
        self._function()

    def cancel(self) -> None:
        """Nothing is owed to anybody."""
