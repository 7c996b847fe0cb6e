"""A connection and its requests, built on waitress' own channel.

All that this class uses or overrides of waitress 3 has a contract test in ``tests/unit/server/test_contract.py``: a
change in a newer waitress fails a test, and does not surprise a user.
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
from flaskd.server.input import InputChannel
from flaskd.server.request import Request
from flaskd.server.tasks import HealthTask, Recorded, RefusalTask, RejectTask
from flaskd.sockets import unread

log = logging.getLogger("flaskd.server")


class _ChannelServer:
    """What waitress' channel uses as its server: the acceptor, except that it wakes the loop for this one channel."""

    __slots__ = ("_channel", "active_channels", "adj", "effective_port", "environ", "server_name")

    def __init__(self, channel: Channel, acceptor: Any, sock: Any) -> None:
        self._channel: Channel | None = channel
        self.adj = acceptor.adj
        self.active_channels = acceptor.context.probes if channel.internal else acceptor.active_channels
        self.effective_port = acceptor.effective_port
        self.environ = acceptor.environ
        self.server_name = acceptor.server_name or ("localhost" if channel.internal else sock.getsockname()[0])

    def pull_trigger(self) -> None:
        channel = self._channel
        if channel is not None and channel.requests and channel.requests[0] is channel.serving:
            channel.context.poller.touch(channel)
        # Otherwise the request has been answered, and service() touches the channel when it leaves it.

    def add_task(self, channel: Channel) -> None:
        channel.begin_next()

    def let_go(self) -> None:
        self._channel = None


_SLOTS = ("_flushing",)


def _named(request: Request) -> dict[str, Any]:
    """The `extra` of a log line about a request that is being answered."""
    return {"fields": {"id": request.id, **request.ids.fields()}}


class Channel(InputChannel):
    """A connection, and the answers to its requests."""

    __slots__ = _SLOTS

    def __init__(self, acceptor: Any, sock: Any, addr: Any, adj: Any, map: Any = None) -> None:  # noqa: A002 - waitress' name
        context: Context = acceptor.context
        self._flushing = False
        self._last_activity = time.monotonic()
        super().__init__(context, _ChannelServer(self, acceptor, sock), sock, addr, adj, map=map)
        if context.drains:
            context.timers.at(self.grace_from + context.keepalive_grace, self.look)

    @property
    def last_activity(self) -> float:
        """The time.monotonic() moment at which it last received or sent bytes."""
        return self._last_activity

    @last_activity.setter
    def last_activity(self, _wall_clock: float) -> None:
        # Waitress sets this to time.time(): if that clock were set forward, every connection would look idle.
        self._last_activity = time.monotonic()

    def stalled(self, since: float) -> bool:
        """Whether the client has sent and read nothing since that time.monotonic() moment, though it was its turn."""
        if self.last_activity >= since or not self.outbuf_lock.acquire(blocking=False):
            return False  # the thread that holds the lock is about to send
        try:
            return not self.requests or self.total_outbufs_len > 0
        finally:
            self.outbuf_lock.release()

    @property
    def idle(self) -> bool:
        """Whether there is no request, no part of one, and no unsent output."""
        return not (self.keeper or self.requests or self.arriving or self.total_outbufs_len or self.unsettled)

    @property
    def grace_left(self) -> float:
        """Seconds for which the client may still send a request during a drain (negative: the time is over)."""
        return self.grace_from + self.context.keepalive_grace - time.monotonic()

    @property
    def too_late(self) -> bool:
        """Whether a request that expects "100 Continue" comes too late, because the connection's grace is over."""
        return self.context.draining.is_set() and self.grace_left <= 0

    def close_if_idle(self) -> None:
        """During a drain, half-close a connection that is idle, once its grace is over (loop's thread)."""
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
        """Close the connection if its time is over: half-closed, or idle during a drain (loop's thread)."""
        if self._fileno is None:  # it was closed meanwhile
            return
        if self.half_closed:
            self.linger(now)
        else:
            self.close_if_idle()

    # --- one request ---------------------------------------------------------------------------------------------

    def begin_next(self) -> None:
        """Have the first request in `requests` answered, by a thread or the loop; the caller holds `requests_lock`."""
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
        return AppTask(self, request)

    def service(self) -> float:
        """Answer the first request, then hand on the connection; returns how many seconds the answer took."""
        request, context = self.requests[0], self.context
        if request.thread is None:
            request.thread = threading.current_thread()
        request.began = began = time.monotonic()
        request.starts_at = request.ends_at = self.output_length() if self.total_outbufs_len else self.flushed
        self.serving = request
        if (board := context.board) is not None:
            board.begin(request)
        task: Recorded | None = None
        last = True
        try:
            task = AppTask(self, request) if request.at_once else self._task_for(request)
            if self.connected:
                task.service()
                last = task.close_on_finish
        except BaseException as error:  # noqa: BLE001 - whatever the task raises, the thread goes on
            self._failed(request, task, error)
        ended = self.grace_from = self._last_activity = time.monotonic()
        request.answered = request.over = True
        account = self.account
        if self.unsettled or self.total_outbufs_len or account.streams or not self.connected:
            self._settle_later(request)
        elif request.at_once and request.whole and self.flushed >= request.ends_at:
            account.retire(request, "completed", None, ended)
        else:
            self._retire(request)
        if account.streams or context.pool.lost:
            account.answered(request)
        self._go_on(last=last)
        if not self.connected:
            self._let_go()
        return ended - began

    def _settle_later(self, request: Request) -> None:
        """Retire a request once the kernel has taken all of its answer, which may be at once."""
        with self.outbuf_lock:
            if not self.stream_over:
                self.settle_later(request)
            if (board := self.context.board) is not None:
                board.send(request)
            self._settle()

    def serve_here(self) -> None:
        """Answer the first request in the loop's thread; if the client has left, free all that it sent."""
        if self.requests and self.connected:
            self.keeper = self.requests[0]
            self.keeper.here = True
            self.service()
        else:
            for each in self.requests:
                each.close()

    def _failed(self, request: Request, task: Recorded | None, error: BaseException) -> None:
        """Say why the answer to a request ended early, and answer in its place if nothing of it was sent."""
        try:
            if isinstance(error, ClientDisconnected):
                if not self.stream_over:
                    which = f"{request.path}{request.ids}"
                    self.logger.info(f"Client disconnected while serving {which}", extra=_named(request))
            elif isinstance(error, Exception):
                what = f"Exception while serving {request.path}{request.ids}"
                self.logger.error(what, exc_info=error, extra=_named(request))
                if task is None or not task.wrote_header:
                    self.answer_instead(500, "The server encountered an unexpected internal server error")
            else:
                raise error
        except BaseException:
            log.exception(f"cannot finish {request.snapshot()}: the connection is closed")

    @property
    def _expects_continue(self) -> bool:
        """Whether the next request still waits for "100 Continue" (RFC 9110 §10.1.1)."""
        arriving = self.request
        return bool(arriving and arriving.expect_continue and arriving.headers_finished and not self.sent_continue)

    def answer_instead(self, status: int, why: str) -> None:
        """Answer the current request with an error in the place of the app, and close the connection."""
        failed = Request(self, self.adj)
        failed.refuse(status, why)
        failed.version = self.serving.version
        failed.headers["HTTP_CONNECTION"] = self.serving.headers.get("HTTP_CONNECTION", "")
        with contextlib.suppress(ClientDisconnected):
            RefusalTask(self, failed).service()

    def _go_on(self, *, last: bool) -> None:
        """Hand on the connection once its first request was answered; with `last`, drop the requests behind it."""
        requests = self.requests
        if not last and len(requests) > 1 and self.total_outbufs_len > self.adj.outbuf_high_watermark:
            self.context.waiting.for_client(self)  # the next pipelined answer would come on top of it
        with self.requests_lock:
            if last:
                self.close_when_flushed = True
                for each in requests:
                    each.close()
                self.requests = requests = []
            else:
                request = requests.pop(0)
                if request.line is None and request.body_rcv is not None:
                    request.close()
                if self.current_outbuf_count > 0:
                    self.current_outbuf_count = self.adj.outbuf_high_watermark  # the next answer begins a new buffer
            self.keeper = None
            if requests and self.connected:
                requests[0].its_turn = time.monotonic()
                self.begin_next()
            else:
                if self.request is not None and self.connected and not last and self._expects_continue:
                    self.send_continue()
                if not (self.total_outbufs_len or self.will_close or self.close_when_flushed or self.context.drains):
                    self.context.poller.expect(self)  # without waking the loop
                    return
        self.context.poller.touch(self)

    # --- input and output, in the loop's thread --------------------------------------------------------------------

    def writable(self) -> bool:
        """Whether there is something to send: never after the half-close, else as waitress."""
        return not self.half_closed and bool(super().writable())

    def handle_write(self) -> None:
        """Send waiting output, and retire the requests whose answers are completely sent."""
        self._flushing = True
        try:
            super().handle_write()
        finally:
            self._flushing = False
        if self.unsettled:
            with self.outbuf_lock:
                self._settle()

    def handle_close(self) -> None:
        """Close the connection; its requests are over.

        If an answer has just been sent and the client may still be sending, half-close first: closing at once would
        reset the connection, and the client could lose the answer.
        """
        if self._flushing and self.connected and not self.total_outbufs_len and self._client_may_be_sending():
            self.half_close()
            return
        super().handle_close()
        with self.outbuf_lock:
            self._settle()
        self._let_go()

    def _let_go(self) -> None:
        """Free what a closed connection has received and not answered, and drop what refers back to it.

        Otherwise the garbage collector alone would free the connection, which may come late. If another thread holds
        the lock because it reads a request, or will answer one, that thread does this when it has finished.
        """
        if not self.requests_lock.acquire(blocking=False):
            return
        try:
            left = [] if self.request is None else [self.request]  # a part of it may be in a temporary file
            self.request = None
            if self.keeper is None:
                left += self.requests
                self.requests = []
                self.server.let_go()
                self.serving = self.task = self._environ = self._environ_has = None  # type: ignore[assignment]
        finally:
            self.requests_lock.release()
        for each in left:
            each.close()

    def _client_may_be_sending(self) -> bool:
        """Whether closing now could reset the connection and so destroy an answer on its way (RFC 9112 §9.6)."""
        return self.context.closing or self.serving_was_refused or unread(self.socket) > 0


class Probe(Channel):
    """A connection that this process makes to itself, without a listener; it is in no count and no log."""

    internal = True
