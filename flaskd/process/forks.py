"""What a child that the app forks must not keep, and how it ends when it returns from the app's code.

``subprocess`` closes flaskd's sockets, pipes, lock and signal descriptors in its children by itself; ``os.fork``,
``pty.fork`` and multiprocessing's fork method do not. A child that kept a listener would keep clients waiting on it,
and one that kept the signal descriptors would stop the daemon when it is terminated. A child that returned into
flaskd's code would be a second daemon: it would answer requests twice, and remove the nodes of the first one.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import NoReturn, Self

_in_child: list[Callable[[], None]] = []
_mask = threading.local()
_EVERY = signal.valid_signals()
_forks = 0
"""How many forks there were between the first process and this one."""


def _hold_signals() -> None:
    """Block all signals before the fork: one that the child gets before `_forget` would still reach the parent."""
    _mask.before = signal.pthread_sigmask(signal.SIG_BLOCK, _EVERY)


def _release_signals() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _mask.before)


def _forget() -> None:
    """Call all functions of `forgotten_by_children`; runs in the child, in its only thread."""
    global _forks  # noqa: PLW0603 - a count of the process; os.getpid() would cost a system call
    _forks += 1
    try:
        while _in_child:
            with contextlib.suppress(OSError, ValueError):
                _in_child.pop()()
    finally:
        _release_signals()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_hold_signals, after_in_parent=_release_signals, after_in_child=_forget)


@contextlib.contextmanager
def forgotten_by_children(forget: Callable[[], None]) -> Iterator[None]:
    """Have every child that is forked while the block runs call `forget` first."""
    _in_child.append(forget)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            _in_child.remove(forget)


class AppCode:
    """A context in which code of the app runs: a child that is forked inside of it ends where it would leave it.

    The child ends as it would without flaskd: with the exception that leaves the app's code, with the exit code of
    SystemExit, else with 0. Its exit callbacks run, but no code of flaskd does.
    """

    __slots__ = ("_forks",)

    def __init__(self) -> None:
        self._forks = _forks

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: TracebackType | None) -> None:
        self.check(error)

    def check(self, error: BaseException | None = None) -> None:
        """End the process if it is such a child: for code of flaskd's that the app calls, or that runs in between.

        `error` is what came out of the app's code, if anything did.
        """
        if self._forks != _forks:
            end_child(error)


def end_child(error: BaseException | None = None) -> NoReturn:
    """End a forked child as the interpreter would: write the error, join threads, run exit callbacks, flush streams."""
    code, words = _outcome(error)
    try:
        if words:
            with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or never open
                sys.stderr.write(words)
        threading._shutdown()  # type: ignore[attr-defined]  # noqa: SLF001 - as Py_FinalizeEx, in this order
        atexit._run_exitfuncs()  # noqa: SLF001 - as multiprocessing does it in its children
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        if isinstance(error, KeyboardInterrupt):  # its parent should see that it was interrupted
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        os._exit(code)


def _outcome(error: BaseException | None) -> tuple[int, str]:
    """The exit code for the exception that left the app's code, and the text to write (sys.exit, sys.excepthook)."""
    if isinstance(error, SystemExit):
        if error.code is None or isinstance(error.code, int):
            return (error.code or 0) & 0xFF, ""
        return 1, f"{error.code}\n"
    if error is not None:
        return 1, "".join(traceback.format_exception(error))
    return 0, (
        f"flaskd: the child process {os.getpid()}, which the app forked, returned from the app's code, and is ended: "
        "it is not the daemon; let the app end it with os._exit or sys.exit\n"
    )
