"""`WerkzeugThread`: an app on Werkzeug's development server, in a thread that can be drained and stopped.

What ``werkzeug.serving.make_server(threaded=True)`` gives, made safe to stop: there, ``shutdown()`` returns with
requests unfinished, ``server_close()`` waits for ever for a client that says nothing, or for none, and the backlog is
reset. Werkzeug closes each connection after its response, so there is no keep-alive to end.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Self

from werkzeug.serving import ThreadedWSGIServer, WSGIRequestHandler

from flaskd.errors import FlaskdError
from flaskd.forks import forgotten_by_children
from flaskd.ledger import Cut, DrainReport, InFlight, visible
from flaskd.server.channel import stack_of
from flaskd.server.draining import BACKLOG, GATE, TOO_LATE
from flaskd.server.streams import STREAM_GRACE, EndingStreams
from flaskd.sockets import Address, Listener, closed_by_peer
from flaskd.threads import AppThread
from flaskd.work import in_background, left_behind, tell_no_more, tell_of_ends

log = logging.getLogger("flaskd.server")

_LISTEN = 128
"""Connections that the kernel holds; Werkzeug's own number (werkzeug.serving.LISTEN_QUEUE)."""
_GRACE = 0.2
"""Seconds in which a client that has connected before a drain may begin its request."""


class _Request(WSGIRequestHandler):
    """One connection, and the one request on it."""

    server: _Server
    id = 0
    began = 0.0
    gone = False
    thread: threading.Thread

    def parse_request(self) -> bool:
        """Parse the head, whose first line has come: a drain reads on from here."""
        self.began, self.thread = time.monotonic(), threading.current_thread()
        self.server.thread.begun.add(self.thread)
        return super().parse_request()

    def run_wsgi(self) -> None:
        """Answer the request; it is in flight from here on."""
        self.id = next(self.server.ids)
        self.server.thread.accepted(self)
        whole = False
        try:
            super().run_wsgi()
            whole = not self.gone
        finally:
            self.server.thread.retire(self, completed=whole)

    def connection_dropped(self, error: BaseException, environ: Any = None) -> None:  # noqa: ARG002 - Werkzeug's names
        """Note that the client is gone; Werkzeug calls this instead of raising."""
        self.gone = True

    def make_environ(self) -> Any:
        """Werkzeug's environ, and the event by which a stream learns that a drain began."""
        environ = super().make_environ()
        environ["flaskd.draining"] = self.server.thread.draining
        return environ

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Say nothing: one line of each request belongs to a log that somebody asked for."""

    def snapshot(self) -> InFlight:
        """What can be shown of it."""
        method, path, age = visible(self.command), visible(self.path.partition("?")[0]), time.monotonic() - self.began
        client, gone = str(self.client_address[0]), closed_by_peer(self.connection)
        return InFlight(self.id, client, method, path, age, "running", self.thread.name, gone=gone)


class _Server(ThreadedWSGIServer):
    """Werkzeug's server on a listener of ours; it knows the threads of its connections."""

    thread: WerkzeugThread

    def __init__(self, listener: Listener, app: Callable[..., Any], thread: WerkzeugThread) -> None:
        self.thread = thread
        self.ids = itertools.count(1)
        self.connections: dict[threading.Thread, socket.socket] = {}
        host = f"unix://{listener.address.path}" if listener.address.path else listener.address.host
        super().__init__(host, listener.address.port, app, _Request, fd=listener.socket.fileno())
        self.socket.setblocking(False)

    def accept_one(self) -> None:
        """Accept a connection that waits; what ``socketserver.BaseServer.serve_forever`` calls."""
        self._handle_request_noblock()  # type: ignore[attr-defined]  # typeshed leaves it out

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread of its own, which keeps no interpreter alive if it hangs."""
        worker = AppThread(target=self._serve, args=(request, client_address), name=f"flaskd-werkzeug-{next(self.ids)}")
        self.connections[worker] = request
        try:
            worker.start()
        except RuntimeError:
            del self.connections[worker]
            raise

    def _serve(self, request: Any, client_address: Any) -> None:
        try:
            self.process_request_thread(request, client_address)
        except SystemExit as leaving:  # it ends nothing but this connection
            log.error(f"the app raised {leaving!r} while answering")  # noqa: TRY400 - its traceback says nothing more
        finally:
            self.thread.ended(threading.current_thread())


class WerkzeugThread:
    """Serves a WSGI app with Werkzeug's development server: a thread for each connection, tracebacks in the log.

    The same methods as `WaitressThread`, as far as `flaskd.ServerThread` needs them.
    """

    def __init__(self, app: Callable[..., Any], address: Address) -> None:
        self._app = app
        self._address = address
        self.draining = threading.Event()
        self.completed = 0
        self.begun: set[threading.Thread] = set()
        """The connections whose request has begun to come."""
        self._listener: Listener
        self._server: _Server
        self._opened: contextlib.ExitStack
        self._thread: threading.Thread | None = None
        self._in_hand: dict[int, _Request] = {}
        self._leaving: list[threading.Thread] = []
        """The threads of connections that are closed, which have only to end."""
        self._changed = threading.Condition()
        self._report: DrainReport | None = None
        self._drain_lock = threading.Lock()
        self._deadline = self._streams_until = float("inf")

    def start(self) -> Self:
        """Bind, listen and serve; raises CannotCreateError when the address cannot be had."""
        if self._thread is not None:
            raise FlaskdError("cannot start: this server has been started before; make a new one")
        with contextlib.ExitStack() as opened:  # closed again if anything fails
            self._listener = Listener.bind(self._address)
            opened.callback(self._listener.close)
            self._listener.listen(_LISTEN)
            self._server = _Server(self._listener, EndingStreams(self._app, self._streams_are_over), self)
            opened.callback(self._server.socket.close)
            self._waker, self._woken = (opened.enter_context(each) for each in socket.socketpair())
            opened.enter_context(forgotten_by_children(self._forget))
            self._opened = opened.pop_all()
        self._address = self._listener.address
        self._thread = threading.Thread(target=self._run, name="flaskd-server", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # no more threads to be had
            self._thread = None
            self._opened.close()
            raise
        return self

    def _forget(self) -> None:
        """In a forked child: close the copies of all sockets, whatever else refers to them there."""
        ours = (self._listener.socket, self._server.socket, self._waker, self._woken)
        for sock in (*ours, *self._server.connections.values()):
            with contextlib.suppress(OSError):  # it is closed already
                os.close(sock.detach())

    @property
    def addresses(self) -> list[Address]:
        """Where it listens; ports are real ones after the start."""
        return [self._address]

    @property
    def in_flight(self) -> int:
        """Requests that the app has begun and that are not completely answered."""
        return len(self._in_hand)

    def requests(self) -> list[InFlight]:
        """What is in flight, oldest first."""
        return [each.snapshot() for each in list(self._in_hand.values())]

    def worker_threads(self) -> list[threading.Thread]:
        """The threads of the connections that are not closed."""
        return list(self._server.connections)

    def left_behind(self) -> dict[threading.Thread, InFlight]:
        """The threads that go on with a request that was cut."""
        return {each.thread: each.snapshot() for each in list(self._in_hand.values())} if self._report else {}

    def announce(self) -> None:
        """Do nothing: each response closes its connection as it is."""

    def drain(self, timeout: float) -> DrainReport:
        """Take no new work, finish what is in hand within `timeout` seconds, and tell what became of it."""
        with self._drain_lock:
            if self._report is None:
                self._report = self._drain(time.monotonic(), timeout)
            return self._report

    def hasten_drain(self, timeout: float) -> None:
        """Leave the drain under way at most `timeout` seconds more."""
        with self._changed:
            self._deadline = min(self._deadline, time.monotonic() + timeout)
            self._changed.notify_all()

    def cut(self, reason: str) -> tuple[Cut, ...]:
        """What is in flight, as cut."""
        return tuple(
            Cut(**{**vars(each.snapshot()), "stack": stack_of(each.thread)}, reason=reason)
            for each in list(self._in_hand.values())
        )

    def resume(self) -> None:
        """Refuse: Werkzeug's server cannot be opened again."""
        raise FlaskdError('cannot resume: Werkzeug\'s server serves once; start a new one, or use server="waitress"')

    def end(self, timeout: float) -> None:
        """Join all threads, waiting at most `timeout` seconds for those of the connections, and close everything."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._wake()
        thread.join()
        until = time.monotonic() + timeout
        for worker in [*self._server.connections, *self._leaving]:
            worker.join(max(0.0, until - time.monotonic()))
        self._opened.close()

    def _wake(self) -> None:
        """Let the serving thread end; said like this it arrives even when a forked child has a copy of the socket."""
        _shut(self._waker, socket.SHUT_RDWR)

    # --- the serving thread and the connections' threads ------------------------------------------------------------

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._server.socket, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while not any(key.fileobj is self._woken for key, _ in selector.select()):
                self._accept()
            selector.unregister(self._woken)
            # The gate: new clients are refused, those whose handshake is done are served. Bounded: clients come back.
            until = time.monotonic() + (GATE if self._listener.gate() else 0)
            self._listener.withdraw()
            for _ in range(BACKLOG):
                if selector.select(max(0.0, until - time.monotonic())):
                    self._accept()
                elif time.monotonic() >= until:
                    break
        self._server.socket.close()
        self._listener.close()

    def _accept(self) -> None:
        self._server.accept_one()

    def accepted(self, request: _Request) -> None:
        """Count a request as in flight."""
        with self._changed:
            self._in_hand[request.id] = request

    def retire(self, request: _Request, *, completed: bool) -> None:
        """Take it out of flight."""
        with self._changed:
            del self._in_hand[request.id]
            self.completed += completed

    def ended(self, worker: threading.Thread) -> None:
        """Note that a connection is closed."""
        with self._changed:
            self.begun.discard(worker)
            self._leaving = [each for each in self._leaving if each.is_alive()] + [worker]
            self._server.connections.pop(worker, None)
            self._changed.notify_all()

    def _streams_are_over(self) -> bool:
        return self.draining.is_set() and time.monotonic() >= self._streams_until

    # --- drain, in the thread that asked for it ---------------------------------------------------------------------

    def _drain(self, began: float, timeout: float) -> DrainReport:
        completed = self.completed
        self.hasten_drain(timeout)  # what somebody else has said in this moment counts, too
        self._streams_until = began + STREAM_GRACE
        self.draining.set()
        self._wake()
        tell_of_ends(self._look_again)
        if self._thread is not None:
            self._thread.join()
        with self._changed:
            self._wait_until(began + _GRACE)
            for worker, sock in list(self._server.connections.items()):
                if worker not in self.begun:  # what lies in the kernel is still read after this, and then comes the end
                    _shut(sock, socket.SHUT_RD)
            self._wait_until(None, background=True)
            cut = self.cut(TOO_LATE)
            for sock in list(self._server.connections.values()):
                _shut(sock, socket.SHUT_RDWR)
        for each in cut:
            log.warning("\n".join(filter(None, [f"cut {each}", each.stack])), extra={"fields": each.as_json()})
        tell_no_more(self._look_again)
        return DrainReport(self.completed - completed, 0, cut, time.monotonic() - began, left_behind())

    def _look_again(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _wait_until(self, moment: float | None, *, background: bool = False) -> None:
        """Wait until all connections are closed, or a moment came, or the deadline, which may come nearer meanwhile.

        With `background` what is under way there is waited for, too.
        """
        while self._server.connections or (background and in_background()):
            left = min(self._deadline, moment or self._deadline) - time.monotonic()
            if left <= 0:
                return
            self._changed.wait(left)


def _shut(sock: socket.socket, how: int) -> None:
    with contextlib.suppress(OSError):  # it is closed already
        sock.shutdown(how)
