"""What PID 1 owes to the other processes of its container: to pass signals on, and to reap orphans.

The daemon cannot reap by itself: a `waitpid(-1)` would take the exit statuses of the app's own children from under
`subprocess`. So where flaskd is PID 1, a small parent does it, and the daemon is its child.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

_PASSED_ON = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGWINCH", "SIGCONT")


def stand_in_front() -> None:
    """As PID 1: fork; the child returns and is the daemon, the parent never returns and exits as the child did.

    Elsewhere: nothing. To be called before there are threads.
    """
    if os.getpid() != 1:
        return
    numbers = {getattr(signal, name) for name in _PASSED_ON}
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)  # a signal that comes now is passed on in a moment
    child = os.fork()
    if child == 0:
        if os.environ.get("LISTEN_PID") == "1":
            os.environ["LISTEN_PID"] = str(os.getpid())  # the sockets passed to PID 1 are the daemon's
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
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
