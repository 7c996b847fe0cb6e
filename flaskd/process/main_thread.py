"""The main thread while the daemon serves: it only waits, so that code of the app cannot interrupt flaskd there.

Python runs an app's signal handlers in the main thread, between any two instructions, and their exceptions are raised
there (the signal module, "Execution of Python signal handlers"). So the daemon handles its events in another thread,
and the main thread waits for its end.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from flaskd.process.signals import SignalWatch

log = logging.getLogger("flaskd.daemon")

_QUIET = 1.0
"""Least seconds between two log lines on exceptions."""
_TURN = 1.0
"""Seconds between two calls of `look`."""


class MainThread:
    """Runs `work` in a thread of its own, and waits in the main thread for the exit code that it returns.

    `raised` is called in the main thread with each exception that the app's code raises there; it must not block.
    `look` is called in the main thread once a second: signal handlers can be set only there. After the end, no signal
    handler of the app runs until `put_handlers_back`.
    """

    def __init__(
        self, work: Callable[[], int], raised: Callable[[BaseException], None], look: Callable[[], None]
    ) -> None:
        self._work, self._raised, self._look = work, raised, look
        self._outcome: list[int | BaseException] = []
        self._ended = False
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="flaskd-events", daemon=True)
        self._handlers: dict[int, Any] = {}

    def put_handlers_back(self) -> None:
        """Restore the app's signal handlers."""
        for number, before in self._handlers.items():
            signal.signal(number, before)

    @property
    def begun(self) -> bool:
        """Whether the work has begun."""
        return self._thread.ident is not None

    def begin(self) -> None:
        """Begin the work; raises RuntimeError if no thread can be started."""
        self._thread.start()

    def _run(self) -> None:
        try:
            self._outcome.append(self._work())
        except BaseException as error:  # noqa: BLE001 - raised again in `wait`
            self._outcome.append(error)
        finally:
            self._ended = True
            self._calls.put(None)

    def call(self, function: Callable[[], None]) -> None:
        """Have a function called soon, in the main thread (any thread)."""
        self._calls.put(function)

    def wait(self) -> int:
        """Wait for the end of the work; returns its exit code, or raises its exception."""
        over = False
        while not over:
            try:
                over = self._wait()
            except BaseException as error:  # noqa: BLE001 - raised while another one was handled
                self._raised(error)
        self._put_handlers_away()
        if not self._outcome:  # the thread died before its first line, for example in a profile function
            return self._work()
        outcome = self._outcome[0]
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def _wait(self) -> bool:
        """Wait for the end, and call what must run in this thread; returns True."""
        while not (self._ended and self._calls.empty()):  # a handler's exception may have lost the None
            try:
                try:
                    call = self._calls.get(timeout=_TURN)
                except queue.Empty:
                    if not self._thread.is_alive():
                        return True
                    self._look()
                    continue
                if call is None:
                    return True
                call()
            except BaseException as error:  # noqa: BLE001 - code of the app may raise anything
                self._raised(error)
        return True

    def _put_handlers_away(self) -> None:
        """Replace the app's signal handlers by one that does nothing."""
        left = [each for each in signal.valid_signals() if _is_of_the_app(signal.getsignal(each))]
        while left:
            with contextlib.suppress(BaseException):  # handlers that are still in place may raise
                while left:
                    self._handlers.setdefault(left[-1], signal.getsignal(left[-1]))
                    signal.signal(left[-1], _nothing)
                    left.pop()


class Complaints:
    """Logs what the app's code raises in the main thread, at most one Exception a second; others are counted."""

    def __init__(self) -> None:
        self._unsaid, self._say_again = 0, 0.0

    def tell(self, error: BaseException) -> None:
        """Log an exception, or only count it. SystemExit and the like are always logged."""
        what = f"{type(error).__name__} was raised in the main thread, as by a signal handler of the app"
        if not isinstance(error, Exception):
            log.error(what, exc_info=error)
            return
        self._unsaid += 1
        if (now := time.monotonic()) >= self._say_again:
            more = f" ({self._unsaid - 1} more were not logged)" if self._unsaid > 1 else ""
            log.error(f"{what}; flaskd goes on{more}", exc_info=error)
            self._unsaid, self._say_again = 0, now + _QUIET


def _is_of_the_app(handler: Any) -> bool:
    return callable(handler) and not isinstance(getattr(handler, "__self__", None), SignalWatch)


def _nothing(_signum: int, _frame: object) -> None:
    """Do nothing."""
