"""The duties of PID 1 in a container: to pass signals on, and to reap orphans.

The daemon cannot reap orphans itself: `waitpid(-1)` would also take the exit statuses of the app's own children, for
which `subprocess` waits. So if flaskd is PID 1, a small parent process does it, and the daemon is its child.
"""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType

_KEPT = (
    *("SIGKILL", "SIGSTOP", "SIGCHLD"),  # the first two cannot be caught, the third is for PID 1
    *("SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGABRT", "SIGTRAP", "SIGSYS"),  # a fault of PID 1 itself
    *("SIGPIPE", "SIGXFSZ"),  # ignored by every Python
)
"""The signals that are not passed on. All others are: the kernel gives PID 1 only signals for which it has a handler
(pid_namespaces(7)), and which ones the app handles is not known here."""


def stand_in_front() -> None:
    """As PID 1, fork: the child returns and becomes the daemon; the parent never returns, and exits as the child did.

    In another process, do nothing. To be called before threads are started.
    """
    if os.getpid() != 1:
        return
    numbers = signal.valid_signals() - {getattr(signal, name) for name in _KEPT}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)  # a signal that comes now is passed on later
    child = os.fork()
    if child == 0:
        if os.environ.get("LISTEN_PID") == "1":
            os.environ["LISTEN_PID"] = str(os.getpid())  # the sockets passed to PID 1 are the daemon's
        _be_alone_at_the_terminal()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return

    def pass_on(number: int, _frame: FrameType | None) -> None:
        os.kill(child, number)  # it was not reaped, so no other process has this pid

    for number in numbers:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    while True:
        # Look before reaping: after the daemon was reaped, no signal may be sent to its pid.
        ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
        if ended is not None and ended.si_pid == child:
            signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        if ended is not None:
            _, status = os.waitpid(ended.si_pid, 0)
            if ended.si_pid == child:
                code = os.waitstatus_to_exitcode(status)
                os._exit(code if code >= 0 else 128 - code)


def _be_alone_at_the_terminal() -> None:
    """Move the daemon to a process group of its own; otherwise a Ctrl-C would reach it twice.

    The terminal would send it to the whole group, and PID 1, which may be slow, would pass it on. If the group of PID 1
    has the terminal, the new group gets it; SIGTTOU, which the kernel sends for that, is blocked here.
    """
    os.setpgid(0, 0)
    with contextlib.suppress(OSError):  # there is no terminal (tty(4)), or it hung up
        terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY)
        if os.tcgetpgrp(terminal) == os.getpgid(os.getppid()):
            os.tcsetpgrp(terminal, os.getpgrp())
        os.close(terminal)
