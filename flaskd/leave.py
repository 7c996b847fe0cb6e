"""The end of a process that is flaskd's own: within a moment, whatever the app left running."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

_EXIT_GRACE = 0.5
"""Seconds that the interpreter's own exit gets: stray threads to join, atexit callbacks."""
_LAST_WORDS = 0.2
"""Seconds that standard output and standard error get; who reads them may have stalled."""


def leave(code: int) -> NoReturn:
    """End the process with `code`, within a moment whatever is left running.

    The interpreter's own exit joins non-daemon threads and executors (threading._shutdown), and flushes the standard
    streams (Py_FinalizeEx): it may wait for ever.
    """
    for number in ("SIGTERM", "SIGINT", "SIGHUP"):
        if hasattr(signal, number):
            # The stop is over; a second Ctrl-C that a wrapper forwarded must not turn its exit code into a signal's.
            signal.signal(getattr(signal, number), signal.SIG_IGN)

    def give_up() -> None:
        try:
            time.sleep(_EXIT_GRACE)
            stray = [each.name for each in threading.enumerate() if not each.daemon and each.name != "MainThread"]
            words = f"flaskd: leaving without waiting for {', '.join(stray) or 'exit callbacks'}\n"
            _in_time(lambda: sys.stderr.write(words))
        finally:
            os._exit(code)

    try:
        if not _in_time(_flush):  # the interpreter would wait for it at its end, when no other thread runs any more
            os._exit(code)
        threading.Thread(target=give_up, name="flaskd-exit", daemon=True).start()
    except RuntimeError:  # no more threads: no more patience either
        os._exit(code)
    sys.exit(code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # gone, closed, or never there
            stream.flush()


def _in_time(words: Callable[[], object]) -> bool:
    """Say something that may block, in a thread of its own; whether it was over within its time."""
    thread = threading.Thread(target=words, name="flaskd-last-words", daemon=True)
    thread.start()
    thread.join(_LAST_WORDS)
    return not thread.is_alive()
