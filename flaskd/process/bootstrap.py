"""What a serving process does before anything else, its imports included."""

from __future__ import annotations

import errno
import os
import signal
import sys
from typing import Any

STOP = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGQUIT") if hasattr(signal, name))
"""The signals that ask for a stop."""
NOTED = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2", "SIGTTIN", "SIGTTOU") if hasattr(signal, name))
"""The signals that other servers heed: they must not end this one without a word, or hold it up (signal(7))."""
HANG_UP = tuple(getattr(signal, name) for name in ("SIGHUP",) if hasattr(signal, name))
OURS = (*STOP, *HANG_UP, *NOTED)
"""The signals that flaskd heeds, where the app has no handler of its own for one that is not `ALWAYS` flaskd's."""
ALWAYS = frozenset(each for each in (*STOP, *HANG_UP) if each.name != "SIGQUIT")


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
    """Let SIGTERM, SIGINT and SIGQUIT end the process at once, with 0, until the daemon's own handlers are in place.

    A SIGHUP does nothing yet, for the configuration is still to be read, unless the terminal hung up.
    """
    undo_inherited()
    for number in filter(can_be_heeded, OURS):
        if number in STOP:
            signal.signal(number, _leave_at_once)
        else:
            signal.signal(number, _leave_if_hung_up if number in HANG_UP else _wait_and_see)


def heed_as_worker() -> None:
    """Let signals that go to all processes of a terminal do nothing: the supervisor heeds them, and tells its workers.

    By functions of Python's, because children of the app would inherit that a signal is ignored (signal(7)).
    """
    for number in (*STOP, *HANG_UP):
        if number != signal.SIGTERM:
            signal.signal(number, _wait_and_see)
    undo_inherited()


def heed_as_template() -> None:
    """Let all signals that ask for something do nothing: a template ends when its supervisor wants it to."""
    for number in (*STOP, *HANG_UP):
        signal.signal(number, _wait_and_see)
    undo_inherited()


def undo_inherited() -> None:
    """Undo what the parent may have set, and exec(2) kept: signals blocked that flaskd heeds, children not waited for.

    Where SIGCHLD is ignored the kernel throws exit codes away (wait(2)), and `subprocess` says 0 for each.
    """
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (*OURS, signal.SIGCHLD))
        if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def can_be_heeded(number: int) -> bool:
    """Whether flaskd may have this signal for its own now.

    SIGTERM always: without it no service manager can stop us. What was ignored when we were started stays so: SIGHUP
    under nohup(1), SIGINT and SIGQUIT behind a script's `&`.
    """
    now = signal.getsignal(number)
    if number == signal.SIGTERM:
        return True
    if number in ALWAYS:
        return now is not signal.SIG_IGN
    return now is signal.SIG_DFL or now in _EARLY


def plain(number: int, disposition: Any) -> Any:
    """A disposition as it would be without flaskd: Python's own in the place of those that `heed_signals` set."""
    if disposition is None or disposition in _EARLY:
        return signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    return disposition


def _leave_at_once(_number: int, _frame: object) -> None:
    """Leave: nothing has been made yet, or all has been put away."""
    os._exit(0)


def _leave_if_hung_up(_number: int, _frame: object) -> None:
    if any(map(_hung_up, range(3))):
        os._exit(0)


def _hung_up(number: int) -> bool:
    """Whether a standard stream is a terminal that is gone: EIO is all that it answers then (Linux, tty_io.c)."""
    try:
        os.tcgetpgrp(number)
    except OSError as error:
        return error.errno == errno.EIO
    return False


def _wait_and_see(_number: int, _frame: object) -> None:
    """Do nothing: what it asks for there is not yet."""


_EARLY = (_leave_at_once, _leave_if_hung_up, _wait_and_see)
