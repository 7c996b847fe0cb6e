"""The processes of the first workers: forked from the supervisor before it has other threads.

A fork has what the supervisor has imported. Otherwise the first answer waits for two imports of flaskd, one after the
other. Later workers are new processes (`flaskd.pool.spawn`), because they are to have the files as they are then.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from flaskd.pool.spawn import HELD, reap, send_signal
from flaskd.pool.wire import Wire, WireClosedError
from flaskd.process.bootstrap import OURS
from flaskd.process.orphans import orphans
from flaskd.sockets import close_passed

Run = Callable[[int, int, int], None]
"""What a worker's process runs, with its descriptors: `flaskd.workers.worker.main`."""


class Early:
    """A process that was forked early, and waits to become a worker; it ends when `end` is called, or flaskd ends."""

    def __init__(self, pid: int, wire: Wire) -> None:
        self.pid, self.pidfd, self._wire = pid, os.pidfd_open(pid), wire
        with orphans.expected() as known:
            known.add(pid)  # it is a child of the main thread, but is reaped as all workers are

    def become(self, environ: Mapping[str, str], descriptors: Sequence[int]) -> tuple[int, int] | None:
        """Have it run a worker with this environment and these descriptors.

        Returns its pid and its pidfd, which the caller must close; None if it has ended.
        """
        try:
            self._wire.send(dict(environ), descriptors)
        except WireClosedError:
            self.end()
            return None
        self._wire.close()
        pidfd, self.pidfd = self.pidfd, -1
        return self.pid, pidfd

    def end(self) -> None:
        """End it, unless it has become a worker or has ended."""
        pidfd, self.pidfd = self.pidfd, -1
        if pidfd >= 0:
            send_signal(pidfd, signal.SIGKILL)
            reap(pidfd)
            os.close(pidfd)
            self._wire.close()

    def forget(self) -> None:
        """In a forked child, close the copies of its descriptors."""
        os.close(self.pidfd)
        self._wire.forget()


def fork_early(count: int, run: Run) -> list[Early]:
    """Fork `count` processes that will run workers; fewer, if there is no room for more or there are other threads."""
    made: list[Early] = []
    before = signal.pthread_sigmask(signal.SIG_BLOCK, HELD)
    gc.freeze()  # the collectors of the children do not write to these objects, so their memory stays shared
    while len(made) < count and _is_alone() and (forked := _fork()):
        pid, ours, theirs = forked
        if pid == 0:
            for each in made:
                each.forget()
            ours.forget()
            _be_forked(theirs, run)
        theirs.close()
        try:
            made.append(Early(pid, ours))
        except OSError:  # no descriptor, or no pidfd_open(2): the child ends, because its wire does
            ours.close()
            os.waitpid(pid, 0)
            break
    gc.unfreeze()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return made


def _fork() -> tuple[int, Wire, socket.socket] | None:
    """Fork: returns the pid, 0 in the child, and both ends of its wire; None if there is no room for a process."""
    try:
        ours, theirs = Wire.pair()
    except OSError:
        return None
    try:
        return os.fork(), ours, theirs
    except OSError:
        ours.close()
        theirs.close()
        return None


def _is_alone() -> bool:
    """Whether this process has one thread: a fork while others hold locks would keep these locked for ever."""
    return len(os.listdir("/proc/self/task")) == 1  # noqa: PTH208 - a count


def _be_forked(theirs: socket.socket, run: Run) -> NoReturn:
    """In the child: wait to become a worker, with signals as a new process has them."""
    for number in OURS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    close_passed(os.environ, os.getppid())
    wire = Wire(theirs)
    try:
        environ, descriptors = wire.receive()
    except WireClosedError:
        os._exit(0)
    wire.close()
    os.environ.clear()
    os.environ.update(environ)
    run(*descriptors)
    raise AssertionError  # a worker ends its process
