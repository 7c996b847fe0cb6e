"""The event loop: waitress' channels and dispatcher, turned by flaskd, so that it can be drained and watched.

All methods run in the loop's thread, except those that say "any thread".
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from waitress import wasyncore
from waitress.adjustments import Adjustments
from waitress.server import TcpWSGIServer
from waitress.task import ThreadedTaskDispatcher

from flaskd.ledger import Cut, DrainReport, InFlight
from flaskd.server.channel import Channel, Request
from flaskd.sockets import Listener

try:
    from waitress.server import UnixWSGIServer
except ImportError:  # Windows
    UnixWSGIServer = None

log = logging.getLogger("flaskd.server")

_TURN = 1.0
"""Seconds; the longest the loop waits when nothing happens, for waitress' idle reaping and the drain's clock."""
_LEAST_WAIT = 0.1
"""Seconds that even an end in a hurry leaves to idle workers, so that they are not taken for stuck ones."""
_BACKLOG_BATCH = 4096
"""Connections; what is taken from a backlog before its listener is closed. Bounded, because clients come back."""

Outcome = Literal["completed", "cut", "gone"]


class Workers(ThreadedTaskDispatcher):  # type: ignore[misc]
    """Waitress' dispatcher, with threads that can be joined."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[threading.Thread] = []

    def start_new_thread(self, target: Callable[[int], object], thread_no: int) -> None:
        """Start a worker thread and remember it."""
        thread = threading.Thread(target=target, name=f"flaskd-worker-{thread_no}", args=(thread_no,), daemon=True)
        self.started = [each for each in self.started if each.is_alive()]
        self.started.append(thread)
        thread.start()

    def join(self, timeout: float) -> list[threading.Thread]:
        """Let all workers end, wait at most `timeout` seconds, and return those that did not (any thread)."""
        self.set_thread_count(0)
        until = time.monotonic() + max(timeout, _LEAST_WAIT)
        for thread in self.started:
            thread.join(max(0.0, until - time.monotonic()))
        return [thread for thread in self.started if thread.is_alive()]


class _Acceptor:
    """What TCP and Unix acceptors share; one outlives its listener, because channels wake the loop through it."""

    channel_class = Channel
    loop: EventLoop

    def reopen(self, listener: Listener) -> None:
        """Accept from a new listener."""
        listener.socket.setblocking(False)
        self.set_socket(listener.socket, self._map)  # type: ignore[attr-defined]
        self.accepting = True

    def close_listener(self) -> None:
        """Take what is in the backlog, then close the listener, and only that: workers still pull the trigger."""
        for _ in range(_BACKLOG_BATCH):
            before = self.loop.connections_accepted
            self.handle_accept()  # type: ignore[attr-defined]
            if self.loop.connections_accepted == before:
                break
        wasyncore.dispatcher.close(self)


class _TcpAcceptor(_Acceptor, TcpWSGIServer):  # type: ignore[misc]
    pass


if UnixWSGIServer is not None:

    class _UnixAcceptor(_Acceptor, UnixWSGIServer):  # type: ignore[misc]
        pass


@dataclass
class _Drain:
    """A drain under way; `deadline` is a time.monotonic() moment."""

    began: float
    deadline: float
    completed_before: int
    over: Callable[[DrainReport], None]
    turns: int = 0


class EventLoop:
    """Serves an app on listeners with worker threads; waitress' settings come as `Adjustments` arguments."""

    def __init__(
        self,
        app: Callable[..., Any],
        listeners: Sequence[Listener],
        *,
        threads: int,
        adjustments: Mapping[str, Any],
        on_answer: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.draining = threading.Event()
        self.connections_accepted = 0
        self.completed = 0
        self.turned = threading.Event()
        self.error: BaseException | None = None
        self._map: dict[int, Any] = {}
        self._threads = threads
        self._adjustments = adjustments
        self._app = app
        self._listeners = list(listeners)
        self._on_answer = on_answer
        self._workers = Workers()
        self._acceptors: list[Any] = []
        self._in_hand: dict[int, Request] = {}
        self._lost: set[Request] = set()
        self._ids = itertools.count(1)
        self._lock = threading.Lock()
        self._calls: deque[Callable[[], None]] = deque()
        self._drain: _Drain | None = None
        self._ending = False
        self._closed = False

    # --- any thread ---------------------------------------------------------------------------------------------

    def call(self, function: Callable[[], None]) -> None:
        """Run a function in the loop's thread, soon (any thread)."""
        self._calls.append(function)
        self.wake()

    def wake(self) -> None:
        """Make the loop turn now (any thread)."""
        with self._lock:
            if not self._closed and self._acceptors:
                self._acceptors[0].pull_trigger()

    def accepted(self, request: Request) -> None:
        """Count a request as in flight."""
        request.id = next(self._ids)
        self._in_hand[request.id] = request

    def answered(self, request: Request) -> None:
        """Note that the app is done with a request (worker thread)."""
        if self._lost:
            with self._lock:
                if request in self._lost:
                    self._lost.discard(request)
                    if not self._ending:
                        self._workers.set_thread_count(self._threads + len(self._lost))
        if self.draining.is_set():
            self.wake()

    def retire(self, request: Request, outcome: Outcome) -> None:
        """Take a request out of flight; only the first outcome counts (any thread)."""
        with self._lock:
            if request.id not in self._in_hand:
                return
            if outcome == "completed":  # first: a drain reads the count as soon as nothing is in hand
                self.completed += 1
            del self._in_hand[request.id]
        if self._on_answer is not None and request.status:
            self._on_answer(request.access_fields())

    @property
    def in_flight(self) -> int:
        """Requests accepted and not yet completely answered (any thread)."""
        return len(self._in_hand)

    @property
    def connections(self) -> int:
        """Open connections (any thread)."""
        return sum(len(acceptor.active_channels) for acceptor in self._acceptors)

    @property
    def queued(self) -> int:
        """Requests that wait for a worker thread (any thread)."""
        return len(self._workers.queue)

    def requests(self) -> list[InFlight]:
        """What is in flight, oldest first (any thread)."""
        return [request.snapshot() for request in list(self._in_hand.values())]

    def cut(self, reason: str) -> tuple[Cut, ...]:
        """What is in flight, as cut (any thread)."""
        return tuple(request.cut(reason) for request in list(self._in_hand.values()))

    def set_threads(self, threads: int) -> None:
        """Change the number of worker threads (any thread)."""
        self._threads = threads
        self._workers.set_thread_count(threads + len(self._lost))

    def run_in_worker(self, function: Callable[[], None]) -> None:
        """Run a function in a worker thread (any thread)."""
        self._workers.add_task(_Errand(function))

    # --- the loop's thread --------------------------------------------------------------------------------------

    def open(self) -> None:
        """Build waitress' servers on the listeners and start the workers; called before the thread starts."""
        adjustments = Adjustments(threads=self._threads, **self._adjustments)
        adjustments.connection_limit += 2 * len(self._listeners)  # waitress counts its triggers and listeners too
        for listener in self._listeners:
            sock = listener.socket
            kind = _UnixAcceptor if listener.address.path else _TcpAcceptor
            acceptor = kind(
                self._app,
                self._map,
                False,
                sock,
                dispatcher=self._workers,
                adj=adjustments,
                sockinfo=(sock.family, sock.type, sock.proto, sock.getsockname()),
                bind_socket=False,
            )
            acceptor.loop = self
            acceptor.accepting = True
            self._acceptors.append(acceptor)
        self._workers.set_thread_count(self._threads)

    def run(self) -> None:
        """Turn until told to end; an error that leaves here is kept in `error`."""
        try:
            while not self._ending:
                wasyncore.poll2(self._patience(), self._map)
                self.turned.set()
                while self._calls:
                    self._calls.popleft()()
                if self._drain is not None:
                    self._advance(self._drain)
        except BaseException as error:
            self.error = error
            log.critical("the serving thread died", exc_info=True)

    def _patience(self) -> float:
        if self._drain is None:
            return _TURN
        # The second turn of a drain comes at once: see _advance.
        left = self._drain.deadline - time.monotonic()
        return 0.0 if self._drain.turns <= 1 else min(_TURN, max(0.0, left) + 0.001)

    def attach(self, sock: Any) -> None:
        """Serve a connection that came through no listener, such as a probe's; it is in no count and no log."""
        acceptor = self._acceptors[0]
        channel = Channel(acceptor, sock, ("probe", None), acceptor.adj, map=self._map)
        channel.internal = True
        self.connections_accepted -= 1

    def begin_drain(self, deadline: float, over: Callable[[DrainReport], None], completed_before: int) -> None:
        """Stop accepting and finish what is in hand; `over` is called once, when that is done or the deadline came.

        What was completed since `completed_before` requests had been is in the drain's account.
        """
        self.draining.set()
        for listener in self._listeners:
            listener.withdraw()
        for acceptor in self._acceptors:
            if acceptor.accepting:
                acceptor.close_listener()
        for listener in self._listeners:
            listener.close()
        self._drain = _Drain(time.monotonic(), deadline, completed_before, over)

    def hasten_drain(self, deadline: float) -> None:
        """Bring the deadline of the drain under way forward."""
        if self._drain is not None:
            self._drain.deadline = min(self._drain.deadline, deadline)

    def resume(self, listeners: Sequence[Listener]) -> None:
        """Accept again, from listeners that stand where the closed ones stood."""
        self._drain = None
        self.draining.clear()
        self._listeners = list(listeners)
        for acceptor, listener in zip(self._acceptors, listeners, strict=True):
            acceptor.reopen(listener)
        with self._lock:
            # A worker that still runs a request that was cut is missing from the pool.
            self._workers.set_thread_count(self._threads + len(self._lost))

    def _advance(self, drain: _Drain) -> None:
        channels = [channel for acceptor in self._acceptors for channel in list(acceptor.active_channels.values())]
        drain.turns += 1
        if drain.turns > 1:  # the first turn reads what had arrived before the listeners closed
            for channel in channels:
                if channel.idle:
                    channel.will_close = True
            if not self._in_hand and all(channel.idle for channel in channels):
                self._finish(drain, ())
                return
        if time.monotonic() >= drain.deadline:
            self._finish(drain, self._cut_everything(channels, "the deadline came"))

    def _cut_everything(self, channels: Sequence[Channel], reason: str) -> tuple[Cut, ...]:
        doomed = list(self._in_hand.values())
        doomed += [channel.arriving for channel in channels if channel.arriving is not None]
        cuts = []
        for request in doomed:
            cut = request.cut(reason)
            cuts.append(cut)
            log.warning("\n".join(filter(None, [f"cut {cut}", cut.stack])), extra={"fields": cut.as_json()})
            if cut.phase == "running":
                with self._lock:
                    self._lost.add(request)
                    if request.answered:  # in this moment, and so `answered` did not see it among the lost
                        self._lost.discard(request)
            self.retire(request, "cut")
        for channel in channels:
            if not channel.internal:
                channel.handle_close()
        return tuple(cuts)

    def _finish(self, drain: _Drain, cut: tuple[Cut, ...]) -> None:
        self._drain = None
        drain.over(
            DrainReport(completed=self.completed - drain.completed_before, cut=cut, took=time.monotonic() - drain.began)
        )

    # --- the end, in the thread that ends it --------------------------------------------------------------------

    def end(self) -> None:
        """Leave `run` at the next turn (any thread)."""
        self._ending = True
        self.wake()

    def close(self, timeout: float) -> list[threading.Thread]:
        """Join the workers, then close everything; returns the workers that did not end within `timeout` seconds.

        While a worker lives, the trigger stays open: it would write to a closed and perhaps reused descriptor.
        """
        stuck = self._workers.join(timeout)
        if not stuck:
            with self._lock:
                self._closed = True
            wasyncore.close_all(self._map)
            for acceptor in self._acceptors:
                acceptor.trigger.close()
        for listener in self._listeners:
            listener.close()
        return stuck


class _Errand:
    """A function in the shape of waitress' tasks."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function

    def service(self) -> None:
        self._function()

    def cancel(self) -> None:
        """Nothing is owed to anybody."""
