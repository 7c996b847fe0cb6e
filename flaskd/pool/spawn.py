"""Starting the process of a worker or a template: a new interpreter with the standard streams and its wire."""

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
"""The program of the new process. Garbage collection is off, because imports make no garbage. The working directory is
not on sys.path yet: a file of the app there may be called json.py."""
STACKS = signal.SIGRTMAX - 2
"""The signal at which a process writes the stacks of its threads to its descriptor for them, even if its Python code
hangs (faulthandler.register). No program is known that uses the highest real-time signals."""
STACKS_WITHIN = 0.5
"""Seconds that a late process has to write its stacks before it is killed."""
_MOST_STACKS = 1 << 18
"""Most bytes of stacks that are read."""
EX_LATE = 99
"""The exit code of a worker whose finalizers were cut; by then it cannot say so in another way."""
HELD = (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, STACKS)
"""Signals that stay blocked until the worker has handlers for them: a Ctrl-C goes to all processes of a terminal."""


_spawning = threading.Lock()
"""Held while a process is started, so that no other new process inherits the descriptors that are meant for it."""


def spawn(slot: int | None, generation: int, descriptors: Sequence[int], environ: Mapping[str, str]) -> tuple[int, int]:
    """Start a worker, or a template if `slot` is None; returns its pid and a pidfd (any thread).

    The process inherits `descriptors`. Raises CannotCreateError.
    """
    with _spawning:
        return _spawn(slot, generation, descriptors, environ)


def _spawn(
    slot: int | None, generation: int, descriptors: Sequence[int], environ: Mapping[str, str]
) -> tuple[int, int]:
    place = str(Path(__file__).parents[2])  # the directory of this flaskd, for sys.path
    what, name = ("template", "template") if slot is None else ("worker", f"worker={slot}")
    whom = "a template" if slot is None else f"worker {slot}"
    words = [place, name, f"generation={generation}", *map(str, descriptors)]
    command = [sys.executable, *subprocess._args_from_interpreter_flags(), "-c", _BOOT.format(what), *words]  # type: ignore[attr-defined]  # noqa: SLF001 - as multiprocessing does
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        for each in descriptors:
            os.set_inheritable(each, True)
        pid = os.posix_spawn(sys.executable, command, environ, setsigmask={*before, *HELD})
    except OSError as error:
        raise CannotCreateError(f"cannot start {whom}: {sys.executable}: {error.strerror}") from error
    finally:
        for each in descriptors:
            os.set_inheritable(each, False)
    try:
        return pid, os.pidfd_open(pid)
    except OSError as error:
        os.kill(pid, signal.SIGKILL)  # it was not reaped, so no other process has this pid
        os.waitpid(pid, 0)
        raise CannotCreateError(f"cannot start {whom}: {shortage(error) or error.strerror}") from error


class Stacks:
    """The memory to which a process writes the stacks of its threads at the signal `STACKS` (any thread)."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("flaskd-stacks", os.MFD_CLOEXEC)
        self._lock = threading.Lock()

    def fileno(self) -> int:
        """The descriptor, which the process is to inherit."""
        return self._fd

    def clear(self) -> None:
        """Delete what was written."""
        with self._lock:
            if self._fd >= 0:
                os.ftruncate(self._fd, 0)
                os.lseek(self._fd, 0, os.SEEK_SET)  # the process shares this position

    def read(self) -> str:
        """What was written, at most `_MOST_STACKS` bytes; empty after `close`."""
        with self._lock:
            data = os.pread(self._fd, _MOST_STACKS, 0) if self._fd >= 0 else b""
        return data.decode("utf-8", "backslashreplace")

    def close(self) -> None:
        """Close the descriptor."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = -1


def reap(pidfd: int) -> int:
    """Wait for the end of a process; returns its exit code, or the negative number of the signal that killed it."""
    ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    assert ended is not None
    orphans.forget(ended.si_pid)
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def send_signal(pidfd: int, number: int) -> None:
    """Send a signal to a process; do nothing if it has ended."""
    try:
        signal.pidfd_send_signal(pidfd, number)
    except OSError:  # it has ended
        return


def how(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"it left with the exit code {code}"
    try:
        return f"it was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"it was killed by signal {-code}"
