"""`WerkzeugThread`: an app on Werkzeug's development server, in a thread that can be drained and stopped.

It is ``werkzeug.serving.make_server(threaded=True)``, made safe to stop. Werkzeug's own ``shutdown()`` returns while
requests are unfinished; its ``server_close()`` either waits for ever for a silent client, or waits for none; and it
resets the backlog. Werkzeug closes each connection after its response, so a drain has no keep-alive to end.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, Self

from flaskd.background_work import in_background, left_behind, tell_no_more, tell_of_ends
from flaskd.errors import FlaskdError
from flaskd.ledger import Cut, DrainReport, InFlight
from flaskd.process.forks import forgotten_by_children
from flaskd.server.drain import in_thread_of_its_own
from flaskd.server.draining import BACKLOG, GATE, GATE_AGAIN, GATE_MOST, TOO_LATE
from flaskd.server.exchange import OwnErrors, Request, Server
from flaskd.server.streams import STREAM_GRACE, EndingStreams
from flaskd.sockets import Address, Listener

log = logging.getLogger("flaskd.server")

_LISTEN = 128
"""The backlog: connections that the kernel holds; the same as Werkzeug's (werkzeug.serving.LISTEN_QUEUE)."""
_GRACE = 0.2
"""Seconds of a drain in which a client that had connected before may still begin its request."""


class WerkzeugThread:
    """Serves a WSGI app with Werkzeug's development server: a thread for each connection, tracebacks in the log.

    It has the methods of `WaitressThread` that `flaskd.ServerThread` uses.
    """

    def __init__(self, app: Callable[..., Any], address: Address) -> None:
        self._app = app
        self._address = address
        self.draining = threading.Event()
        self.completed = 0
        self.begun: dict[threading.Thread, Request] = {}
        """The requests whose first line has come, by the thread of their connection."""
        self._listener: Listener
        self._server: Server
        self._opened: contextlib.ExitStack
        self._thread: threading.Thread | None = None
        self._in_hand: dict[int, Request] = {}
        self._cut: list[Cut] = []
        """The requests that were cut since a drain began."""
        self._leaving: list[threading.Thread] = []
        """The threads whose connection is closed, and which are about to end."""
        self._changed = threading.Condition()
        self._drained = False
        self._drainer: threading.Thread | None = None
        self._deadline = self._streams_until = float("inf")

    def start(self) -> Self:
        """Bind, listen and serve; raises CannotCreateError if the address cannot be bound."""
        if self._thread is not None:
            raise FlaskdError("cannot start: this server has been started before; make a new one")
        with contextlib.ExitStack() as opened:  # closes everything if a step fails
            self._listener = Listener.bind(self._address)
            opened.callback(self._listener.close)
            self._listener.listen(_LISTEN)
            self._server = Server(
                self._listener, EndingStreams(OwnErrors(self._app, self._broke_off), self._streams_are_over), self
            )
            opened.callback(self._server.socket.close)
            self._waker, self._woken = (opened.enter_context(each) for each in socket.socketpair())
            opened.enter_context(forgotten_by_children(self._forget))
            self._opened = opened.pop_all()
        self._address = self._listener.address
        self._thread = threading.Thread(target=self._run, name="flaskd-server", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # no thread can be started
            self._thread = None
            self._opened.close()
            raise
        return self

    def _forget(self) -> None:
        """In a forked child, close its copies of all sockets, even those to which other objects refer."""
        ours = (self._listener.socket, self._server.socket, self._waker, self._woken)
        for sock in (*ours, *self._server.connections.values()):
            with contextlib.suppress(OSError):  # it is closed already
                os.close(sock.detach())

    @property
    def addresses(self) -> list[Address]:
        """The address that it listens on; after the start, port 0 is replaced by the real port."""
        return [self._address]

    @property
    def in_flight(self) -> int:
        """How many requests the app has begun and not completely answered."""
        return len(self._in_hand)

    def requests(self) -> list[InFlight]:
        """The requests in flight, oldest first."""
        return [each.snapshot() for each in list(self._in_hand.values())]

    def app_threads(self) -> list[threading.Thread]:
        """The threads of the connections that are not closed."""
        return list(self._server.connections)

    def left_behind(self) -> dict[threading.Thread, InFlight]:
        """After a drain, the threads that still run a request that was cut, and that request."""
        return {each.thread: each.snapshot() for each in list(self._in_hand.values())} if self._drained else {}

    dead = ""
    """Always empty: a thread that dies ends only its own connection."""

    @property
    def counted(self) -> tuple[int, int]:
        """How many requests have been completed since the start, and 0, because it rejects none."""
        return self.completed, 0

    def begin_drain(
        self,
        timeout: float,
        over: Callable[[DrainReport], object],
        *,
        announce: float = 0.0,  # noqa: ARG002 - each response closes its connection anyway
        counted_from: tuple[int, int] | None = None,  # noqa: ARG002
    ) -> None:
        """Take no new work, finish the requests in hand within `timeout` seconds, and call `over` with the report."""
        began = time.monotonic()
        self._drainer = in_thread_of_its_own(self, lambda: self._drain(began, timeout), over)

    def hasten_drain(self, timeout: float) -> None:
        """Let the drain under way take at most `timeout` more seconds."""
        with self._changed:
            self._deadline = min(self._deadline, time.monotonic() + timeout)
            self._changed.notify_all()

    def cut(self, reason: str) -> tuple[Cut, ...]:
        """Entries for all requests in flight, as cut for this reason."""
        return tuple(each.cut(reason) for each in list(self._in_hand.values()))

    def resume(self) -> None:
        """Raise FlaskdError: Werkzeug's server cannot be opened again."""
        raise FlaskdError('cannot resume: Werkzeug\'s server serves once; start a new one, or use server="waitress"')

    def end(self, timeout: float) -> None:
        """Join all threads, waiting at most `timeout` seconds for those of the connections, and close everything."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._wake()
        thread.join()
        if self._drainer is not None and self._drainer.ident is not None:  # it has called `over`, and ends
            self._drainer.join(timeout)
        until = time.monotonic() + timeout
        for each in [*self._server.connections, *self._leaving]:
            each.join(max(0.0, until - time.monotonic()))
        self._opened.close()

    def _wake(self) -> None:
        """Let the serving thread end. Unlike a close, a shutdown works even if a forked child has a copy."""
        _shut(self._waker, socket.SHUT_RDWR)

    # --- the serving thread and the connections' threads ------------------------------------------------------------

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._server.socket, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while not any(key.fileobj is self._woken for key, _ in selector.select()):
                self._accept()
            selector.unregister(self._woken)
            # The gate refuses new clients; those whose handshake is done are served. Bounded: clients come back.
            began, gated, through = time.monotonic(), self._listener.gate(), False
            until, at_most = (began + GATE, began + GATE_MOST) if gated else (began, began)
            self._listener.withdraw()
            for _ in range(BACKLOG):
                if selector.select(0 if through else max(0.0, until - time.monotonic())):
                    self._accept()
                elif through:
                    break
                elif (now := time.monotonic()) >= until:
                    through = now >= at_most or not self._listener.handshakes()
                    until = now + GATE_AGAIN
        self._server.socket.close()
        self._listener.close()

    def _accept(self) -> None:
        self._server.accept_one()

    def accepted(self, request: Request) -> None:
        """Count a request as in flight."""
        with self._changed:
            self._in_hand[request.id] = request

    def retire(self, request: Request, fault: str) -> None:
        """Take a request out of flight; `fault` says why a client that stayed did not get all of the answer, or ""."""
        cut = request.cut(fault) if fault else None
        with self._changed:
            del self._in_hand[request.id]
            self.completed += not (cut or request.gone)
            if cut and self.draining.is_set():
                self._cut.append(cut)
        if cut:
            _tell(cut)

    def _broke_off(self) -> None:
        self.begun[threading.current_thread()].break_off()

    def ended(self, thread: threading.Thread) -> None:
        """Note that the connection of a thread is closed."""
        with self._changed:
            self.begun.pop(thread, None)
            self._leaving = [each for each in self._leaving if each.is_alive()] + [thread]
            self._server.connections.pop(thread, None)
            self._changed.notify_all()

    def _streams_are_over(self) -> bool:
        return self.draining.is_set() and time.monotonic() >= self._streams_until

    # --- drain, in a thread of its own ------------------------------------------------------------------------------

    def _drain(self, began: float, timeout: float) -> DrainReport:
        completed = self.completed
        self.hasten_drain(timeout)  # does not extend a deadline that another thread has set just now
        self._streams_until = began + STREAM_GRACE
        self.draining.set()
        self._wake()
        tell_of_ends(self._look_again)
        if self._thread is not None:
            self._thread.join()
        with self._changed:
            self._wait_until(began + _GRACE)
            for thread, sock in self._server.connections.copy().items():
                if thread not in self.begun:  # bytes in the kernel can still be read, then comes the end
                    _shut(sock, socket.SHUT_RD)
            self._wait_until(None, background=True)
            arriving = [each.cut(TOO_LATE) for each in list(self.begun.values()) if each.phase == "receiving"]
            late = [*self.cut(TOO_LATE), *arriving]
            cut = (*self._cut, *late)
            for sock in list(self._server.connections.values()):
                _shut(sock, socket.SHUT_RDWR)
        for each, told in Cut.all_with_stacks(late):
            log.warning(told, extra={"fields": each.as_json()})
        tell_no_more(self._look_again)
        self._drained = True
        return DrainReport(self.completed - completed, 0, cut, time.monotonic() - began, left_behind())

    def _look_again(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _wait_until(self, moment: float | None, *, background: bool = False) -> None:
        """Wait until all connections are closed, or `moment` or the deadline came; the deadline may change meanwhile.

        With `background`, wait for background work, too.
        """
        while self._server.connections or (background and in_background()):
            left = min(self._deadline, moment or self._deadline) - time.monotonic()
            if left <= 0:
                return
            self._changed.wait(left)


def _tell(cut: Cut) -> None:
    log.warning(cut.with_stack(), extra={"fields": cut.as_json()})


def _shut(sock: socket.socket, how: int) -> None:
    with contextlib.suppress(OSError):  # it is closed already
        sock.shutdown(how)
