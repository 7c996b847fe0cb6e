"""Starting the process of a worker or a template: a fresh interpreter that has the standard streams, and its wire."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from flaskd.errors import CannotCreateError, shortage
from flaskd.process.orphans import orphans

_BOOT = (
    "import gc, sys; gc.disable(); sys.path[:] = [*filter(None, sys.path), sys.argv[1]]; "
    "from flaskd.workers.{0} import main; main(*map(int, sys.argv[4:]))"
)
"""Imports make no garbage to look for. The working directory, which is the app's, is not looked in before the app is: a
file there may be called json.py."""
STACKS = signal.SIGRTMAX - 2
"""A process that gets it writes the stacks of its threads to the descriptor that it was given for that; its Python may
hang (faulthandler.register). The highest real-time signals are used by nothing that is known."""
STACKS_WITHIN = 0.5
"""Seconds that a process has for that, before it is killed for being late."""
_MOST_STACKS = 1 << 18
"""Bytes of stacks that are read."""
EX_LATE = 99
"""The exit code of a worker whose end was cut at last: of finalizers nothing can be told in another way."""
_HELD = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, STACKS)
"""Blocked until the worker has handlers for them: a Ctrl-C in the terminal goes to all processes there."""


_spawning = threading.Lock()
"""A descriptor that is given to one process is inherited by no other one."""


def spawn(slot: int | None, generation: int, descriptors: Sequence[int], environ: Mapping[str, str]) -> tuple[int, int]:
    """Start a worker, or without a slot a template; its pid and a pidfd. Raises CannotCreateError (any thread).

    `descriptors` are given to it.
    """
    with _spawning:
        return _spawn(slot, generation, descriptors, environ)


def _spawn(
    slot: int | None, generation: int, descriptors: Sequence[int], environ: Mapping[str, str]
) -> tuple[int, int]:
    place = str(Path(__file__).parents[2])  # where this flaskd is, should it be found by no other way
    what, name = ("template", "template") if slot is None else ("worker", f"worker={slot}")
    whom = "a template" if slot is None else f"worker {slot}"
    words = [place, name, f"generation={generation}", *map(str, descriptors)]
    command = [sys.executable, *subprocess._args_from_interpreter_flags(), "-c", _BOOT.format(what), *words]  # type: ignore[attr-defined]  # noqa: SLF001 - as multiprocessing does
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        for each in descriptors:
            os.set_inheritable(each, True)
        pid = os.posix_spawn(sys.executable, command, environ, setsigmask={*before, *_HELD})
    except OSError as error:
        raise CannotCreateError(f"cannot start {whom}: {sys.executable}: {error.strerror}") from error
    finally:
        for each in descriptors:
            os.set_inheritable(each, False)
    try:
        return pid, os.pidfd_open(pid)
    except OSError as error:
        os.kill(pid, signal.SIGKILL)  # it is not reaped, so the pid is its own
        os.waitpid(pid, 0)
        raise CannotCreateError(f"cannot start {whom}: {shortage(error) or error.strerror}") from error


class Stacks:
    """Where a process writes the stacks of its threads when it is asked to (any thread)."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("flaskd-stacks", os.MFD_CLOEXEC)
        self._lock = threading.Lock()

    def fileno(self) -> int:
        """The descriptor, to be given to the process."""
        return self._fd

    def clear(self) -> None:
        """Forget what was written."""
        with self._lock:
            if self._fd >= 0:
                os.ftruncate(self._fd, 0)
                os.lseek(self._fd, 0, os.SEEK_SET)  # it is where the process writes, too

    def read(self) -> str:
        """What was written; nothing once it is given back."""
        with self._lock:
            data = os.pread(self._fd, _MOST_STACKS, 0) if self._fd >= 0 else b""
        return data.decode("utf-8", "backslashreplace")

    def close(self) -> None:
        """Give it back."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = -1


def reap(pidfd: int) -> int:
    """Wait for the end of a process, and give its exit code; a signal's number is negative."""
    ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    assert ended is not None
    orphans.forget(ended.si_pid)
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def send_signal(pidfd: int, number: int) -> None:
    """Send a signal to a process that may be gone."""
    try:
        signal.pidfd_send_signal(pidfd, number)
    except OSError:  # it is
        return


def how(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"it left with the exit code {code}"
    try:
        return f"it was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"it was killed by signal {-code}"
