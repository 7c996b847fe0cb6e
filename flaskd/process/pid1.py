"""What PID 1 owes to the other processes of its container: to pass signals on, and to reap orphans.

The daemon cannot reap by itself: a `waitpid(-1)` would take the exit statuses of the app's own children from under
`subprocess`. So where flaskd is PID 1, a small parent does it, and the daemon is its child.
"""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType

_KEPT = (
    *("SIGKILL", "SIGSTOP", "SIGCHLD"),  # the first two cannot be caught, the third is PID 1's own
    *("SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGABRT", "SIGTRAP", "SIGSYS"),  # a fault of PID 1 itself
    *("SIGPIPE", "SIGXFSZ"),  # ignored by every Python
)
"""All others are passed on: to PID 1 the kernel gives only what it has a handler for (pid_namespaces(7)), and which
ones the app handles is not known here."""


def stand_in_front() -> None:
    """As PID 1: fork; the child returns and is the daemon, the parent never returns and exits as the child did.

    Elsewhere: nothing. To be called before there are threads.
    """
    if os.getpid() != 1:
        return
    numbers = signal.valid_signals() - {getattr(signal, name) for name in _KEPT}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)  # a signal that comes now is passed on in a moment
    child = os.fork()
    if child == 0:
        if os.environ.get("LISTEN_PID") == "1":
            os.environ["LISTEN_PID"] = str(os.getpid())  # the sockets passed to PID 1 are the daemon's
        _be_alone_at_the_terminal()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return

    def pass_on(number: int, _frame: FrameType | None) -> None:
        os.kill(child, number)  # it is not reaped yet, so the pid is its own

    for number in numbers:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    while True:
        # Look first: once the daemon is reaped, nothing may be passed on to its pid.
        ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
        if ended is not None and ended.si_pid == child:
            signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        if ended is not None:
            _, status = os.waitpid(ended.si_pid, 0)
            if ended.si_pid == child:
                code = os.waitstatus_to_exitcode(status)
                os._exit(code if code >= 0 else 128 - code)


def _be_alone_at_the_terminal() -> None:
    """Take the daemon out of PID 1's process group: what is sent to that, a Ctrl-C for one, came twice otherwise.

    Once from the terminal, and once more when PID 1, which may be slow, passes it on. The new group is given the
    terminal where PID 1's had it; SIGTTOU, which that would send, is blocked here.
    """
    os.setpgid(0, 0)
    with contextlib.suppress(OSError):  # there is none (tty(4)), or it has hung up
        terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY)
        if os.tcgetpgrp(terminal) == os.getpgid(os.getppid()):
            os.tcsetpgrp(terminal, os.getpgrp())
        os.close(terminal)
