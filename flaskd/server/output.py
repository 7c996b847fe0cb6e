"""What goes out on a connection: counted, settled once the kernel has it, and ended in order."""

from __future__ import annotations

import functools
import socket
import threading
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
from flaskd.server.slow import Progress
from flaskd.sockets import unacknowledged

_ROOM = 16
"""Which part of all output that may wait has to be free before a thread that waits for its client goes on."""
_LINGER = 0.2
"""Seconds in which a half-closed client may close its side, before the connection is closed under it."""
_LINGER_LOOK = 0.05
"""Seconds between two looks at what the client has not acknowledged yet."""
_LINGER_MOST = 2.0
"""Seconds without a sign of life from a client that has not acknowledged all output, until it is not waited for."""
_LINGER_SENDING = 30.0
"""Seconds in which a half-closed client may go on sending, unless a drain waits for it: a body that was refused."""


class _Answering(Protocol):
    """What the channel asks of the task that answers with the app."""

    def run(self, environ: dict[str, Any], start_response: Any) -> Any:
        """Call the app (PEP 3333)."""

    def last_piece(self, *, begun: bool) -> bytes:
        """What ends a stream, of which something is out already or not."""


class OutputChannel(HTTPChannel):  # type: ignore[misc]  # waitress is untyped
    """A connection, as far as tasks know it: its requests, and the way out for their answers."""

    internal = False
    """Whether it is a probe's, which appears in no count and no log."""
    half_closed = False
    fault = ""
    """Why what was put out cannot be sent, though the client is there."""
    stream_over = False
    progress: Progress | None = None
    """Of its client, while that is waited for."""
    fields: Fields | None = None
    serving: Request
    """The request that is answered, or was answered last."""
    task: _Answering
    """What the app answers with, or last answered with."""
    requests: list[Request]
    request: Request | None
    current_outbuf_count: int
    total_outbufs_len: int
    _last_activity: float

    def __init__(self, context: Context, server: Any, sock: Any, addr: Any, adj: Any, *, map: Any) -> None:  # noqa: A002 - waitress' name
        self.context = context
        self.account = context.account
        self.flushed = 0
        self.unsettled: deque[Request] = deque()
        """The requests that are answered, but not with the last byte in the kernel."""
        self.grace_from = time.monotonic()
        """When the last answer was given, or the connection opened."""
        self._linger_until, self._unacknowledged = 0.0, 0
        self._half_closed_at = self._heard_at = 0.0
        super().__init__(server, sock, addr, adj, map=map)
        self.outbufs = [AnswerBuffer(adj.outbuf_overflow)]
        self._sending = threading.RLock()
        self.outbuf_lock = threading.Condition(self._sending)

    @property
    def client(self) -> str:
        """The peer's address; ``unix`` for a Unix socket."""
        return "unix" if self.addr[1] is None else str(self.addr[0])

    def client_told_by(self, headers: Mapping[str, str]) -> str:
        """The client's address as a trusted proxy tells it in a request's headers; empty without one (any thread)."""
        proxies = self.context.proxies
        return proxies.client(self.addr[0], headers) if proxies is not None else ""

    def ids_told_by(self, headers: Mapping[str, str]) -> Ids:
        """What a trusted proxy calls a request, in its headers (any thread)."""
        proxies = self.context.proxies
        return proxies.ids(self.addr[0], headers) if proxies is not None else NO_IDS

    @property
    def names_limits(self) -> bool:
        """Whether the log names the setting that a request goes beyond."""
        return self.context.names_limits

    @property
    def arriving(self) -> Request | None:
        """The request that has come in part."""
        request = self.request  # a thread may be done with it in this moment
        return request if request is not None and request.begun else None

    @functools.cached_property
    def environ(self) -> dict[str, Any]:
        """What is the same in the environ of each of its requests, made for the first of them.

        What is not the same is in it, too: a copy would have to grow for it.
        """
        server, (host, port, *_) = self.server, self.addr
        return {
            **server.environ,
            "SERVER_NAME": server.server_name,
            "REMOTE_ADDR": host,
            "REMOTE_HOST": host,
            "REMOTE_PORT": str(port),
            "SERVER_PROTOCOL": "HTTP/1.1",
            "waitress.client_disconnected": self.check_client_disconnected,
            **dict.fromkeys(
                ("REQUEST_METHOD", "PATH_INFO", "REQUEST_URI", "QUERY_STRING", "wsgi.errors", "wsgi.input")
            ),
        }

    @property
    def kind(self) -> str:
        """Which requests often take as long."""
        return self.requests[0].kind

    @property
    def waits_since(self) -> float:
        """Since when its first request waits for a thread; a probe waits as long as it takes."""
        if self.internal or not self.requests:
            return float("inf")
        return self.requests[0].its_turn or self.requests[0].complete

    @property
    def serving_was_refused(self) -> bool:
        """Whether the last request was answered without being read to its end, or the app."""
        serving: Request | None = getattr(self, "serving", None)
        return serving is not None and (bool(serving.error) or serving.rejected)

    def refuse(self, limit: str) -> None:
        """Let the first request in line be answered with 503, unbegun, for a limit."""
        request = self.requests[0]
        request.rejected, request.refused_by = True, limit
        self.account.limited(limit)

    # --- an answer, in a pool's thread or the loop's ----------------------------------------------------------------

    def write_soon(self, data: Any) -> int:
        """Put out a part of a response, at once where nothing waits; a stream that was ended takes no more."""
        if self.total_outbufs_len > self.adj.outbuf_high_watermark:
            self.context.waiting.for_client(self)
        with self._sending:  # so that it comes before the end of a stream, or not at all
            if self.stream_over or not self.connected:
                raise ClientDisconnected
            if self.total_outbufs_len or type(data) is not bytes or len(data) < self.adj.send_bytes:
                return self._buffer(data)
            try:
                sent = self.socket.send(data)
            except OSError:  # waitress' way finds out why
                sent = 0
            self.flushed += sent
            if sent < len(data):
                self._last_activity = time.monotonic()
                self._buffer(data[sent:])
            return len(data)

    def _buffer(self, data: Any) -> int:
        """Let waitress keep a part, and send what can be sent; `outbuf_lock` is held."""
        # Where waitress would begin a buffer of its own kind, or has (behind a file), one of ours is begun instead.
        if self.current_outbuf_count >= self.adj.outbuf_high_watermark or type(self.outbufs[-1]) is not AnswerBuffer:
            self.outbufs.append(AnswerBuffer(self.adj.outbuf_overflow))
            self.current_outbuf_count = 0
        return int(super().write_soon(data))

    def _flush_outbufs_below_high_watermark(self) -> None:
        """Nothing: waitress waits for the client here, in a place and with the lock."""

    @property
    def backed_up(self) -> bool:
        """Whether its thread is still to wait: until there is room for some more, lest it waits at every part."""
        most = self.adj.outbuf_high_watermark
        return bool(self.connected) and self.total_outbufs_len > most - most // _ROOM

    def end_stream(self) -> None:
        """End the stream being sent, between two parts (loop's thread); its thread learns at its next write."""
        request = self.serving
        with self.outbuf_lock:
            if self.stream_over or not self.connected or request.answered:
                return
            last = self.task.last_piece(begun=self.flushed + self.total_outbufs_len > request.starts_at)
            self.outbufs[-1].append(last)
            self.current_outbuf_count += len(last)
            self.total_outbufs_len += len(last)
            self.stream_over = True
            request.whole = request.answered = True
            request.ends_at = self.flushed + self.total_outbufs_len
            self.unsettled.append(request)
            self.close_when_flushed = True
            self._flush_exception(self._flush_some, do_close=False)
            self._settle()
        if not request.waits:  # else its thread has no place
            self.context.pool.lose(request)
        self.context.poller.touch(self)  # its thread, which would do that, may sleep on

    def _settle(self) -> None:
        """Retire the requests whose answers the kernel has taken, or nobody waits for; `outbuf_lock` is held."""
        while self.unsettled and (not self.connected or self.flushed >= self.unsettled[0].ends_at):
            self._retire(self.unsettled.popleft())
        if not self.connected:  # waitress may leave what is queued lying there, and who is gone is not waited for
            for request in list(self.requests):
                self._retire(request)  # its thread may be about to say that the answer is whole

    def _retire(self, request: Request) -> None:
        if request.whole and self.flushed >= request.ends_at:
            self.account.retire(request, "rejected" if request.rejected else "completed")
        elif request.began and (fault := request.fault or self.fault):
            self.account.cut_one(request, fault)
        else:
            self.account.retire(request, "gone")

    # --- to the kernel --------------------------------------------------------------------------------------------

    def send(self, data: bytes, do_close: bool = True) -> int:
        """Send, and count what the kernel took; waitress calls it while there should be something to send."""
        if not data:
            raise EOFError(f"its file ended {self.outbufs[0].__len__()} bytes before the length that was announced")
        try:
            sent: int = super().send(data, do_close=do_close)
        except OSError:  # what waitress does not know as a client that left: no way leads to it any more
            self.will_close = True
            return 0
        self.flushed += sent or 0
        return sent

    def _flush_some(self, do_close: bool = True) -> bool:
        """Waitress locks only while a task runs; here one may begin, having read the next request, in any moment."""
        with self.outbuf_lock:
            return bool(super()._flush_some(do_close=do_close))

    def _flush_exception(self, flush: Any, do_close: bool = True) -> tuple[bool, bool] | None:
        """Flush as waitress does; but what cannot be read or sent any more ends the connection at once, and is cut."""
        if not flush:
            return None
        try:
            return flush(do_close=do_close), False
        except Exception as error:  # noqa: BLE001 - files are the app's own, and may raise anything
            self.fault = self.fault or str(error) or type(error).__name__
            self.will_close = True
            return False, True

    def give_up(self, request: Request, why: str, sent: int) -> None:
        """Wait no more for the app to answer a request, of which nothing has moved (loop's thread).

        Where nothing is out of its answer the client gets 504, else the connection is closed. `sent` is what was out
        on the connection; if it is more by now, nothing is done. The thread goes on, and learns at its next write.
        """
        if not self.outbuf_lock.acquire(blocking=False):  # its thread is about to send
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
            self.handle_write()  # the poller leaves a connection alone whose thread has nothing to send
            self.context.poller.touch(self)

    def answer_instead(self, status: int, why: str) -> None:
        """Answer the request that is being served in the place of the app, and close the connection."""
        raise NotImplementedError

    def output_length(self) -> int:
        """All bytes ever put out on this connection, sent or not."""
        if not self.total_outbufs_len:  # nothing is being sent, so nobody else counts at this moment
            return self.flushed
        with self.outbuf_lock:
            return int(self.flushed + self.total_outbufs_len)

    # --- the end of our side, in the loop's thread --------------------------------------------------------------------

    def half_close(self) -> None:
        """Send the end of our side, and read on until the client sends its own; bounded by the loop's clock."""
        if self.half_closed:
            return
        self.half_closed = True
        self.will_close = self.close_when_flushed = False
        try:
            self.socket.shutdown(socket.SHUT_WR)
        except OSError:  # it is gone already
            self.handle_close()
            return
        with self.outbuf_lock:
            self._settle()
        now = time.monotonic()
        self._half_closed_at = now
        self._linger_until, self._unacknowledged = now + _LINGER_MOST, unacknowledged(self.socket)
        self.context.timers.at(now + _LINGER, self.look)

    def linger(self, now: float) -> None:
        """Close a half-closed connection whose client had its time, unless it still acknowledges our output.

        The kernel would go on sending, but not where the network goes away with the process, as in a container. And a
        client that still sends a body would be reset, and might never read the answer that it is not wanted.
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
        """Do what is due at a moment that the connection asked for."""
        raise NotImplementedError
