"""What this daemon does for its service manager, apart from status lines: the watchdog's pulse, and asking for time.

The pulse shows that the serving thread and the events thread work: a thread of its own asks the loop over a connection
of its own, and lets the events thread send the word. Without a manager nothing here runs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Protocol

from flaskd.errors import shortage
from flaskd.lifecycle import State, StopReason
from flaskd.notices import (
    BecameReady,
    BrokenOff,
    DrainBegan,
    DrainEnded,
    FailedFor,
    Loaded,
    Notice,
    Progress,
    ReloadBegan,
    ReloadEnded,
    Resumed,
    SignalRefused,
    Starting,
    StatusChanged,
    StepsTake,
    StopBegan,
    Stopped,
    WorkersStart,
)
from flaskd.sockets import Listener
from flaskd.systemd.notify import Notifier
from flaskd.systemd.store import Store

log = logging.getLogger("flaskd.service")

_LOOK = 1.0
"""Seconds between two checks of a start that takes long."""
_MORE = 5.0
"""How many seconds a working start asks for; it asks again long before they are over."""
_START_OF_WORKERS = 20.0
"""How many seconds a start or a reload asks for while workers start, which is reported every few seconds. flaskd itself
gives up a worker's start that takes longer than `pool.start_timeout`."""
_LONGEST_START = 900.0
"""Seconds after which a start asks for no more time, even if it works."""
_MARGIN = 1.0
"""How many seconds more than a step's limit are asked for, so that flaskd gives it up before the manager does."""
_PATIENCE = 5.0
"""How many seconds a stop asks for when a request has moved, but never past its deadline."""
_SUCCEEDED = {"failure", "reload", "recycle"}
"""Kinds of stops after which other processes serve the stored listeners: the next flaskd, or the other workers when one
is replaced."""
_OURS = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
"""Variables that are meant for this process alone (sd_notify(3), sd_watchdog_enabled(3))."""


class Server(Protocol):
    """What is asked of the server."""

    def turns(self, timeout: float) -> bool:
        """Whether its thread runs its loop, within `timeout` seconds."""

    def answers(self, timeout: float) -> bool:
        """Whether its thread answers a request within `timeout` seconds."""

    def all_are_at(self) -> Hashable | None:
        """A value that stays the same while all of its threads do the same work; None if one is free."""

    def moved(self) -> Hashable:
        """A value that changes when a request begins, ends or moves a byte."""

    def close_gates(self) -> None:
        """Stop accepting on listeners that are no longer shared."""


class Service:
    """The daemon's side towards its service manager; `pulse_due` makes the events thread call `pulse` soon."""

    def __init__(self, notifier: Notifier, environ: Mapping[str, str], pulse_due: Callable[[], None]) -> None:
        self.store = Store(notifier)
        self.stuck_after: float | None = None
        """Seconds without progress in any thread after which the pulse stops; None: never."""
        self._notifier = notifier
        self._pulse_due = pulse_due
        self._server: Server
        self._listeners: Sequence[Listener] = ()
        self._state: Callable[[], State]
        self._period = _watchdog(environ) / 2
        self._started = threading.Event()
        self._ended = threading.Event()
        self._last_seen: tuple[Hashable, float] = (None, 0.0)
        self._complained = False
        self._given = threading.Event()  # set when the events thread has sent the pulse
        self._given.set()
        self._moved: Hashable = None
        self._owed = 0.0

    @contextlib.contextmanager
    def attended(self) -> Iterator[None]:
        """Wraps a run: dumps all stacks at SIGABRT, which a missing pulse causes, and ends its threads."""
        for name in _OURS:
            os.environ.pop(name, None)
        ours = not faulthandler.is_enabled()
        if ours:
            with contextlib.suppress(OSError, ValueError, AttributeError, RuntimeError):  # no standard error
                faulthandler.enable(sys.stderr)
        try:
            yield
        finally:
            self._started.set()
            self._ended.set()
            self._given.set()
            if ours:
                faulthandler.disable()

    def attach(self, server: Server, listeners: Sequence[Listener], state: Callable[[], State]) -> None:
        """Set what the notices are about: the server, its listeners, and the function that gives the state."""
        self._server, self._listeners, self._state = server, listeners, state

    def heard(self, notice: Notice) -> None:  # noqa: C901, PLR0912 - one case for each
        """Tell the manager about a notice, if it concerns the manager."""
        tell = self._notifier
        match notice:
            case Starting():
                self.starting()
            case Loaded(timeout):
                self.probing(timeout)
            case BecameReady():
                self.ready(notice.status, self._server, self._state)
            case BrokenOff():
                tell.stopping("stopped while starting")
            case FailedFor(why, number):
                tell.failed(why, number)
            case DrainBegan(in_flight):
                tell.status(f"draining: {in_flight} in flight")
            case DrainEnded(report, state) if state is State.DRAINED:
                tell.status(f"drained: {report}")
            case Resumed(status) | StatusChanged(status):
                tell.status(status)
            case ReloadBegan(since):
                tell.reloading(since)
            case SignalRefused(since, state, why):
                tell.reloading(since)
                tell.ready(f"{state}: {why}")
            case ReloadEnded():
                tell.ready(f"ready, but the reload failed: {notice.fault}" if notice.fault else notice.status)
            case WorkersStart(state) if state in {
                State.STARTING,
                State.RELOADING,
            }:  # otherwise the manager does not wait for anything
                tell.extend(_START_OF_WORKERS)
            case StopBegan(left=left):
                self.stopping(notice.status, left, notice.reason, self._listeners, self._server)
            case StepsTake(seconds, left):
                self.step(seconds, left)
            case Progress(text, left):
                self.progress(text, self._server, left)
            case Stopped(account, failed=False):  # after a failure its STATUS stays to be seen
                tell.status(f"stopped: {account.report}")

    def close(self) -> None:
        """Close the connection to the manager."""
        self._notifier.close()

    def forget(self) -> None:
        """To be called in a forked child, which must not tell the manager anything."""
        self._notifier.forget()

    # --- start ---

    def starting(self) -> None:
        """Tell that flaskd starts, and ask for more time while the start works; called in the main thread."""
        self._notifier.status("starting")
        if self._notifier.address and hasattr(time, "pthread_getcpuclockid"):
            clock = time.pthread_getcpuclockid(threading.get_ident())
            with _told_if_short("the start gets no more time than TimeoutStartSec"):
                threading.Thread(target=self._help_start, args=[clock], name="flaskd-starting", daemon=True).start()

    def _help_start(self, clock: int) -> None:
        """Ask for time while the main thread uses its CPU clock; a start that hangs is left to TimeoutStartSec."""
        until, used = time.monotonic() + _LONGEST_START, time.clock_gettime_ns(clock)
        while not self._started.wait(_LOOK) and time.monotonic() < until:
            before, used = used, time.clock_gettime_ns(clock)
            if used != before:
                self._notifier.extend(_MORE)

    def probing(self, timeout: float) -> None:
        """The app is loaded and has `timeout` seconds to answer the probe; 0 if there is no probe."""
        self._started.set()
        if timeout:
            self._notifier.extend(timeout + 1)

    def ready(self, status: str, server: Server, state: Callable[[], State]) -> None:
        """Tell that the start is over, and begin to give the pulse."""
        self._started.set()
        self._notifier.ready(status)
        if self._period:
            self._notifier.alive()
            args = server, state, self._ended.wait
            watch = threading.Thread(target=self.watch, args=args, name="flaskd-watchdog", daemon=True)
            with _told_if_short("no pulse is given, and the manager will restart flaskd"):
                watch.start()

    # --- pulse ---

    def watch(self, server: Server, state: Callable[[], State], ended: Callable[[float], bool]) -> None:
        """Give the pulse until `ended(seconds)`, which waits that long for the end of the run, is true.

        The period is half of the manager's time, so a pulse that fails is tried again in time.
        """
        pause = self._period
        while not ended(pause):
            if well := self._well(server, state()):
                if self._complained:
                    log.warning("all is well again, and the service manager is told so")
                self._complained = False
                self._given.clear()
                self._pulse_due()
                if not self._given.wait(self._period / 2) and state() is not State.STOPPED:  # then it has ended
                    self._complain("the thread of the events does not respond")
                    self._given.wait()
            pause = self._period if well else self._period / 10

    def pulse(self) -> None:
        """Send the pulse; called in the events thread, which shows that it works."""
        self._given.set()
        self._notifier.alive()

    def _well(self, server: Server, state: State) -> bool:
        if state not in {State.READY, State.RELOADING}:
            return server.turns(self._period / 2)  # drained or stopping: it need not answer requests
        if not server.answers(self._period / 2):  # half of it, so that the log tells the reason in time
            self._complain("the serving thread does not answer")
            return False
        at, now = server.all_are_at(), time.monotonic()
        if at is None or at != self._last_seen[0]:
            self._last_seen = (at, now)
        stuck = now - self._last_seen[1]
        if self.stuck_after is not None and at is not None and stuck >= self.stuck_after:
            self._complain(f"all threads have hung for {stuck:.1f}s (systemd.stuck_after is {self.stuck_after:g}s)")
            return False
        return True

    def _complain(self, what: str) -> None:
        if not self._complained:
            log.error(f"{what}: the service manager is not told that all is well, and restarts flaskd if it stays so")
        self._complained = True

    # --- stop ---

    def stopping(
        self, status: str, left: float, reason: StopReason, listeners: Sequence[Listener], server: Server | None
    ) -> None:
        """Tell that the stop began; it has `left` seconds. Its `reason` decides what becomes of stored listeners."""
        self._started.set()
        self._moved = server.moved() if server is not None else None
        self._notifier.stopping(status, extend=min(_PATIENCE, left))
        stored = [each for each in listeners if each.stored]
        if reason.kind in _SUCCEEDED:
            pass  # the next flaskd, or another worker, serves the backlog
        elif reason.kind == "signal" and reason.detail == "SIGTERM":
            for each in stored:  # the manager stops or restarts it: maybe nothing follows
                each.last_batch = True
        elif stored:
            self.store.let_go(stored)
            if server is not None:
                server.close_gates()

    def step(self, takes: float, left: float) -> None:
        """A step of the stop began that takes at most `takes` seconds, or a step ended; `left` seconds to the deadline.

        flaskd abandons a hanging step before the time asked for here is over. Nothing is asked for past the deadline:
        flaskd's own end has its time before the deadline (`flaskd.cleanup.for_steps`).
        """
        self._ask(min(max(_PATIENCE, takes + _MARGIN), left))

    def progress(self, status: str, server: Server, left: float | None) -> None:
        """Set the status line; in a stop, `left` seconds before its deadline, ask for time if a request has moved."""
        self._notifier.status(status)
        moved = server.moved()
        if left is not None and moved != self._moved:
            self._ask(min(_PATIENCE, left))
        elif (owed := self._owed - time.monotonic()) > 0:
            self._ask(owed)
        self._moved = moved

    def _ask(self, seconds: float) -> None:
        """Ask for more time; if the manager is behind, ask again at the next call."""
        until = time.monotonic() + seconds
        self._owed = 0.0 if self._notifier.extend(seconds) else max(until, self._owed)


def _watchdog(environ: Mapping[str, str]) -> float:
    """How often, in seconds, the manager wants a pulse; 0 if it wants none from this process."""
    usec, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if not usec.isdecimal() or (pid and pid != str(os.getpid())):
        return 0.0
    seconds = int(usec) / 1_000_000
    return seconds if seconds <= threading.TIMEOUT_MAX else 0.0  # WatchdogSec=infinity comes as a large number


@contextlib.contextmanager
def _told_if_short(effect: str) -> Iterator[None]:
    """If no thread can be had, log the `effect` and go on without it."""
    try:
        yield
    except RuntimeError as error:
        lack = shortage(error)
        if lack is None:
            raise
        log.warning(f"{effect}: {lack}")
