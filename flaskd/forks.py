"""What a child that the app forks must not keep: flaskd's sockets and pipes, its lock, its ears for signals.

``subprocess`` closes all that by itself; ``os.fork`` and multiprocessing's fork method do not. A child that kept a
listener would keep clients waiting on it, and one that kept the signals would stop the daemon when it is terminated.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

_in_child: list[Callable[[], None]] = []
_mask = threading.local()


def _hold_signals() -> None:
    """Before the fork: a signal that comes to the child before it has forgotten us would still be heard by us."""
    _mask.before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP})


def _release_signals() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _mask.before)


def _forget() -> None:
    """Run in the child, in the only thread it has."""
    while _in_child:
        with contextlib.suppress(OSError, ValueError):
            _in_child.pop()()
    _release_signals()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_hold_signals, after_in_parent=_release_signals, after_in_child=_forget)


@contextlib.contextmanager
def forgotten_by_children(forget: Callable[[], None]) -> Iterator[None]:
    """While open, a forked child calls `forget` before anything else."""
    _in_child.append(forget)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            _in_child.remove(forget)
