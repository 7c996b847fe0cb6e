"""Signals, recorded by the C-level wakeup descriptor and handed on by a thread of their own.

The thread sees a signal within microseconds even while the main thread sleeps in an import or in C code; only code that
holds the GIL can keep it waiting. Only the signals of `flaskd.process.bootstrap.OURS` are flaskd's: the descriptor
tells of every signal that Python has a handler for, the app's own ones included.
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
    "SIGUSR2": "flaskd starts no successor of itself; restart it to run new code",
    "SIGTTIN": "the number of threads is server.threads in the configuration; reload after a change",
    "SIGTTOU": "the number of threads is server.threads in the configuration; reload after a change",
}
"""What is said to a signal that other servers heed, and that does nothing here."""


class SignalWatch:
    """While open, the signals that ask for something call `receive(number)` in a thread of their own; main thread only.

    Those are SIGTERM, SIGINT, SIGHUP, and SIGQUIT where the app has no handler of its own for it. To SIGUSR1, SIGUSR2,
    SIGTTIN and SIGTTOU it is only said that they do nothing. At one that the app handles `wake` is called, which is to
    wake the main thread: Python runs the handler there, and the kernel may have interrupted another thread. Leaving
    puts back what was there before.
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
        self._thread.start()  # first: where none can be had, nothing has changed
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
        """Do nothing: the wakeup descriptor has got the number already, unless the app has taken that away."""
        if self._wakes_us():
            return
        with contextlib.suppress(OSError):
            self._writer.send(bytes([number]))

    def _wakes_us(self) -> bool:
        """Make sure that the wakeup descriptor is ours, and tell whether it was."""
        ours = self._writer.fileno()
        return signal.set_wakeup_fd(ours, warn_on_full_buffer=False) == ours

    def _forget(self) -> None:
        """In a forked child: signals sent to it are its own, and have the effect that they would have without us."""
        signal.set_wakeup_fd(-1)
        for number, before in self._before.items():
            if number in ALWAYS or signal.getsignal(number) == self._handler:
                signal.signal(number, plain(number, before))
        self._reader.close()
        self._writer.close()

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            if number in ALWAYS or signal.getsignal(number) == self._handler:
                # None: installed by C code, and Python cannot put that back; the default is the honest choice.
                signal.signal(number, signal.SIG_DFL if before is None else before)
        signal.set_wakeup_fd(self._wakeup_before)
        self._forgotten.__exit__(None, None, None)
        self._writer.shutdown(socket.SHUT_RDWR)  # the thread reads the end, whoever else may hold a copy
        self._writer.close()
        if self._thread is not threading.current_thread():
            self._thread.join()
        self._reader.close()

    def reclaim(self) -> None:
        """Take SIGTERM, SIGINT and SIGHUP back from the app's code, or a C library of it, and say so.

        What C code has put in the place of a handler Python does not see: the handlers are installed again without
        asking. The kernel tells whether one was there at all (SigCgt: proc_pid_status(5)).
        """
        self.terminal.look()
        caught = _caught()
        for number in ALWAYS & self._before.keys():
            name = signal.Signals(number).name
            if signal.signal(number, self._handler) != self._handler:
                log.warning(f"the app installed its own handler for {name}; flaskd takes it back")
            elif not caught >> (number - 1) & 1:
                log.warning(f"code in C took the handler for {name} away; flaskd takes it back")
        if not self._wakes_us():
            log.warning("the app set a signal wakeup descriptor of its own; flaskd takes it back")

    def poke(self) -> None:
        """Call `receive(0)` in the signal thread."""
        with contextlib.suppress(OSError):
            self._writer.send(b"\0")

    def _listen(self) -> None:
        if hasattr(signal, "pthread_sigmask"):
            # The app may block signals in its threads: here they arrive all the same (signal(7), "Signal mask").
            signal.pthread_sigmask(signal.SIG_UNBLOCK, OURS)
        while numbers := self._reader.recv(64):
            for number in numbers:
                try:
                    self._heed(number)
                except Exception:  # the next signal must be heard all the same
                    log.exception(f"cannot deal with signal {number}")

    def _heed(self, number: int) -> None:
        """Hand on what is flaskd's; a number that is not is that of a signal which the app handles."""
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
            # The kernel sent it for a read or write there, which begins again, and sends another one, without an end.
            log.warning(f"{name}: the terminal belongs to another job; stopped until the shell's fg, or SIGCONT")
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            log.warning(f"{name} does nothing here: {_REMARKS[name]}")


def _caught() -> int:
    """The signals that this process has a handler for, a bit for each; where the kernel does not tell, all."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return int(line.partition(":")[2], 16)
    return -1


def interrupt() -> None:
    """Send this process what Ctrl-C sends; SIGTERM where a shell that started it in the background lets it ignore that.

    It goes to the main thread, so that it interrupts what that waits in: a signal to the process may go to any thread.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or not read any more
            stream.flush()
    number = signal.SIGTERM if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else signal.SIGINT
    if hasattr(signal, "pthread_kill"):
        signal.pthread_kill(threading.main_thread().ident or 0, number)
    else:
        signal.raise_signal(number)


class Escalation:
    """Counts requests to end: the first asks, the second presses, from the third on there is no waiting."""

    _ONE = 0.25
    """Seconds; signals closer together count as one, because wrappers forward Ctrl-C a second time."""

    def __init__(self) -> None:
        self.count = 0
        self._last = 0.0

    def another(self, moment: float) -> bool:
        """Count a signal that came at `moment` (seconds, monotonic); False when it is an echo of the one before."""
        if self.count and moment - self._last < self._ONE:
            return False
        self.count, self._last = self.count + 1, moment
        return True


class Terminal:
    """Remembers whether there was a controlling terminal, and since when it is gone."""

    _HANG_UP = 1.0
    """Seconds after the loss of the terminal in which a SIGHUP tells of it: the kernel's, or that of the shell."""

    def __init__(self) -> None:
        self._is_there = _terminal() is not None
        self._lost: float | None = None

    def look(self) -> None:
        """Note when it is lost; to be called about once a second."""
        if self._is_there and _terminal() is None:
            self._is_there, self._lost = False, time.monotonic()

    def hung_up(self) -> bool:
        """Whether a SIGHUP that has just come is a hang-up, which meant the end in 1979 and means it now.

        It is not where the terminal was lost a while ago, and the process lived on, in the background of its shell.
        """
        self.look()
        return self._lost is not None and time.monotonic() - self._lost < self._HANG_UP

    @staticmethod
    def keeps_us_in_the_background() -> bool:
        """Whether there is a terminal, and it is another job's at present."""
        return _terminal() not in {None, os.getpgrp()}


def _terminal() -> int | None:
    """The process group that the controlling terminal is given to at present; None where there is no terminal."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)  # ENXIO without a controlling terminal: tty(4)
    except (OSError, AttributeError):  # the latter on Windows
        return None
    try:
        return os.tcgetpgrp(terminal)
    except OSError:  # hung up in this moment
        return None
    finally:
        os.close(terminal)
