"""Signals, recorded by the C-level wakeup descriptor and handed on by a thread of their own.

The thread sees a signal within microseconds even while the main thread sleeps in an import or in C code; only code that
holds the GIL can keep it waiting.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any, Self

from flaskd.forks import forgotten_by_children

log = logging.getLogger("flaskd.signals")

WATCHED = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))


def _recorded(_signum: int, _frame: object) -> None:
    """Do nothing: the wakeup descriptor has got the signal's number already."""


class SignalWatch:
    """While open, SIGTERM, SIGINT and SIGHUP call `receive(number)` in a thread of their own; main thread only.

    Leaving puts back what was there before.
    """

    def __init__(self, receive: Callable[[int], None]) -> None:
        self._receive = receive
        self._before: dict[int, Any] = {}
        self._wakeup_before = -1
        self._thread = threading.Thread(target=self._listen, name="flaskd-signals", daemon=True)

    def __enter__(self) -> Self:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._thread.start()  # first: where none can be had, nothing has changed
        self._wakeup_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in WATCHED:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup(1), and what a shell starts in the background
                self._before[number] = signal.signal(number, _recorded)
        self._forgotten = forgotten_by_children(self._forget)
        self._forgotten.__enter__()
        return self

    def _forget(self) -> None:
        """In a forked child: signals sent to it are its own, and have their own effect."""
        signal.set_wakeup_fd(-1)
        for number in self._before:
            signal.signal(number, signal.SIG_DFL)

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
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
        """Take back what the app's code took over while it was imported, and say so."""
        for number in self._before:
            taken = signal.getsignal(number)
            if taken is not _recorded:
                log.warning(
                    f"the app installed its own handler for {signal.Signals(number).name}; flaskd takes it back"
                )
                signal.signal(number, _recorded)
        if signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False) != self._writer.fileno():
            log.warning("the app set a signal wakeup descriptor of its own; flaskd takes it back")

    def poke(self) -> None:
        """Call `receive(0)` in the signal thread."""
        with contextlib.suppress(OSError):
            self._writer.send(b"\0")

    def _listen(self) -> None:
        while numbers := self._reader.recv(64):
            for number in numbers:
                if number and number not in WATCHED:  # one that the app handles: the descriptor tells of all
                    continue
                try:
                    self._receive(number)
                except Exception:  # the next signal must be heard all the same
                    log.exception(f"cannot deal with signal {number}")


class Escalation:
    """Counts requests to end: the first asks, the second presses, from the third on there is no waiting."""

    _ONE = 0.05
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
    """Remembers whether there was a controlling terminal, to tell a hang-up from a request to reload."""

    def __init__(self) -> None:
        self._had_one = _has_terminal()

    def hung_up(self) -> bool:
        """Whether the terminal that was there is gone: then SIGHUP means what it meant in 1979."""
        return self._had_one and not _has_terminal()


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))  # ENXIO without a controlling terminal: tty(4)
    except OSError:
        return False
    return True
