"""How many descriptors this process may have open (RLIMIT_NOFILE, getrlimit(2)), and a reserve that the app cannot use.

The soft limit bounds the numbers of new descriptors. Programs that the app starts inherit it, and some cannot deal with
a large one: those that use select(2), or close each number up to the limit. So the soft limit stays as it was until
the open descriptors come near it; then it is raised, and lowered again when there are fewer.

Some descriptors below the hard limit are reserved for flaskd, so that control, health and the stop work when the app
has leaked all others. The soft limit is raised above them only for the moment in which flaskd opens one. A descriptor
that is opened then has a number above the app's limit; when it is closed, the app cannot get that number.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_WITHOUT_A_LIMIT = 512
_KEPT = 48
_SHARE = 8
"""If the hard limit is low, one in this many descriptors is reserved."""
_LAST = 8
"""How many are reserved during the cleanup: for the record, and for questions about its progress."""


class OpenFiles:
    """The soft limit of this process: raised while that is needed, with a reserve below the hard limit.

    Nothing here changes the limit before `limit(raised=True)` is called or `reserve` is entered.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._own = self._given = 0
        """The soft limit apart from this object, and the one that this object set last; 0 before it changed any."""
        self._may_be_raised = self._raised = False
        self._kept = self._users = 0

    def limit(self, *, raised: bool = False) -> int:
        """The soft limit; with `raised` the hard one, to which it may be raised from now on; 512 if there is none."""
        soft, hard = _limits()
        if not soft:
            return _WITHOUT_A_LIMIT
        if not raised:
            return soft
        with self._lock:
            # Raising it is tried once, so that the number returned is one that can be reached.
            if not self._may_be_raised and soft != hard and _set(hard):
                self._may_be_raised = _set(soft)
                self._begin(soft)
        return hard if self._may_be_raised else soft

    def make_room(self, fd: int | None = None) -> bool:
        """Raise the limit if `fd`, which was just opened, is near it, or none could be opened (None).

        Returns whether it was raised. The kernel gives the lowest free number (open(2)), so at least `fd` descriptors
        are open.
        """
        if self._raised or not self._may_be_raised or (fd is not None and fd < self._own - self._own // 4):
            return False
        with self._lock:
            self._raised = True
            self._raised = self._apply()
        return self._raised

    def adjust(self) -> None:
        """Raise the limit if the app has opened many descriptors, or lower it again; to be called now and then."""
        if not self._may_be_raised:
            return
        try:
            free = os.dup(2)
        except OSError as error:
            if error.errno == errno.EMFILE:
                self.make_room()
            return
        os.close(free)
        self.make_room(free)
        if self._raised and free < self._own // 2:
            with contextlib.suppress(OSError):
                if len(list(Path("/proc/self/fd").iterdir())) < self._own // 2:
                    with self._lock:
                        self._raised = False
                        self._apply()

    @contextlib.contextmanager
    def reserve(self) -> Iterator[None]:
        """Reserve some of the process' descriptors for flaskd while the block runs."""
        soft, hard = _limits()
        with self._lock:
            if soft:
                self._begin(soft)
                self._kept = min(_KEPT, hard // _SHARE)
                self._apply()
        try:
            yield
        finally:
            with self._lock:
                self._kept = 0
                self._apply()

    def share(self) -> None:
        """Reduce the reserve to `_LAST` descriptors, because the app's cleanup needs descriptors, too."""
        with self._lock:
            self._kept = min(self._kept, _LAST)
            self._apply()

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Let this process open descriptors of the reserve while the block runs, for a moment only (any thread)."""
        with self._lock:
            self._users += 1
            self._apply()
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                self._apply()

    def open(self, make: Callable[[], T]) -> T:
        """Return what `make` opens, from the reserve if no other descriptor is free; raises its errors (any thread)."""
        try:
            return make()
        except OSError as error:
            if error.errno != errno.EMFILE or not self._kept:
                raise
        with self.used():
            return make()

    def forget(self) -> None:
        """In a forked child, restore the limit; the lock is made anew, because another thread may have held it."""
        own, given = self._own, self._given
        self._lock = threading.Lock()
        self._own = self._given = self._kept = self._users = 0
        self._may_be_raised = self._raised = False
        if own != given:
            _set(own)

    def _begin(self, soft: int) -> None:
        if not self._own:
            self._own = self._given = soft

    def _apply(self) -> bool:
        """Set the limit that should be in force now; returns whether that worked. The caller holds the lock."""
        soft, hard = _limits()
        if not self._own or not soft:
            return False
        if soft != self._given:  # another program has set it (prlimit(1))
            self._own = soft
        wanted = min(hard if self._raised else self._own, hard - self._kept)
        if self._users:
            wanted = min(wanted + self._kept, hard)
        self._given = wanted if wanted == soft or _set(wanted) else soft
        return self._given == wanted


def _limits() -> tuple[int, int]:
    """The soft and the hard limit; both 0 if one of them is unlimited, or the system has none."""
    try:
        import resource  # noqa: PLC0415 - not on Windows
    except ImportError:
        return 0, 0
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (0, 0) if resource.RLIM_INFINITY in {soft, hard} else (soft, hard)


def _set(soft: int) -> bool:
    import resource  # noqa: PLC0415 - not on Windows

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, hard), hard))
    except (ValueError, OSError):
        return False
    return True


open_files = OpenFiles()
"""The one object for this process."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=open_files.forget)
