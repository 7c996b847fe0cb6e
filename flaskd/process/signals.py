"""Signals: the interpreter writes them to its wakeup descriptor, and a thread of flaskd reads them from there.

The thread sees a signal within microseconds, even while the main thread sleeps in an import or in C code; only code
that holds the GIL can delay it. The descriptor reports every signal for which Python has a handler, including the
app's; flaskd handles only those of `flaskd.process.bootstrap.OURS`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Self

from flaskd.process.bootstrap import ALWAYS, NOTED, OURS, STOP, can_be_heeded, plain, undo_inherited
from flaskd.process.forks import forgotten_by_children

log = logging.getLogger("flaskd.signals")

_REMARKS = {
    "SIGUSR1": "there are no log files to reopen, flaskd writes to standard error",
    "SIGUSR2": "flaskd does not start a new flaskd by itself; restart it to run new code",
    "SIGTTIN": "the number of threads is server.threads in the configuration; reload after a change",
    "SIGTTOU": "the number of threads is server.threads in the configuration; reload after a change",
}
"""What the log says at a signal that has a meaning for other servers, and does nothing here."""


class SignalWatch:
    """While the block runs, signals call `receive(number)` in a thread of their own; to be entered in the main thread.

    These signals are SIGTERM, SIGINT, SIGHUP, and SIGQUIT if the app has no handler for it. At SIGUSR1, SIGUSR2,
    SIGTTIN and SIGTTOU, the log says that they do nothing. At a signal that the app handles, `wake` is called, which
    has to wake the main thread: Python runs the handler there, but the kernel may have interrupted another thread.
    Leaving the block restores the handlers that were there before.
    """

    def __init__(self, receive: Callable[[int], None], wake: Callable[[], None]) -> None:
        self._receive = receive
        self._wake = wake
        self._before: dict[int, Any] = {}
        self._wakeup_before = -1
        self._thread = threading.Thread(target=self._listen, name="flaskd-signals", daemon=True)
        self._handler = self._recorded

    def __enter__(self) -> Self:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._thread.start()  # first: if it fails, nothing has been changed
        self.terminal = Terminal()
        undo_inherited()
        self._wakeup_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in filter(can_be_heeded, OURS):
            self._before[number] = signal.signal(number, self._handler)
        ignored = [each.name for each in OURS if each not in self._before and signal.getsignal(each) is signal.SIG_IGN]
        if ignored:
            log.info(f"{', '.join(ignored)}: ignored, as it was when flaskd was started (by nohup, or & in a script)")
        self._forgotten = forgotten_by_children(self._forget)
        self._forgotten.__enter__()
        return self

    def _recorded(self, number: int, _frame: FrameType | None) -> None:
        """Write the number to the descriptor, unless the interpreter has done so; the app may have replaced that."""
        if self._wakes_us():
            return
        with contextlib.suppress(OSError):
            self._writer.send(bytes([number]))

    def _wakes_us(self) -> bool:
        """Make sure that the wakeup descriptor is flaskd's; returns whether it was already."""
        ours = self._writer.fileno()
        return signal.set_wakeup_fd(ours, warn_on_full_buffer=False) == ours

    def _forget(self) -> None:
        """In a forked child, restore the dispositions without flaskd, so that its signals do not reach this process."""
        signal.set_wakeup_fd(-1)
        for number, before in self._before.items():
            if number in ALWAYS or signal.getsignal(number) == self._handler:
                signal.signal(number, plain(number, before))
        self._reader.close()
        self._writer.close()

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            if number in ALWAYS or signal.getsignal(number) == self._handler:
                # None means a handler of C code, which Python cannot restore; the default is set instead.
                signal.signal(number, signal.SIG_DFL if before is None else before)
        signal.set_wakeup_fd(self._wakeup_before)
        self._forgotten.__exit__(None, None, None)
        self._writer.shutdown(socket.SHUT_RDWR)  # the thread reads the end, even if a forked child has a copy
        self._writer.close()
        if self._thread is not threading.current_thread():
            self._thread.join()
        self._reader.close()

    def reclaim(self) -> None:
        """Take SIGTERM, SIGINT and SIGHUP back from handlers of the app or of its C libraries, and log that.

        Python does not see a handler that C code has set, so flaskd's handlers are set again in any case. The kernel
        tells whether there was a handler at all (SigCgt: proc_pid_status(5)).
        """
        self.terminal.look()
        caught = _caught()
        for number in ALWAYS & self._before.keys():
            name = signal.Signals(number).name
            if signal.signal(number, self._handler) != self._handler:
                log.warning(f"the app installed its own handler for {name}; flaskd takes it back")
            elif not caught >> (number - 1) & 1:
                log.warning(f"C code removed the handler for {name}; flaskd sets it again")
        if not self._wakes_us():
            log.warning("the app set a signal wakeup descriptor of its own; flaskd takes it back")

    def poke(self) -> None:
        """Call `receive(0)` in the signal thread."""
        with contextlib.suppress(OSError):
            self._writer.send(b"\0")

    def _listen(self) -> None:
        if hasattr(signal, "pthread_sigmask"):
            # The app may block signals in its threads: in this one they still arrive (signal(7), "Signal mask").
            signal.pthread_sigmask(signal.SIG_UNBLOCK, OURS)
        while numbers := self._reader.recv(64):
            for number in numbers:
                try:
                    self._heed(number)
                except Exception:  # the next signal must still be handled
                    log.exception(f"cannot deal with signal {number}")

    def _heed(self, number: int) -> None:
        """Pass on a signal of flaskd; for a signal that the app handles, call `wake`."""
        if number == 0 or number in ALWAYS:
            self._receive(number)
        elif number not in self._before or signal.getsignal(number) != self._handler:
            self._wake()
        elif number in STOP:
            self._receive(number)
        elif number in NOTED:
            self._remark(number)

    def _remark(self, number: int) -> None:
        name = signal.Signals(number).name
        if name.startswith("SIGTT") and self.terminal.keeps_us_in_the_background():
            # The kernel sent it for a read or write on the terminal, which is repeated, and would send it for ever.
            log.warning(f"{name}: the terminal belongs to another job; stopped until the shell's fg, or SIGCONT")
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            log.warning(f"{name} does nothing here: {_REMARKS[name]}")


def _caught() -> int:
    """The signals for which this process has a handler, one bit each; all bits if the kernel does not tell."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return int(line.partition(":")[2], 16)
    return -1


def interrupt() -> None:
    """Send this process the signal of Ctrl-C; SIGTERM if that is ignored, as after a shell's `&`.

    It is sent to the main thread, to interrupt its waiting: a signal to the process may go to any thread.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or without a reader
            stream.flush()
    number = signal.SIGTERM if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else signal.SIGINT
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, number)
    else:
        signal.raise_signal(number)


class Escalation:
    """Counts signals that ask for the end: the first begins a stop, the second cuts it short, the third ends all."""

    _ONE = 0.25
    """Signals within this many seconds count as one, because wrappers forward Ctrl-C a second time."""

    def __init__(self) -> None:
        self.count = 0
        self._last = 0.0

    def another(self, moment: float) -> bool:
        """Count a signal that came at `moment` (time.monotonic()); False if it counts as one with the signal before."""
        if self.count and moment - self._last < self._ONE:
            return False
        self.count, self._last = self.count + 1, moment
        return True


class Terminal:
    """Remembers whether there was a controlling terminal, and when it was lost."""

    _HANG_UP = 1.0
    """A SIGHUP within this many seconds after the loss of the terminal is a hang-up, from the kernel or the shell."""

    def __init__(self) -> None:
        self._is_there = _terminal() is not None
        self._lost: float | None = None

    def look(self) -> None:
        """Note when the terminal is lost; to be called about once a second."""
        if self._is_there and _terminal() is None:
            self._is_there, self._lost = False, time.monotonic()

    def hung_up(self) -> bool:
        """Whether a SIGHUP that has just come is a hang-up of the terminal, which asks for a stop.

        It is not if the terminal was lost a while ago, and the process went on in the background; then it is a reload.
        """
        self.look()
        return self._lost is not None and time.monotonic() - self._lost < self._HANG_UP

    @staticmethod
    def keeps_us_in_the_background() -> bool:
        """Whether there is a terminal that belongs to another job at present."""
        return _terminal() not in {None, os.getpgrp()}


def _terminal() -> int | None:
    """The foreground process group of the controlling terminal; None if there is no terminal."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)  # ENXIO: no controlling terminal (tty(4))
    except (OSError, AttributeError):  # the latter on Windows
        return None
    try:
        return os.tcgetpgrp(terminal)
    except OSError:  # it hung up just now
        return None
    finally:
        os.close(terminal)
