"""What comes in on a connection: read, parsed, and given to the thread that read it, or queued."""

from __future__ import annotations

import time
from typing import Any

from flaskd.server.output import OutputChannel
from flaskd.server.request import Request

_BODY = 1 << 16
"""Bytes of a body read at once; waitress' 8 KiB would take a turn of the loop each. A head is still read in pieces of
8 KiB, because hundreds of pipelined requests may follow it."""

_MORE = 4
"""How many more pieces of a body are read at once, before others have their turn."""


class InputChannel(OutputChannel):
    """A connection, as far as the loop reads from it; all methods are for the loop's thread."""

    __slots__ = ()
    one_shot = True
    stays_armed = missed = False
    """Whether the poller waits for the next request all the time, and whether something came while a thread had the
    connection; see `EpollMap`."""
    keeper: Request | None = None
    """The request for which a thread owns the connection, or will own it; meanwhile the loop does not read from it.

    `requests_lock` is held while this changes, and while what the poller waits for changes."""

    @property
    def kind(self) -> str:
        """The kind of the first request (`flaskd.server.head.kind_of`)."""
        return self.requests[0].kind

    @property
    def waits_since(self) -> float:
        """Since when its first request waits for a thread (time.monotonic()); infinity for a probe: it has no limit."""
        if self.internal or not self.requests:
            return float("inf")
        return self.requests[0].its_turn or self.requests[0].complete

    def begin_next(self) -> None:
        """Have the first request answered, by a thread or by the loop itself; the caller holds `requests_lock`."""
        raise NotImplementedError

    def parser_class(self, adj: Any) -> Request:
        """Make the object into which waitress reads the next request; waitress calls this attribute."""
        return Request(self, adj)

    def readable(self) -> bool:
        """Whether to read: always after the half-close, never while a thread owns the connection, else as waitress."""
        return self.half_closed or (self.keeper is None and bool(super().readable()))

    def handle_read(self) -> None:
        """Read from the client; a request that is complete is queued."""
        self.read(at_once=False)

    def read(self, *, at_once: bool = True) -> bool:
        """Read from the client; returns whether a request is complete that this thread is to answer, having a place.

        Without `at_once` it is queued instead. After the half-close the bytes are thrown away, because no answer could
        be sent.
        """
        size = self._bite if self.request is None else self._bites()
        try:
            data: bytes = self.socket.recv(size)
        except BlockingIOError:
            return False  # the event belonged to a closed socket with the same descriptor number
        except OSError:
            data = b""
        if len(data) == size:
            self.missed = True  # there may be more, and epoll would not say so
        if not data:
            self.handle_close()
        elif self.half_closed:
            self._heard_at = time.monotonic()
        elif self.received(data, at_once=at_once):
            return True
        elif len(data) == size:
            self._read_more()
        return False

    def _read_more(self) -> None:
        """Read on while a body comes quicker than it is read, some pieces of it; epoll is asked only after that."""
        for _ in range(_MORE):
            if not self.connected or self.request is None or not self.request.headers_finished:
                return
            try:
                data: bytes = self.socket.recv(_BODY)
            except OSError:
                return  # nothing is there; and an error comes again at the next event
            if data:
                self.received(data)
            if len(data) < _BODY:
                return

    def _bites(self) -> int:
        """How many bytes to read at once of a request that has begun."""
        return _BODY if self.request is not None and self.request.headers_finished else self._bite

    def received(self, data: bytes, *, at_once: bool = False) -> bool:
        """Parse bytes from the client: a common request in one pass, all else with waitress' method.

        Returns whether a request is complete that this thread is to answer, having a place; all others are queued.
        """
        self._last_activity = now = time.monotonic()
        if self.request is None and not (self.requests or self.will_close or self.close_when_flushed):
            request = Request(self, self.adj)  # no thread has the connection, so no lock is needed
            if request.take_common(data, now):
                self.requests.append(request)
                if at_once and self._begin(request):
                    return True
                with self.requests_lock:
                    self.begin_next()
                return False
        super().received(data)
        return False

    def _begin(self, request: Request) -> bool:
        """Take a place for a request, if the app is to answer it, and if one is free; this thread then answers it."""
        context = self.context
        if (
            context.closing
            or context.refusing
            or self.here
            or request.path == context.health_path
            or not context.pool.take_place(request.kind)
        ):
            return False
        self.keeper = request
        request.at_once, request.thread = True, context.pool.leader
        return True
