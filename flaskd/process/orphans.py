"""Orphans: descendants of this process whose parent has ended; they become its children if it asks the kernel for that.

A worker that is forked from a template becomes the supervisor's child in this way. So do orphans of the app, which are
reaped here. Orphans belong to the main thread, and other children to the thread that has started them. Only those of
the main thread are reaped, which does not use `subprocess`, so that loses no exit status.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
"""Options of prctl(2)."""
_WNOTHREAD = 0x20000000
"""Wait for children of the calling thread alone (waitid(2))."""


def _prctl(option: int, value: int) -> bool:
    """Call prctl(2); False if it failed, or Python has no ctypes, or the C library no prctl."""
    try:
        import ctypes  # noqa: PLC0415 - a large module, rarely needed

        return bool(ctypes.CDLL(None).prctl(option, value, 0, 0, 0) == 0)
    except (ImportError, OSError, AttributeError):
        return False


def end_with_parent() -> bool:
    """Have the kernel kill this process when the thread that started it ends; returns whether it will."""
    return _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Orphans:
    """The orphans of this process; all methods except `reap` are for any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._adopts = False
        self._expected = 0
        self._known: set[int] = set()

    def adopt(self) -> bool:
        """Become the parent of orphans from now on; returns whether the kernel supports that."""
        with self._lock:
            self._adopts = self._adopts or _prctl(_PR_SET_CHILD_SUBREAPER, 1)
            return self._adopts

    @contextlib.contextmanager
    def expected(self) -> Iterator[set[int]]:
        """Reap nothing while the block runs; pids that it adds to the given set are not reaped until `forget`."""
        with self._lock:
            self._expected += 1
        try:
            yield self._known
        finally:
            with self._lock:
                self._expected -= 1

    def forget(self, pid: int) -> None:
        """Note that a pid of that set was reaped elsewhere."""
        with self._lock:
            self._known.discard(pid)

    def reap(self) -> None:
        """Reap all ended orphans except those in that set (main thread)."""
        with self._lock:
            while self._adopts and not self._expected and self._reap_one():
                pass

    def _reap_one(self) -> bool:
        how = os.WEXITED | os.WNOHANG | _WNOTHREAD
        try:
            ended = os.waitid(os.P_ALL, 0, how | os.WNOWAIT)
            if ended is None or ended.si_pid in self._known:  # reaped elsewhere, in a moment
                return False
            os.waitid(os.P_PID, ended.si_pid, how)
        except ChildProcessError:
            return False
        return True


orphans = Orphans()
"""The one object for this process."""
