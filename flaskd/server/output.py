"""The output of a connection: it is counted, its requests are retired once the kernel has it, and it ends in order."""

from __future__ import annotations

import socket
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, Protocol

from waitress.channel import ClientDisconnected, HTTPChannel

from flaskd.server.buffers import AnswerBuffer
from flaskd.server.context import Context
from flaskd.server.head import Fields
from flaskd.server.request import Request
from flaskd.server.request_ids import NO_IDS, Ids
from flaskd.server.slow import OutputLock, Progress
from flaskd.sockets import unacknowledged

_ROOM = 16
"""A thread that waits for its client goes on once one in `_ROOM` parts of ``outbuf_high_watermark`` is free."""
_DISCARD = 1 << 16
"""Bytes that are read at once, to be thrown away, after the half-close."""
_LINGER = 0.2
"""Seconds after the half-close in which the client may close its side, before flaskd closes the connection."""
_LINGER_LOOK = 0.05
"""Seconds between two checks of how many bytes the client has not acknowledged."""
_LINGER_MOST = 2.0
"""Seconds without a sign of life after which a client that has not acknowledged all output is closed."""
_LINGER_SENDING = 30.0
"""Seconds in which a client may go on sending after the half-close, such as a refused body; not during a drain."""


_SLOTS = (
    "_bite", "_environ", "_half_closed_at", "_heard_at", "_high_watermark", "_last_activity", "_linger_until",
    "_send_bytes", "_unacknowledged", "account", "close_when_flushed", "context", "current_outbuf_count", "flushed",
    "grace_from", "most_head_bytes", "request", "serving", "task", "total_outbufs_len", "unsettled", "will_close",
)  # fmt: skip
"""Attributes of a connection that are always set. An object with more than 30 attributes outside of slots takes 1.5 KB
for them, and is slower (SHARED_KEYS_MAX_SIZE in CPython 3.11 to 3.14)."""


class _Answering(Protocol):
    """What the channel needs of the task that runs the app."""

    def run(self, environ: dict[str, Any], start_response: Any) -> Any:
        """Call the app (PEP 3333)."""

    def last_piece(self, *, begun: bool) -> bytes:
        """The bytes that end a stream; `begun`: some of it was written already."""


class OutputChannel(HTTPChannel):  # type: ignore[misc]  # waitress is untyped
    """A connection, as far as tasks use it: its requests, and the output for their answers."""

    __slots__ = _SLOTS
    unsettled: deque[Request] | tuple[Request, ...]
    """The requests that the app has answered, but whose last byte the kernel has not taken yet."""
    internal = False
    """Whether it is a probe's connection, which is in no count and no log."""
    here = False
    """Whether the loop itself answers all requests, without the app."""
    half_closed = False
    fault = ""
    """Why written output cannot be sent although the client is still connected."""
    stream_over = False
    progress: Progress | None = None
    """How quickly the client sends or reads, while the server waits for it."""
    fields: Fields | None = None
    _environ_has: dict[str, str] | None = None
    _environ: dict[str, Any]
    serving: Request
    """The request that is being answered, or was answered last."""
    task: _Answering
    """The task that runs the app, or ran it last."""
    requests: list[Request]
    request: Request | None
    current_outbuf_count: int
    total_outbufs_len: int
    _last_activity: float

    def __init__(self, context: Context, server: Any, sock: Any, addr: Any, adj: Any, *, map: Any) -> None:  # noqa: A002 - waitress' name
        self.context = context
        self.account = context.account
        self.flushed = 0
        self.unsettled = ()
        self._send_bytes, self._bite = int(adj.send_bytes), int(adj.recv_bytes)
        self.grace_from = time.monotonic()
        """When the last answer was given, or the connection was opened (time.monotonic())."""
        self._linger_until, self._unacknowledged = 0.0, 0
        self._half_closed_at = self._heard_at = 0.0
        # Waitress and this class have these on the class; on the connection they are found more quickly.
        self.request, self.total_outbufs_len, self.current_outbuf_count = None, 0, 0
        self.will_close = self.close_when_flushed = self.half_closed = self.stream_over = False
        super().__init__(server, sock, addr, adj, map=map)
        self.outbufs = [AnswerBuffer(adj.outbuf_overflow)]
        self.internal, self.here = self.internal, self.here
        self._high_watermark, self.most_head_bytes = int(adj.outbuf_high_watermark), int(adj.max_request_header_size)
        self.outbuf_lock = OutputLock()

    @property
    def client(self) -> str:
        """The peer's address; ``unix`` for a Unix socket."""
        return "unix" if self.addr[1] is None else str(self.addr[0])

    def client_told_by(self, headers: Mapping[str, str]) -> str:
        """The client's address from a trusted proxy's headers; empty without such a proxy (any thread)."""
        proxies = self.context.proxies
        return proxies.client(self.addr[0], headers) if proxies is not None else ""

    def ids_told_by(self, headers: Mapping[str, str]) -> Ids:
        """The ids that a trusted proxy gave a request in its headers (any thread)."""
        proxies = self.context.proxies
        return proxies.ids(self.addr[0], headers) if proxies is not None else NO_IDS

    @property
    def names_limits(self) -> bool:
        """Whether the log names the setting whose limit a request exceeds."""
        return self.context.names_limits

    @property
    def arriving(self) -> Request | None:
        """The request of which only a part has come."""
        request = self.request  # read once: another thread may replace it
        return request if request is not None and request.begun else None

    def environ_with(self, headers: dict[str, str]) -> dict[str, Any]:
        """An environ for a request with these headers; what belongs to the request line and the body is still None.

        Requests of a client often have the same headers, and share the dictionary: the environ is then a mere copy.
        """
        if self._environ_has is not headers:
            self._environ, self._environ_has = _environ(self, headers), headers
        return self._environ.copy()

    @property
    def serving_was_refused(self) -> bool:
        """Whether the last request was refused or rejected, without the app, and perhaps before all of it had come."""
        serving: Request | None = getattr(self, "serving", None)
        return serving is not None and (bool(serving.error) or serving.rejected)

    def refuse(self, limit: str) -> None:
        """Let the first request be answered with 503 because of a limit; the app has not begun it."""
        request = self.requests[0]
        request.rejected, request.refused_by = True, limit
        self.account.limited(limit)

    # --- an answer, in a pool's thread or the loop's ----------------------------------------------------------------

    def write_soon(self, data: Any) -> int:
        """Write a part of a response: send it now if no other output waits, else buffer it.

        Waits while too much output is buffered. Raises ClientDisconnected if the stream was ended or the client left.
        """
        if self.total_outbufs_len > self._high_watermark:
            self.context.waiting.for_client(self)
        with self.outbuf_lock:  # so that nothing follows the end of a stream
            if self.stream_over or not self.connected:
                raise ClientDisconnected
            if self.total_outbufs_len or type(data) is not bytes or (size := len(data)) < self._send_bytes:
                return self._buffer(data)
            try:
                sent = self.socket.send(data)
            except OSError:  # waitress tries again below, and deals with the error
                sent = 0
            self.flushed += sent
            if sent < size:
                self._last_activity = time.monotonic()
                self._buffer(data[sent:])
        return size

    def _buffer(self, data: Any) -> int:
        """Let waitress buffer a part and send what it can; the caller holds `outbuf_lock`."""
        # Begin an AnswerBuffer where waitress would begin a buffer of its own class, or has done so after a file.
        if self.current_outbuf_count >= self.adj.outbuf_high_watermark or type(self.outbufs[-1]) is not AnswerBuffer:
            self.outbufs.append(AnswerBuffer(self.adj.outbuf_overflow))
            self.current_outbuf_count = 0
        return int(super().write_soon(data))

    def _flush_outbufs_below_high_watermark(self) -> None:
        """Do nothing: waitress would wait for the client here, holding the lock and the thread's place."""

    @property
    def backed_up(self) -> bool:
        """Whether its thread must still wait for the client: until there is room for several parts, not just one."""
        most = self.adj.outbuf_high_watermark
        return bool(self.connected) and self.total_outbufs_len > most - most // _ROOM

    def end_stream(self) -> None:
        """End the stream that is being sent, between two parts (loop's thread); its thread notices when it writes."""
        request, task = self.serving, self.task
        with self.outbuf_lock:
            if self.stream_over or not self.connected or request.answered:
                return
            last = task.last_piece(begun=self.flushed + self.total_outbufs_len > request.starts_at)
            self.outbufs[-1].append(last)
            self.current_outbuf_count += len(last)
            self.total_outbufs_len += len(last)
            self.stream_over = True
            request.whole = request.answered = True
            request.ends_at = self.flushed + self.total_outbufs_len
            self.settle_later(request)
            self.close_when_flushed = True
            self._flush_exception(self._flush_some, do_close=False)
            self._settle()
        if not request.waits:  # a thread that waits for its client has no place to lose
            self.context.pool.lose(request)
        self.context.poller.touch(self)  # its thread, which would do this, may sleep for long

    def settle_later(self, request: Request) -> None:
        """Retire a request when the kernel has taken all of its answer; under `outbuf_lock`."""
        if not isinstance(self.unsettled, deque):
            self.unsettled = deque()
        self.unsettled.append(request)

    def _settle(self) -> None:
        """Retire the requests whose answers the kernel has taken, or whose client left; under `outbuf_lock`."""
        if isinstance(waiting := self.unsettled, deque):
            while waiting and (not self.connected or self.flushed >= waiting[0].ends_at):
                self._retire(waiting.popleft())
        if not self.connected:  # waitress may leave queued requests there; no client waits for them
            for request in list(self.requests):
                self._retire(request)  # its thread may be about to note that the answer is complete

    def _retire(self, request: Request) -> None:
        if request.whole and self.flushed >= request.ends_at:
            self.account.retire(request, "rejected" if request.rejected else "completed")
        elif request.began and (fault := request.fault or self.fault):
            self.account.cut_one(request, fault)
        else:
            self.account.retire(request, "gone")

    # --- to the kernel --------------------------------------------------------------------------------------------

    def send(self, data: bytes, do_close: bool = True) -> int:
        """Send `data` and count the bytes that the kernel took; waitress calls this while output waits.

        Raises EOFError if a file ended too early: then `data` is empty.
        """
        if not data:
            raise EOFError(f"its file ended {self.outbufs[0].__len__()} bytes before the length that was announced")
        try:
            sent: int = super().send(data, do_close=do_close)
        except OSError:  # an error that waitress does not take for a client that left, such as no route to it
            self.will_close = True
            return 0
        self.flushed += sent or 0
        return sent

    def _flush_some(self, do_close: bool = True) -> bool:
        """Flush under the lock. Waitress locks only while a task runs; here another thread may begin one any time."""
        with self.outbuf_lock:
            return bool(super()._flush_some(do_close=do_close))

    def _flush_exception(self, flush: Any, do_close: bool = True) -> tuple[bool, bool] | None:
        """Flush as waitress does; after an error, close the connection at once, and count its request as cut."""
        if not flush:
            return None
        try:
            return flush(do_close=do_close), False
        except Exception as error:  # noqa: BLE001 - the app's own file objects may raise anything
            self.fault = self.fault or str(error) or type(error).__name__
            self.will_close = True
            return False, True

    def give_up(self, request: Request, why: str, sent: int) -> None:
        """Give up waiting for the app to answer a request that hangs (loop's thread).

        If nothing of the answer was written the client gets 504, else the connection is closed. `sent` is how many
        bytes had been written on the connection when the request was found to hang; if it is more by now, nothing is
        done. The request's thread goes on, and notices at its next write.
        """
        if not self.outbuf_lock.acquire(blocking=False):  # the request's thread is about to send
            return
        try:
            out = self.flushed + self.total_outbufs_len
            if self.stream_over or not self.connected or request.answered or out != sent:
                return
            cut, begun = request.cut(why), sent > request.starts_at
            if not begun:
                self.answer_instead(504, "The app did not answer in time.")
            self.stream_over = request.answered = True
            if not self.account.cut_as(request, cut):
                return
        finally:
            self.outbuf_lock.release()
        self.account.limited("request_timeout")
        self.context.pool.replenish()
        if begun:
            self.handle_close()
        else:
            self.close_when_flushed = True
            self.handle_write()  # sends the 504: the poller does not watch a connection that a thread owns
            self.context.poller.touch(self)

    def answer_instead(self, status: int, why: str) -> None:
        """Answer the current request with an error in the place of the app, and close the connection."""
        raise NotImplementedError

    def output_length(self) -> int:
        """All bytes ever written on this connection, sent or not."""
        if not self.total_outbufs_len:  # nothing is being sent, so no other thread changes the counts
            return self.flushed
        with self.outbuf_lock:
            return int(self.flushed + self.total_outbufs_len)

    # --- the end of the connection, in the loop's thread--------------------------------------------------------------

    def half_close(self) -> None:
        """Send no more, and read on until the client closes its side or its time is over (`linger`)."""
        if self.half_closed:
            return
        self.half_closed = True
        self._bite = _DISCARD
        self.will_close = self.close_when_flushed = False
        try:
            self.socket.shutdown(socket.SHUT_WR)
        except OSError:  # the client has left already
            self.handle_close()
            return
        with self.outbuf_lock:
            self._settle()
        now = time.monotonic()
        self._half_closed_at = now
        self._linger_until, self._unacknowledged = now + _LINGER_MOST, unacknowledged(self.socket)
        self.context.timers.at(now + _LINGER, self.look)

    def linger(self, now: float) -> None:
        """Close a half-closed connection, unless its client still acknowledges output or sends a body.

        After the close the kernel would go on sending, but not in a container, whose network ends with the process. And
        a client that still sends a body would be reset, and might never read the answer that refuses it.
        """
        left = unacknowledged(self.socket)
        if left < self._unacknowledged:
            self._linger_until = now + _LINGER_MOST
        self._unacknowledged = left
        sending = now - self._heard_at < _LINGER_MOST and now - self._half_closed_at < _LINGER_SENDING
        if (left and now < self._linger_until) or (sending and not self.context.drains):
            self.context.timers.at(now + _LINGER_LOOK, self.look)
        else:
            self.handle_close()

    def look(self, now: float) -> None:
        """Close the connection if its time is over; called at a moment that it gave to the loop's timers."""
        raise NotImplementedError


def _environ(channel: OutputChannel, headers: dict[str, str]) -> dict[str, Any]:
    server, (host, port, *_) = channel.server, channel.addr
    return {
        **server.environ,
        "SERVER_NAME": server.server_name,
        "REMOTE_ADDR": host,
        "REMOTE_HOST": host,
        "REMOTE_PORT": str(port),
        "SERVER_PROTOCOL": "HTTP/1.1",
        "waitress.client_disconnected": channel.check_client_disconnected,
        **dict.fromkeys(("REQUEST_METHOD", "PATH_INFO", "REQUEST_URI", "QUERY_STRING", "wsgi.errors", "wsgi.input")),
        **headers,
    }
