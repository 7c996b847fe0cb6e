"""A connection and its requests, on waitress' own channel and parser.

Everything here overrides a method of waitress 3; each of those internals has a contract test in
``tests/unit/server/test_contract.py``, so that a new waitress fails a test and not a user.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Mapping
from typing import Any

from flaskd.server.context import Context
from flaskd.server.output import OutputChannel
from flaskd.server.request import Request
from flaskd.server.tasks import AppTask, HealthTask, RefusalTask, RejectTask
from flaskd.sockets import unread

log = logging.getLogger("flaskd.server")

_DISCARD = 1 << 16
"""Bytes thrown away at once."""
_BODY = 1 << 16
"""Bytes of a body read at once; waitress' 8 KiB are a turn of the loop for each. A head is read in its small bites,
because what lies behind it may be hundreds of requests more."""
_QUICK = 0.001
"""Seconds between an answer and the next request, by which a thread knows a client that asks again at once."""


class _ChannelServer:
    """What a channel knows as its server: the acceptor, but it wakes the loop for this one channel."""

    def __init__(self, channel: Channel, acceptor: Any, sock: Any) -> None:
        self._channel = channel
        self._acceptor = acceptor
        self.adj = acceptor.adj
        self.active_channels = acceptor.context.probes if channel.internal else acceptor.active_channels
        self.effective_port = acceptor.effective_port
        self.server_name = acceptor.server_name or ("localhost" if channel.internal else sock.getsockname()[0])

    @property
    def application(self) -> Any:
        return self._channel.task.run

    @property
    def app(self) -> Any:
        return self._acceptor.application

    def pull_trigger(self) -> None:
        channel = self._channel
        if channel.requests and channel.requests[0] is channel.serving:
            channel.context.poller.touch(channel)
        # Else waitress is done with the request, and the channel's own service() touches when it is done, too: the loop
        # may take up the next request at once, and the two threads would only fight for the GIL.

    def add_task(self, channel: Channel) -> None:
        # The channel's requests_lock is held in this moment.
        read_after, channel.reads_after = channel.reads_after, None
        if channel.answered_here:
            channel.keeper = None
            channel.context.answer_soon(channel.serve_here)
            return
        channel.keeper = channel.requests[0]
        if read_after is not None:
            read_after.following = channel.requests[0]
        else:
            self._acceptor.task_dispatcher.add_task(channel)


class Channel(OutputChannel):
    """A connection; `here`: all is answered by the loop."""

    one_shot = True
    error_task_class = RefusalTask
    internal = False
    """Whether it is a probe's, which appears in no count and no log."""
    here = False
    keeper: Request | None = None
    """The request for which a thread has the connection, or will have it; meanwhile the loop does not read from it.

    Changed under `requests_lock`, and so is what the poller waits for: the connection is the loop's or a thread's."""
    reads_after: Request | None = None
    """The request that a thread has answered, while it reads the next one from the connection."""

    def __init__(self, acceptor: Any, sock: Any, addr: Any, adj: Any, map: Any = None) -> None:  # noqa: A002 - waitress' name
        context: Context = acceptor.context
        self.parser_class = functools.partial(Request, self)
        self.task_class = self._task_for
        self._flushing = False
        self._last_activity = time.monotonic()
        self._watch: Any = None
        super().__init__(context, _ChannelServer(self, acceptor, sock), sock, addr, adj, map=map)
        if context.drains:
            context.timers.at(self.grace_from + context.keepalive_grace, self.look)

    @property
    def client(self) -> str:
        """The peer's address; ``unix`` for a Unix socket."""
        return "unix" if self.addr[1] is None else str(self.addr[0])

    @property
    def last_activity(self) -> float:
        """The time.monotonic() moment at which it last received or sent something."""
        return self._last_activity

    @last_activity.setter
    def last_activity(self, _wall_clock: float) -> None:
        # Waitress sets it to time.time(), by which a clock that is set forward would make every connection look idle.
        self._last_activity = time.monotonic()

    def stalled(self, since: float) -> bool:
        """Whether nothing has come or gone since that time.monotonic() moment, though it was the client's turn."""
        if self.last_activity >= since or not self.outbuf_lock.acquire(blocking=False):
            return False  # a thread that holds the lock is about to send
        try:
            return not self.requests or self.total_outbufs_len > 0
        finally:
            self.outbuf_lock.release()

    @property
    def idle(self) -> bool:
        """Whether nothing is in hand: no request, no part of one, no output."""
        return not (self.keeper or self.requests or self.arriving or self.total_outbufs_len or self.unsettled)

    @property
    def grace_left(self) -> float:
        """Seconds in which the client of a drained connection may still send a request, since its last answer."""
        return self.grace_from + self.context.keepalive_grace - time.monotonic()

    @property
    def too_late(self) -> bool:
        """Whether a request that wants to be told to continue comes after the connection's grace."""
        return self.context.draining.is_set() and self.grace_left <= 0

    @property
    def names_limits(self) -> bool:
        """Whether the log names the setting that a request goes beyond."""
        return self.context.names_limits

    def client_told_by(self, headers: Mapping[str, str]) -> str:
        """The client's address as a trusted proxy tells it in a request's headers; empty without one (any thread)."""
        proxies = self.context.proxies
        return proxies.client(self.addr[0], headers) if proxies is not None else ""

    def close_if_idle(self) -> None:
        """While draining: half-close when nothing is in hand, once the grace is over (loop's thread)."""
        context = self.context
        if not context.drains or self.internal or self.half_closed or not self.idle:
            return
        if self in self.account.streams or unread(self.socket):
            return
        left = self.grace_left
        if left <= 0:
            self.half_close()
        else:
            context.timers.at(time.monotonic() + left, self.look)

    def look(self, now: float) -> None:
        """Close what had its time: a connection that is half-closed, or one that is idle in a drain (loop's thread)."""
        if self._fileno is None:  # closed meanwhile
            return
        if self.half_closed:
            self.linger(now)
        else:
            self.close_if_idle()

    # --- one request ---------------------------------------------------------------------------------------------

    @property
    def answered_here(self) -> bool:
        """Whether the next request is answered in the loop's thread."""
        request = self.requests[0]
        if request.error or request.rejected or self.context.refusing or self.context.alone:
            return True
        return self._asks_for_health(request)

    def _asks_for_health(self, request: Request) -> bool:
        if self.here:
            return True
        path = self.context.health_path
        return bool(path) and not request.error and request.path == path and request.command in {"GET", "HEAD"}

    def _task_for(self, channel: Channel, request: Request) -> Any:
        if request.rejected or self.context.refusing:
            request.rejected = True
            return RejectTask(channel, request)
        if self._asks_for_health(request):
            return HealthTask(channel, request)
        task = self.task = AppTask(channel, request)
        return task

    def service(self) -> None:
        """Answer the first request in line, and go on with a client that asks again at once (pool's thread).

        Its next request needs no way through the loop, which costs two switches between threads.
        """
        request = self.requests[0]
        quick = request.first_byte - self.grace_from < _QUICK
        while True:
            self._answer(request)
            if self.keeper is not request:  # the next one was in line, and another thread has the connection
                self.context.poller.touch(self)
                return
            if quick:
                self._read_on(request)
            if request.following is None:
                break
            request = request.following
        if self.keeper is request:
            self._give_back()
        if not self.connected:
            self._free_arriving()

    def _read_on(self, answered: Request) -> None:
        """Read what a quick client sends next; `answered.following` is set if that is for this thread to answer."""
        sock = self.socket  # None once the loop has closed it
        if self.context.drains or self.context.pool.wanted or sock is None or not super().readable():
            return
        if self._watch is None:
            try:
                self._watch = self.context.poller.watch(sock)
            except (OSError, ValueError):  # the loop closed it in this moment: its client left
                return
        if not self._watch(_QUICK):
            return
        self.reads_after = answered
        try:
            if data := self._receive():  # else it is at its end, which the loop will see
                self.received(data)
        except Exception:  # noqa: BLE001 - as wasyncore.read() does in the loop
            self.handle_error()
        if self.reads_after is answered:  # else another thread may have the connection by now
            self.reads_after = None

    def _give_back(self) -> None:
        """Leave the connection to the loop (who has it)."""
        with self.requests_lock:
            self.keeper = None
            if not (self.writable() or self.context.drains):
                if (sock := self.socket) is not None and self.readable():
                    self.context.poller.expect(sock)  # without a word to the loop
                return
        self.context.poller.touch(self)

    def serve_here(self) -> None:
        """Answer the first request in line in the loop's thread."""
        if self.requests and self.connected:
            request = self.keeper = self.requests[0]
            self._answer(request)
            if self.keeper is request:
                self._give_back()
            else:
                self.context.poller.touch(self)

    def _answer(self, request: Request) -> None:
        request.thread = threading.current_thread()
        request.began = time.monotonic()
        request.starts_at = request.ends_at = self.output_length()
        self.serving = request
        try:
            super().service()
        except BaseException:  # lets no thread and no connection go missing, whatever kills the task
            log.exception(f"cannot finish {request.snapshot()}: the connection is closed")
            with self.requests_lock:
                for each in self.requests:
                    each.close()
                self.requests = []
                self.close_when_flushed = True
        request.answered = request.over = True
        with self.outbuf_lock:
            if not self.stream_over:
                self.unsettled.append(request)
            self._settle()
        self.account.answered(request)
        if self.context.drains:
            self.context.poller.touch(self)

    # --- input and output, in the loop's thread --------------------------------------------------------------------

    def readable(self) -> bool:
        """Waitress' rule, unless a thread has the connection; a half-closed one is read to its end."""
        return self.half_closed or (self.keeper is None and bool(super().readable()))

    def writable(self) -> bool:
        """Waitress' rule; nothing is sent after the half-close."""
        return not self.half_closed and bool(super().writable())

    def handle_read(self) -> None:
        """Read; what comes after the half-close is thrown away, because its answer could not be sent."""
        data = self._receive()
        if data is None:
            return  # the event was for the socket that had this number before
        if not data:
            self.handle_close()
        elif self.half_closed:
            self._heard_at = time.monotonic()
        else:
            self.received(data)

    def _receive(self) -> bytes | None:
        """What has come; empty at the end of the connection, None when there is nothing."""
        if (sock := self.socket) is None:  # closed by the loop, while a thread was about to read
            return b""
        try:
            data: bytes = sock.recv(self._bite)
        except BlockingIOError:
            return None
        except OSError:
            return b""
        if data and not self.half_closed:
            self.last_activity = time.monotonic()
        return data

    @property
    def _bite(self) -> int:
        if self.half_closed:
            return _DISCARD
        return _BODY if self.request is not None and self.request.headers_finished else int(self.adj.recv_bytes)

    def handle_write(self) -> None:
        """Flush and retire what is done."""
        self._flushing = True
        try:
            super().handle_write()
        finally:
            self._flushing = False
        if self.unsettled:
            with self.outbuf_lock:
                self._settle()

    def handle_close(self) -> None:
        """Close; what was in hand is over. After an answer the close is lingering, so that nothing of it is reset."""
        if self._flushing and self.connected and not self.total_outbufs_len and self._client_may_be_sending():
            self.half_close()
            return
        super().handle_close()
        with self.outbuf_lock:
            self._settle()
        self._free_arriving()

    def _free_arriving(self) -> None:
        """Free what has come of a closed connection's next request: it may be a file, and would stay until collected.

        A thread that is just reading it, and so has the lock, does this when it has done so.
        """
        if self.requests_lock.acquire(blocking=False):
            try:
                request, self.request = self.request, None
            finally:
                self.requests_lock.release()
            if request is not None:
                request.close()

    def _client_may_be_sending(self) -> bool:
        """Whether closing now could reset the connection, and destroy an answer that is under way (RFC 9112 §9.6)."""
        return self.context.closing or self.serving_was_refused or unread(self.socket) > 0


class Probe(Channel):
    """A connection of one's own, which came through no listener."""

    internal = True
