"""What a serving process does before anything else, its imports included."""

from __future__ import annotations

import os
import signal
import sys


def open_standard_streams() -> None:
    """Open /dev/null where who started us closed a standard descriptor: what is opened next must not get its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # as Python leaves it then
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


def heed_signals() -> None:
    """Let SIGTERM and SIGINT end the process at once, with 0, until the daemon's own handlers are in place."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave_at_once)


def _leave_at_once(_number: int, _frame: object) -> None:
    """Leave: nothing has been made yet, or all has been put away."""
    os._exit(0)
