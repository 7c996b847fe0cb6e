"""A connection and its requests, on waitress' own channel.

What is taken from waitress 3, or overrides it, has a contract test in ``tests/unit/server/test_contract.py``, so that a
new waitress fails a test and not a user.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from typing import Any

from waitress.channel import ClientDisconnected

from flaskd.server.app_task import AppTask
from flaskd.server.context import Context
from flaskd.server.output import OutputChannel
from flaskd.server.request import Request
from flaskd.server.tasks import HealthTask, Recorded, RefusalTask, RejectTask
from flaskd.sockets import unread

log = logging.getLogger("flaskd.server")

_DISCARD = 1 << 16
"""Bytes thrown away at once."""
_BODY = 1 << 16
"""Bytes of a body read at once; waitress' 8 KiB are a turn of the loop for each. A head is read in its small bites,
because what lies behind it may be hundreds of requests more."""


class _ChannelServer:
    """What a channel knows as its server: the acceptor, but it wakes the loop for this one channel."""

    def __init__(self, channel: Channel, acceptor: Any, sock: Any) -> None:
        self._channel = channel
        self._acceptor = acceptor
        self.adj = acceptor.adj
        self.active_channels = acceptor.context.probes if channel.internal else acceptor.active_channels
        self.effective_port = acceptor.effective_port
        self.environ = acceptor.environ
        self.server_name = acceptor.server_name or ("localhost" if channel.internal else sock.getsockname()[0])

    @property
    def app(self) -> Any:
        return self._acceptor.application

    def pull_trigger(self) -> None:
        channel = self._channel
        if channel.requests and channel.requests[0] is channel.serving:
            channel.context.poller.touch(channel)
        # Else the request is answered, and service() touches when it leaves the connection.

    def add_task(self, channel: Channel) -> None:
        channel.begin_next()


def _named(request: Request) -> dict[str, Any]:
    """The `extra` of a line of the log about a request that is answered."""
    return {"fields": {"id": request.id, **request.ids.fields()}}


class Channel(OutputChannel):
    """A connection; `here`: all is answered by the loop."""

    one_shot = True
    here = False
    keeper: Request | None = None
    """The request for which a thread has the connection, or will have it; meanwhile the loop does not read from it.

    Changed under `requests_lock`, and so is what the poller waits for: the connection is the loop's or a thread's."""

    def __init__(self, acceptor: Any, sock: Any, addr: Any, adj: Any, map: Any = None) -> None:  # noqa: A002 - waitress' name
        context: Context = acceptor.context
        self._flushing = False
        self._last_activity = time.monotonic()
        self._bite = int(adj.recv_bytes)
        super().__init__(context, _ChannelServer(self, acceptor, sock), sock, addr, adj, map=map)
        if context.drains:
            context.timers.at(self.grace_from + context.keepalive_grace, self.look)

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

    def begin_next(self) -> None:
        """Let the first request in line be answered, by a thread or by the loop itself; `requests_lock` is held."""
        request, context = self.requests[0], self.context
        here = self.here or context.alone or context.refusing or request.rejected or request.error
        if not here and not (request.path == context.health_path and request.command in {"GET", "HEAD"}):
            most = context.limits.max_queue
            if most is None or self.internal or not context.pool.crowded(most):
                self.keeper = request
                context.pool.add_task(self)
                return
            self.refuse("max_queue")
        self.keeper = None
        context.answer_soon(self.serve_here)

    def _task_for(self, request: Request) -> Recorded:
        if request.error:
            return RefusalTask(self, request)
        if request.rejected or self.context.refusing:
            request.rejected = True
            return RejectTask(self, request)
        if self.here or (request.path == self.context.health_path and request.command in {"GET", "HEAD"}):
            return HealthTask(self, request)
        task = self.task = AppTask(self, request)
        return task

    def parser_class(self, adj: Any) -> Request:
        """What waitress reads a request into."""
        return Request(self, adj)

    def service(self) -> float:
        """Answer the first request in line, and leave the connection to the next one, or to the loop (its thread).

        Gives the seconds from the begin to the last byte that was put out.
        """
        request = self.requests[0]
        request.thread = threading.current_thread()
        request.began = began = time.monotonic()
        request.starts_at = request.ends_at = self.output_length() if self.total_outbufs_len else self.flushed
        self.serving = request
        if (board := self.context.board) is not None:
            board.begin(request)
        try:
            last = self._answer(request)
        except BaseException:  # lets no thread and no connection go missing, whatever kills the task
            log.exception(f"cannot finish {request.snapshot()}: the connection is closed")
            last = True
        ended = self.grace_from = self._last_activity = time.monotonic()
        request.answered = request.over = True
        if self.unsettled or self.total_outbufs_len or self.account.streams or not self.connected:
            with self.outbuf_lock:
                if not self.stream_over:
                    self.unsettled.append(request)
                if board is not None:
                    board.send(request)
                self._settle()
        else:
            self._retire(request)
        if self.account.streams or self.context.pool.lost:
            self.account.answered(request)
        self._go_on(last=last)
        if not self.connected:
            self._free_arriving()
        return ended - began

    def serve_here(self) -> None:
        """Answer the first request in line in the loop's thread; of a client that has gone, free what it sent."""
        if self.requests and self.connected:
            self.keeper = self.requests[0]
            self.keeper.here = True
            self.service()
        else:
            for each in self.requests:
                each.close()

    def _answer(self, request: Request) -> bool:
        """Give the answer; whether it is the last one on the connection."""
        task = self._task_for(request)
        if not self.connected:
            return True
        try:
            task.service()
        except ClientDisconnected:
            if not self.stream_over:
                which = f"{request.path}{request.ids}"
                self.logger.info(f"Client disconnected while serving {which}", extra=_named(request))
            return True
        except Exception:
            self.logger.exception(f"Exception while serving {request.path}{request.ids}", extra=_named(request))
            if not task.wrote_header:
                self.answer_instead(500, "The server encountered an unexpected internal server error")
            return True
        return bool(task.close_on_finish)

    @property
    def _expects_continue(self) -> bool:
        """Whether the next request waits for a word to continue, which could not be given before (RFC 9110 §10.1.1)."""
        arriving = self.request
        return bool(arriving and arriving.expect_continue and arriving.headers_finished and not self.sent_continue)

    def answer_instead(self, status: int, why: str) -> None:
        """Answer the request that is being served in the place of the app, and close the connection."""
        failed = Request(self, self.adj)
        failed.refuse(status, why)
        failed.version = self.serving.version
        failed.headers["HTTP_CONNECTION"] = self.serving.headers.get("HTTP_CONNECTION", "")
        with contextlib.suppress(ClientDisconnected):
            RefusalTask(self, failed).service()

    def _go_on(self, *, last: bool) -> None:
        """Leave the connection, whose first request is answered; `last`: what was pipelined behind is not."""
        if not last and len(self.requests) > 1 and self.total_outbufs_len > self.adj.outbuf_high_watermark:
            self.context.waiting.for_client(self)  # what is pipelined behind would be put out on top
        with self.requests_lock:
            if last:
                self.close_when_flushed = True
                for each in self.requests:
                    each.close()
                self.requests = []
            else:
                request = self.requests.pop(0)
                if request.body_rcv is not None:
                    request.close()
                if self.current_outbuf_count > 0:
                    self.current_outbuf_count = self.adj.outbuf_high_watermark  # the next answer has buffers of its own
            self.keeper = None
            if self.connected and self.requests:
                self.requests[0].its_turn = time.monotonic()
                self.begin_next()
            else:
                if self.request is not None and self.connected and not last and self._expects_continue:
                    self.send_continue()
                writable = self.total_outbufs_len or self.will_close or self.close_when_flushed
                if not (writable or self.context.drains):
                    if (sock := self.socket) is not None:
                        self.context.poller.expect(sock)  # without a word to the loop
                    return
        self.context.poller.touch(self)

    # --- input and output, in the loop's thread --------------------------------------------------------------------

    def readable(self) -> bool:
        """Waitress' rule, unless a thread has the connection; a half-closed one is read to its end."""
        return self.half_closed or (self.keeper is None and bool(super().readable()))

    def writable(self) -> bool:
        """Waitress' rule; nothing is sent after the half-close."""
        return not self.half_closed and bool(super().writable())

    def handle_read(self) -> bool:
        """Read; whether a request is complete that this thread is to answer, because it has got a place for it.

        What comes after the half-close is thrown away, because its answer could not be sent.
        """
        try:
            data: bytes = self.socket.recv(self._bite if self.request is None and not self.half_closed else self._big_bite)
        except BlockingIOError:
            return False  # the event was for the socket that had this number before
        except OSError:
            data = b""
        if not data:
            self.handle_close()
            return False
        if self.half_closed:
            self._heard_at = time.monotonic()
            return False
        self._last_activity = time.monotonic()
        return self.received(data)

    @property
    def _big_bite(self) -> int:
        """How many bytes to read at once of what is not the beginning of a request."""
        if self.half_closed:
            return _DISCARD
        return _BODY if self.request is not None and self.request.headers_finished else self._bite

    def received(self, data: bytes) -> bool:
        """Take what has come: a common request in one pass, anything else by waitress' way.

        Gives whether a request is complete that this thread is to answer; all others are queued.
        """
        if self.request is None:
            request = Request(self, self.adj)
            with self.requests_lock:
                if self.will_close or self.close_when_flushed:
                    return False
                if request.take_common(data):
                    self.requests.append(request)
                    return len(self.requests) == 1 and self._begin(request)
        super().received(data)
        return False

    def _begin(self, request: Request) -> bool:
        """Take a place for the only request in line, for this thread to answer it; else queue it: then False."""
        context = self.context
        if context.closing or context.refusing or self.here or request.path == context.health_path or not context.pool.take_place():
            self.begin_next()
            return False
        self.keeper = request
        return True

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
