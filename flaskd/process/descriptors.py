"""How many descriptors this process may have open (RLIMIT_NOFILE, getrlimit(2)), and those that an app cannot use up.

The soft limit bounds the numbers of new descriptors. Programs that the app starts inherit it, and some cannot do with a
large one: what uses select(2), or closes each number up to the limit. So it stays as it was until descriptors come near
it, is raised then, and falls back when they do not.

Below the hard limit some are kept for flaskd: control, health and the stop work when the app has leaked all that there
are. The soft limit is raised over them for the moment in which flaskd opens one. What was opened keeps its number,
above the app's limit; when it is closed, that number is free again, and the app cannot have it.
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
"""Of few descriptors, one in so many is kept."""
_LAST = 8
"""How many are kept from the cleanup, too: for the record, and who asks how it goes."""


class OpenFiles:
    """The soft limit of this process: raised while it is needed, with some descriptors kept below the hard one.

    Until `limit` is asked for the raised one, or `reserve` is entered, nothing here changes it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._own = self._given = 0
        """The soft limit without what is done here, and the one that was set here last; 0 before anything is."""
        self._may_be_raised = self._raised = False
        self._kept = self._users = 0

    def limit(self, *, raised: bool = False) -> int:
        """The soft limit; with `raised` the hard one, which may be set from now on; 512 where there is none."""
        soft, hard = _limits()
        if not soft:
            return _WITHOUT_A_LIMIT
        if not raised:
            return soft
        with self._lock:
            # Tried once: a number that it says can be had must be one that can.
            if not self._may_be_raised and soft != hard and _set(hard):
                self._may_be_raised = _set(soft)
                self._begin(soft)
        return hard if self._may_be_raised else soft

    def make_room(self, fd: int | None = None) -> bool:
        """Raise the limit when the descriptor that was just opened is near it, or none could be (None); whether it was.

        The kernel gives the lowest free number (open(2)), so there are at least as many open as the number says.
        """
        if self._raised or not self._may_be_raised or (fd is not None and fd < self._own - self._own // 4):
            return False
        with self._lock:
            self._raised = True
            self._raised = self._apply()
        return self._raised

    def adjust(self) -> None:
        """Look how many are open, once in a while: raise the limit for what the app has opened, or take it back."""
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
        """While open, some of the descriptors that the process may have are kept for flaskd."""
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
        """Let the whole process have all but the last of them: the cleanup needs descriptors, too."""
        with self._lock:
            self._kept = min(self._kept, _LAST)
            self._apply()

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """While open, descriptors of the reserve are given; to be held for a moment only (any thread)."""
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
        """What `make` opens, also when only the reserve has descriptors left; raises what it raises (any thread)."""
        try:
            return make()
        except OSError as error:
            if error.errno != errno.EMFILE or not self._kept:
                raise
        with self.used():
            return make()

    def forget(self) -> None:
        """In a forked child: the limit is what it was before, whoever held the lock."""
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
        """Set the limit that is to be in force now; whether it is. The lock is held."""
        soft, hard = _limits()
        if not self._own or not soft:
            return False
        if soft != self._given:  # others may set it, too (prlimit(1))
            self._own = soft
        wanted = min(hard if self._raised else self._own, hard - self._kept)
        if self._users:
            wanted = min(wanted + self._kept, hard)
        self._given = wanted if wanted == soft or _set(wanted) else soft
        return self._given == wanted


def _limits() -> tuple[int, int]:
    """The soft and the hard limit; 0 where there is none."""
    try:
        import resource  # noqa: PLC0415 - not on Windows
    except ImportError:
        return 0, 0
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (0, 0) if resource.RLIM_INFINITY in {soft, hard} else (soft, hard)


def _set(soft: int) -> bool:
    import resource  # noqa: PLC0415 - there is a limit

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, hard), hard))
    except (ValueError, OSError):
        return False
    return True


open_files = OpenFiles()
"""The limit is the process'."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=open_files.forget)
