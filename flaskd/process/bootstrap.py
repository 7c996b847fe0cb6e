"""What a serving process does first, before its other imports."""

from __future__ import annotations

import errno
import os
import signal
import sys
from typing import Any

STOP = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGQUIT") if hasattr(signal, name))
"""The signals that ask for a stop."""
NOTED = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2", "SIGTTIN", "SIGTTOU") if hasattr(signal, name))
"""Signals that have a meaning for other servers: they must not end flaskd silently, or suspend it (signal(7))."""
HANG_UP = tuple(getattr(signal, name) for name in ("SIGHUP",) if hasattr(signal, name))
OURS = (*STOP, *HANG_UP, *NOTED)
"""The signals that flaskd handles; those that are not in `ALWAYS` only if the app has no handler for them."""
ALWAYS = frozenset(each for each in (*STOP, *HANG_UP) if each.name != "SIGQUIT")


def open_standard_streams() -> None:
    """Open /dev/null in the place of closed standard descriptors, so that no other file gets their numbers."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # Python's value for a closed descriptor
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


def heed_signals() -> None:
    """Let SIGTERM, SIGINT and SIGQUIT end the process at once, with exit code 0, until the daemon sets its handlers.

    A SIGHUP does nothing, because the configuration is read after it anyway; but it ends the process if the terminal
    hung up.
    """
    undo_inherited()
    for number in filter(can_be_heeded, OURS):
        if number in STOP:
            signal.signal(number, _leave_at_once)
        else:
            signal.signal(number, _leave_if_hung_up if number in HANG_UP else _wait_and_see)


def heed_as_worker() -> None:
    """Let signals that a terminal sends to all its processes do nothing: the supervisor handles them for its workers.

    The handlers are Python functions that do nothing: children of the app would inherit SIG_IGN (signal(7)).
    """
    for number in (*STOP, *HANG_UP):
        if number != signal.SIGTERM:
            signal.signal(number, _wait_and_see)
    undo_inherited()


def heed_as_template() -> None:
    """Let all signals that flaskd handles do nothing: the supervisor ends its templates."""
    for number in (*STOP, *HANG_UP):
        signal.signal(number, _wait_and_see)
    undo_inherited()


def undo_inherited() -> None:
    """Undo what exec(2) keeps of the parent's settings: unblock flaskd's signals, and stop ignoring SIGCHLD.

    While SIGCHLD is ignored the kernel drops exit codes (wait(2)), and `subprocess` reports 0 for all children.
    """
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (*OURS, signal.SIGCHLD))
        if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def can_be_heeded(number: int) -> bool:
    """Whether flaskd may set a handler for this signal now.

    For SIGTERM always: a service manager needs it for a stop. A signal that was ignored when flaskd was started stays
    ignored: SIGHUP under nohup(1), SIGINT and SIGQUIT after a script's `&`.
    """
    now = signal.getsignal(number)
    if number == signal.SIGTERM:
        return True
    if number in ALWAYS:
        return now is not signal.SIG_IGN
    return now is signal.SIG_DFL or now in _EARLY


def plain(number: int, disposition: Any) -> Any:
    """A signal's disposition without flaskd: Python's default in the place of a handler from `heed_signals`."""
    if disposition is None or disposition in _EARLY:
        return signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    return disposition


def _leave_at_once(_number: int, _frame: object) -> None:
    """End the process: nothing that needs cleanup exists yet, or any more."""
    os._exit(0)


def _leave_if_hung_up(_number: int, _frame: object) -> None:
    if any(map(_hung_up, range(3))):
        os._exit(0)


def _hung_up(number: int) -> bool:
    """Whether a standard stream is a terminal that hung up: then the kernel answers EIO (Linux, tty_io.c)."""
    try:
        os.tcgetpgrp(number)
    except OSError as error:
        return error.errno == errno.EIO
    return False


def _wait_and_see(_number: int, _frame: object) -> None:
    """Do nothing: the signal has no effect at this time."""


_EARLY = (_leave_at_once, _leave_if_hung_up, _wait_and_see)
