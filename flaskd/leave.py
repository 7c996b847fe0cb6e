"""The end of a process that is flaskd's own: within a moment, whatever the app left running."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import NoReturn

_EXIT_GRACE = 0.5
"""Seconds that the interpreter's own exit gets: stray threads to join, atexit callbacks."""


def leave(code: int) -> NoReturn:
    """End the process with `code`, within a moment whatever is left running.

    The interpreter's own exit joins non-daemon threads and executors (threading._shutdown), and may wait for ever.
    """
    for number in ("SIGTERM", "SIGINT", "SIGHUP"):
        if hasattr(signal, number):
            # The stop is over; a second Ctrl-C that a wrapper forwarded must not turn its exit code into a signal's.
            signal.signal(getattr(signal, number), signal.SIG_IGN)

    def give_up() -> None:
        try:
            time.sleep(_EXIT_GRACE)
            stray = [each.name for each in threading.enumerate() if not each.daemon and each.name != "MainThread"]
            sys.stderr.write(f"flaskd: leaving without waiting for {', '.join(stray) or 'exit callbacks'}\n")
        finally:
            os._exit(code)

    try:
        threading.Thread(target=give_up, name="flaskd-exit", daemon=True).start()
    except RuntimeError:  # no more threads: no more patience either
        os._exit(code)
    sys.exit(code)
