"""Orphans: descendants of this process whose parent has ended, which become its own children once it asks for that.

A worker that is forked from a template becomes the supervisor's child in this way. So do the orphans of the app; they
are reaped here. The kernel gives orphans to the main thread, and a child to the thread that has started it: so no exit
status is taken from `subprocess`, which is not used in the main thread here.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
"""prctl(2)."""
_WNOTHREAD = 0x20000000
"""Of the children of the calling thread alone (waitid(2))."""


def _prctl(option: int, value: int) -> bool:
    """Whether the kernel did it; where Python has no ctypes, or the C library no prctl, it did not."""
    try:
        import ctypes  # noqa: PLC0415 - a large module, and few need it

        return bool(ctypes.CDLL(None).prctl(option, value, 0, 0, 0) == 0)
    except (ImportError, OSError, AttributeError):
        return False


def end_with_parent() -> bool:
    """Have the kernel kill this process when the thread that started it ends; whether it will."""
    return _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Orphans:
    """Those of this process; all is for any thread, except `reap`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._adopts = False
        self._expected = 0
        self._known: set[int] = set()

    def adopt(self) -> bool:
        """Have all orphans from now on; whether the kernel gives them to this process."""
        with self._lock:
            self._adopts = self._adopts or _prctl(_PR_SET_CHILD_SUBREAPER, 1)
            return self._adopts

    @contextlib.contextmanager
    def expected(self) -> Iterator[set[int]]:
        """While open, none is reaped here; the pids that are put into what it gives never are, until `forget`."""
        with self._lock:
            self._expected += 1
        try:
            yield self._known
        finally:
            with self._lock:
                self._expected -= 1

    def forget(self, pid: int) -> None:
        """It was reaped by who knows it."""
        with self._lock:
            self._known.discard(pid)

    def reap(self) -> None:
        """Reap those that have ended and are not known (main thread)."""
        with self._lock:
            while self._adopts and not self._expected and self._reap_one():
                pass

    def _reap_one(self) -> bool:
        how = os.WEXITED | os.WNOHANG | _WNOTHREAD
        try:
            ended = os.waitid(os.P_ALL, 0, how | os.WNOWAIT)
            if ended is None or ended.si_pid in self._known:  # who knows it reaps it in a moment
                return False
            os.waitid(os.P_PID, ended.si_pid, how)
        except ChildProcessError:
            return False
        return True


orphans = Orphans()
"""They are the process'."""
