"""Descriptors that an app cannot use up: control, health and the stop work when it has leaked all that there are.

The soft limit (RLIMIT_NOFILE, getrlimit(2)) is a bound for the numbers of new descriptors. It is set below what the
process may have, and raised for the moment in which flaskd itself opens one. What was opened keeps its number, above
the limit; when it is closed, that number is free again, and the app cannot have it.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")

_SIZE = 48
_SHARE = 8
"""Of few descriptors, one in so many is kept."""
_LAST = 8
"""How many are kept from the cleanup, too: for the record, and who asks how it goes."""


class Reserve:
    """The reserve of this process; without `kept` there is none, and nothing here does anything."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._size = self._users = 0

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """While open, some of the descriptors that the process may have are kept."""
        with self._lock:
            self._resize(min(_SIZE, _soft_limit() // _SHARE))
        try:
            yield
        finally:
            with self._lock:
                self._resize(0)

    def share(self) -> None:
        """Let the whole process have all but the last of them: the cleanup needs descriptors, too."""
        with self._lock:
            self._resize(min(self._size, _LAST))

    def forget(self) -> None:
        """In a forked child: keep none, whoever held the lock."""
        self._lock = threading.Lock()
        if not self._users:
            _move(self._size)
        self._size = self._users = 0

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """While open, descriptors of the reserve are given; to be held for a moment only (any thread)."""
        with self._lock:
            self._users += 1
            if self._users == 1:
                _move(self._size)
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    _move(-self._size)

    def open(self, make: Callable[[], T]) -> T:
        """What `make` opens, also when only the reserve has descriptors left; raises what it raises (any thread)."""
        try:
            return make()
        except OSError as error:
            if error.errno != errno.EMFILE or not self._size:
                raise
        with self.used():
            return make()

    def _resize(self, size: int) -> None:
        if not self._users:
            _move(self._size - size)
        self._size = size


def _soft_limit() -> int:
    """The soft limit; 0 where there is none, and so no reserve is needed or can be had."""
    try:
        import resource  # noqa: PLC0415 - not on Windows
    except ImportError:
        return 0
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 0 if soft == resource.RLIM_INFINITY else soft


def _move(by: int) -> None:
    """Raise the soft limit, or lower it: relatively, since others may set it, too (prlimit(1))."""
    if by and (soft := _soft_limit()):
        import resource  # noqa: PLC0415 - there is a limit

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = soft + by if hard == resource.RLIM_INFINITY else min(soft + by, hard)
        with contextlib.suppress(ValueError, OSError):  # then the reserve is not to be had
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(0, wanted), hard))


reserve = Reserve()
"""The limit is the process', and so is its reserve."""
