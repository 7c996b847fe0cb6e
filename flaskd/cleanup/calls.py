"""Calls that might block, made in a thread of their own.

A cleanup step may hang while it holds the lock of a log stream; a thread that writes to that log hangs with it.
"""

from __future__ import annotations

import logging
import queue
import threading
from typing import TYPE_CHECKING

from flaskd.process.forks import AppCode

if TYPE_CHECKING:
    from collections.abc import Callable

_log = logging.getLogger("flaskd.cleanup")


class CallThread:
    """Makes calls in the order in which they were given, in one daemon thread that lives until `close`."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = threading.Thread(target=self._work, name=name, daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # no thread can be had: `add` makes the calls itself
            self._thread = None

    def add(self, call: Callable[[], None]) -> None:
        """Have the thread make `call` soon; returns at once."""
        if self._thread is None:
            _make(call)
        else:
            self._calls.put(call)

    def close(self, timeout: float) -> bool:
        """Wait up to `timeout` seconds until all calls are made; False if one of them hangs."""
        if self._thread is None:
            return True
        self._calls.put(None)
        self._thread.join(max(0.0, timeout))
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            _make(call)


def call_in_thread(call: Callable[[], None]) -> CallThread:
    """Make one call in a thread of its own; `close` the result to wait for it."""
    thread = CallThread("flaskd-cleanup-call")
    thread.add(call)
    return thread


def _make(call: Callable[[], None]) -> None:
    try:
        with AppCode():
            call()
    except BaseException:  # noqa: BLE001 - all that can be done is to log it
        _log.exception("a call out of the cleanup failed")
