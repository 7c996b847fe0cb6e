"""Waitress' dispatcher, with threads that can be joined and tasks that can be taken back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from waitress.task import ThreadedTaskDispatcher

_LEAST_WAIT = 0.1
"""Seconds that even an end in a hurry leaves to idle workers, so that they are not taken for stuck ones."""


class Workers(ThreadedTaskDispatcher):  # type: ignore[misc]  # waitress is untyped
    """The worker threads."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[threading.Thread] = []

    def start_new_thread(self, target: Callable[[int], object], thread_no: int) -> None:
        """Start a worker thread and remember it."""
        thread = threading.Thread(target=target, name=f"flaskd-worker-{thread_no}", args=(thread_no,), daemon=True)
        self.started = [each for each in self.started if each.is_alive()]
        self.started.append(thread)
        thread.start()

    def take_back(self) -> list[Any]:
        """Take every task that no thread has begun out of the queue."""
        with self.lock:
            tasks = [task for task in self.queue if not isinstance(task, Errand)]
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


class Errand:
    """A function in the shape of waitress' tasks."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def service(self) -> None:
        """Run it."""
        self._function()

    def cancel(self) -> None:
        """Nothing is owed to anybody."""
