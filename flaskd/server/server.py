"""`WaitressThread`: waitress in threads that can be started, drained, resumed and stopped; without cleanup."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

from flaskd.errors import FlaskdError
from flaskd.ledger import DrainReport
from flaskd.process.descriptors import open_files
from flaskd.process.forks import forgotten_by_children
from flaskd.server.board import Board
from flaskd.server.drain import Drain
from flaskd.server.limits import NO_LIMITS, Limits
from flaskd.server.loop import EventLoop
from flaskd.server.observed import ObservedServer
from flaskd.server.request_ids import IdSource
from flaskd.server.settings import most_connections
from flaskd.sockets import Address, Listener
from flaskd.stacks import folded, stack_of, together
from flaskd.text import listed

log = logging.getLogger("flaskd.server")

_DEFAULT_TIMEOUT = 30.0
_START_TIMEOUT = 10.0
_MOST_NAMED = 8
"""Threads that one line of the log names."""
_JOIN_TIMEOUT = 1.0


class WaitressThread(ObservedServer):
    """Serves a WSGI app with threads of its own: one leads, the others run the app.

    ``start()`` returns once requests are served, or raises; ``stop()`` answers the requests in flight and joins every
    thread. As a context manager it does both. Port 0 takes a free port, which ``url`` shows. With 0 threads the leading
    thread runs the app itself, which must never wait. With `fixed_limits` the log names no setting for a request that
    is too large. A worker writes to its `board`, which its supervisor reads; the caller closes the board.
    """

    def __init__(
        self,
        app: Callable[..., Any],
        host: str = "127.0.0.1",
        port: int = 0,
        threads: int = 4,
        *,
        listeners: Sequence[Listener] | None = None,
        adjustments: Mapping[str, Any] | None = None,
        backlog: int = 1024,
        keepalive_grace: float = 0.2,
        stream_grace: float = 1.0,
        patience: float = float("inf"),
        limits: Limits = NO_LIMITS,
        fixed_limits: bool = False,
        reserved: bool = False,
        name: str = "flaskd-server",
        ids: bool = False,
        served_by: str = "",
        on_answer: Callable[[dict[str, Any]], None] | None = None,
        on_death: Callable[[BaseException | None], None] | None = None,
        board: Board | None = None,
    ) -> None:
        self._app = app
        self._addresses = [Address(host, port)]
        self._listeners = list(listeners) if listeners is not None else None
        self._threads = threads
        self._adjustments = dict(adjustments or {})
        self._backlog = backlog
        self._keepalive_grace, self._stream_grace = keepalive_grace, stream_grace
        self._patience, self._limits = patience, limits
        self._fixed_limits, self._reserved = fixed_limits, reserved
        self._name = name
        self._ids, self._served_by = ids, served_by
        self._on_answer, self._on_death = on_answer, on_death
        self._board = board
        self._drain: Drain | None = None
        self._lock = threading.RLock()
        self._known_to_forks = contextlib.ExitStack()
        self.on_closed: Callable[[], None] = lambda: None  # see `Context`

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, first: Callable[[], None] = lambda: None, *, accepting: bool = True) -> Self:
        """Bind if needed, listen and serve; returns once the loop has turned and a thread of the pool has run.

        Without `accepting`, connections wait until `accept` is called, except probes. `first` is called before any
        request is served, when the server's settings can be changed; clients may wait by then. Raises CannotCreateError
        if an address cannot be bound, and any error that keeps the threads from serving.
        """
        if self.loop is not None:
            raise FlaskdError("cannot start: this server has been started before; make a new one")
        try:
            self._known_to_forks.enter_context(forgotten_by_children(self._forget))
            if self._listeners is None:
                self._listeners = []
                self._listeners += (Listener.bind(address) for address in self._addresses)
            for listener in self._listeners:
                listener.listen(self._backlog)
            self._addresses = [listener.address for listener in self._listeners]
            loop = self.loop = EventLoop(
                self._app,
                self._listeners,
                threads=self._threads,
                adjustments={"connection_limit": most_connections(open_files.limit()), **self._adjustments},
                board=self._board,
            )
            loop.connections.patience = self._patience
            loop.limit(self._limits)
            loop.admission.reserved = self._reserved
            loop.context.names_limits = not self._fixed_limits
            loop.account.on_answer = self._on_answer
            self.give_ids(on=self._ids)
            self.name_itself(self._served_by)
            self.set_graces(self._keepalive_grace, self._stream_grace)
            loop.open(accepting=accepting)
            loop.context.on_closed = self.on_closed
            first()
            if self._on_death is not None:
                loop.on_death = self._on_death
            loop.start(self._name)
        except BaseException:  # for example, no thread can be started
            if self.loop is not None:
                self.loop.end()
                self.loop.close(_JOIN_TIMEOUT)
            self._close_listeners()
            self._known_to_forks.close()
            raise
        self._serves = True
        worked = threading.Event()
        loop.context.pool.run(worked.set) if self._threads else worked.set()
        started = loop.turned.wait(_START_TIMEOUT) and (loop.ended.is_set() or worked.wait(_START_TIMEOUT))
        if not started or loop.error is not None:
            error = loop.error
            self.end()
            raise FlaskdError(f"cannot serve: {error or 'the serving thread does not respond'}") from error
        return self

    def accept(self) -> None:
        """Accept connections from now on."""
        self._serving.call(lambda: self._serving.admission.accept(on=True))

    def set_threads(self, threads: int) -> None:
        """Change the number of threads that run the app; raises CannotCreateError if they cannot be started."""
        self._serving.context.pool.resize(threads)
        self._threads = threads

    def set_graces(self, keepalive_grace: float, stream_grace: float) -> None:
        """Set for how many seconds of a drain a client may send one more request, and a stream may go on."""
        self._serving.context.keepalive_grace = keepalive_grace
        self._serving.context.stream_grace = stream_grace

    def limit(self, limits: Limits) -> None:
        """Enforce these limits from now on."""
        self._serving.call(lambda: self._serving.limit(limits))

    def tell_answers(self, on_answer: Callable[[dict[str, Any]], None] | None) -> None:
        """Call `on_answer` with the access log's fields of each answered request from now on; None: no call."""
        self._serving.account.on_answer = on_answer

    def give_ids(self, *, on: bool) -> None:
        """Give each request an X-Request-ID from now on, its trusted proxy's or a new one; with `on` False, none."""
        self._serving.account.make_id = IdSource() if on else None

    def name_itself(self, served_by: str) -> None:
        """Send this X-Served-By in each answer from now on, unless the app sets one; empty: none."""
        self._serving.context.served_by = served_by

    def answer_health(self, path: str, health: Callable[[], tuple[str, str]]) -> None:
        """Let the loop itself answer GET and HEAD of `path` with the status line and the text that `health` returns."""
        self._serving.context.health = health
        self._serving.context.health_path = path

    def watch_idle(self, after: float | None, ignore: Sequence[str], on_idle: Callable[[], None] | None) -> None:
        """Call `on_idle` in the serving thread once no request that counts has come for `after` seconds; None: never.

        Without `on_idle` the time is only noted on the board (`Board.idle_for`). `flaskd.server.idle.IdleWatch` says
        which requests count. The time is counted from now, or from where an earlier watch counted.
        """
        loop = self._serving
        loop.call(lambda: loop.watch_idle(after, ignore, on_idle))

    def announce(self) -> None:
        """Go on accepting, but close each connection after its next response."""
        self._serving.call(self._serving.announce)

    def refuse(self, *, on: bool) -> None:
        """While drained, answer 503 on listeners that other processes share, or stop doing so, as before a stop."""
        self._serving.call(lambda: self._serving.admission.refuse(on=on))

    def close_listeners(self) -> None:
        """End the announce of the drain under way; the listeners are closed once their backlog is empty."""
        self._serving.call(self._serving.end_announce)

    def close_gates(self) -> None:
        """During or after a drain, close the gates of listeners that other processes have stopped sharing."""
        self._serving.call(self._serving.close_gates)

    @property
    def dead(self) -> str:
        """Why the server cannot report the end of a drain any more; empty while its loop is alive."""
        if self._serves and self.loop is not None and self.loop.alive:
            return ""
        return f"the serving thread died: {self.loop.error if self.loop else None}"

    def begin_drain(
        self,
        timeout: float,
        over: Callable[[DrainReport], object],
        *,
        announce: float = 0.0,
        counted_from: tuple[int, int] | None = None,
    ) -> None:
        """Start a drain and return at once; `over` is called with the report in the serving thread.

        At first, for `announce` seconds, new connections are still accepted, and each response closes its connection.
        After that the drain takes at most `timeout` seconds. The report counts from now on, or from `counted_from`, an
        earlier value of `counted`.
        """
        begins = time.monotonic() + announce
        before = self.counted if counted_from is None else counted_from
        self._serving.call(lambda: self._serving.begin_drain(begins, begins + timeout, over, before))

    def hasten_drain(self, timeout: float) -> None:
        """End the announce now, and let the drain under way take at most `timeout` more seconds."""
        deadline = time.monotonic() + timeout
        self._serving.call(lambda: self._serving.hasten_drain(deadline))

    def drain(self, timeout: float = _DEFAULT_TIMEOUT) -> DrainReport:
        """Take no new work, finish the requests in hand within `timeout` seconds, and report how they ended.

        A second call waits for the same drain. Raises FlaskdError if the serving thread is dead, or resume undid the
        drain.
        """
        with self._lock:
            if self._serving.turned.is_set() and self._drain is None and (dead := self.dead):
                raise FlaskdError(f"cannot drain: {dead}")
            if self._drain is None:
                self._drain = Drain(self, timeout).begin()
            else:  # a drain is under way or over
                self._drain.shorten(timeout)
            drain = self._drain
        report = drain.wait()
        assert report is not None
        return report

    def resume(self, listeners: Sequence[Listener] | None = None) -> None:
        """Serve again after a drain, on the same addresses and port numbers; also undoes a drain that is under way.

        Raises CannotCreateError if an address cannot be bound any more; the server then stays drained. A server that
        already serves goes on. A worker is given `listeners`, one for each that it has, and owns them from then on; it
        closes those that replace shared ones, which it has never closed.
        """

        def reopen() -> None:  # runs in the loop's thread, so that the old listeners are closed before
            opened: list[Listener] = []
            loop = self._serving
            try:
                if not loop.context.drains:
                    loop.undo_announce()
                    return
                loop.close_listeners()
                opened.extend(_opened_again(self._listeners or (), listeners, self._backlog))
                loop.resume(opened)
                self._listeners = opened
                drain, self._drain = self._drain, None
                if drain is not None:
                    drain.undo()
            except Exception:
                for listener in opened:
                    if not listener.shared:
                        listener.close()
                raise
            finally:
                for listener in listeners or ():
                    if listener not in (self._listeners or ()):
                        listener.close()

        _in_loop(self._serving, reopen, "resume")

    def stop(self, timeout: float = _DEFAULT_TIMEOUT) -> DrainReport:
        """Drain within `timeout` seconds, then end and join all threads; a second call returns the same report."""
        if not self._serves or self.loop is None:
            self._close_listeners()
        else:
            if self.loop.alive:
                self.drain(timeout)
            self.end()
        return (self._drain.report if self._drain is not None else None) or DrainReport()

    def end(self, timeout: float = _JOIN_TIMEOUT) -> None:
        """End and join the threads of a drained server, waiting at most `timeout` seconds for those of the pool."""
        loop = self._serving
        if not self._serves:
            return
        self._serves = False
        loop.end()
        if not loop.ended.wait(timeout + _JOIN_TIMEOUT):  # the sockets that it uses cannot be closed
            leader = loop.context.pool.leader
            stack = folded(stack_of(leader)) if leader is not None else ""
            log.error(f"the serving thread does not end, and is abandoned:\n{stack}")
            self._close_listeners()
            return
        if stuck := loop.close(timeout):
            names = listed([each.name for each in stuck], _MOST_NAMED)
            how = "do not end, and are" if stuck[1:] else "does not end, and is"
            log.warning(f"{names} {how} abandoned:\n{folded(together(map(stack_of, stuck)))}")
        self._known_to_forks.close()

    def _forget(self) -> None:
        """In a forked child, close its copies of all sockets, which would keep clients waiting."""
        for listener in self._listeners or ():
            listener.socket.close()
        if self.loop is not None:
            self.loop.forget()
        if self._board is not None:
            self._board.close()

    def abandon(self) -> None:
        """End without a drain, unless it has ended already; for a start that failed half-way."""
        if self._serves:
            self.end(0)
        self._close_listeners()

    def _close_listeners(self) -> None:
        for listener in self._listeners or ():
            listener.close()


def _in_loop(loop: EventLoop, function: Callable[[], None], what: str) -> None:
    """Run a function in the loop's thread, wait for it, and raise what it raises; `what` is for messages."""
    done, errors = threading.Event(), list[Exception]()

    def run() -> None:
        try:
            function()
        except Exception as error:  # noqa: BLE001 - handed to the caller
            errors.append(error)
        finally:
            done.set()

    loop.call(run)
    if not done.wait(_START_TIMEOUT):
        raise FlaskdError(f"cannot {what}: the serving thread does not respond")
    if errors:
        raise errors[0]


def _opened_again(before: Sequence[Listener], given: Sequence[Listener] | None, backlog: int) -> Iterator[Listener]:
    """The listeners to accept from after a resume: the `given` ones or newly bound ones; shared ones are kept."""
    for listener, other in zip(before, given or before, strict=True):
        if listener.shared:
            yield listener
        elif given is not None:
            yield other
        else:
            with open_files.used():
                again = Listener.bind(listener.address)
            again.listen(backlog)
            yield again
