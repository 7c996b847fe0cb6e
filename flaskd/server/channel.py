"""A connection and its requests, on waitress' own channel and parser.

Everything here overrides a method of waitress 3; each of those internals has a contract test in
``tests/test_server_contract.py``, so that a new waitress fails a test and not a user.
"""

from __future__ import annotations

import functools
import logging
import socket
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from waitress.channel import HTTPChannel

from flaskd.config.fields import write_size
from flaskd.ledger import Cut, InFlight, visible
from flaskd.log.setup import bounded_by
from flaskd.server.buffers import FREE_SPACE, AnswerBuffer
from flaskd.server.parser import Parser
from flaskd.server.tasks import AppTask, ClientDisconnected, HealthTask, RefusalTask, RejectTask
from flaskd.sockets import closed_by_peer, unacknowledged, unread
from flaskd.stacks import stack_of

if TYPE_CHECKING:
    from flaskd.server.loop import EventLoop

log = logging.getLogger("flaskd.server")

_DISCARD = 1 << 16
"""Bytes thrown away at once."""
_BODY = 1 << 16
"""Bytes of a body read at once; waitress' 8 KiB are a turn of the loop for each. A head is read in its small bites,
because what lies behind it may be hundreds of requests more."""
_QUICK = 0.001
"""Seconds between an answer and the next request, by which a worker knows a client that asks again at once."""
_LINGER = 0.2
"""Seconds in which a half-closed client may close its side, before the connection is closed under it."""
_LINGER_LOOK = 0.05
"""Seconds between two looks at what the client has not acknowledged yet."""
_LINGER_MOST = 2.0
"""Seconds without a sign of life from a client that has not acknowledged all output, until it is not waited for."""
_LINGER_SENDING = 30.0
"""Seconds in which a half-closed client may go on sending, unless a drain waits for it: a body that was refused."""


class Request(Parser):
    """One request, from its first byte until its answer has been handed to the kernel."""

    error: Any
    expect_continue: bool
    # Where all requests begin; on the class, because a request is made for every answer.
    id = 0
    first_byte = wall_clock = complete = began = 0.0
    """When its first and its last byte came, and when its answer was begun; 0 before."""
    thread: threading.Thread | None = None
    following: Request | None = None
    """What the worker that answered it has read next, and is to answer."""
    answered = over = rejected = whole = False
    status = ""
    fault = ""
    """Why its client sees that the answer is not whole, though it did not leave."""
    header_length = starts_at = ends_at = 0
    _client: str | None = None

    def __init__(self, channel: Channel, adj: Any) -> None:
        super().__init__(adj)
        self.channel = channel

    def received(self, data: bytes) -> int:
        """Parse on; a request that is complete is from then on in flight."""
        if not self.begun:
            self.first_byte, self.wall_clock = time.monotonic(), time.time()
        try:
            consumed = super().received(data)
        except OSError as error:  # of the body's temporary file
            consumed = len(data)
            log.error(f"cannot keep the body of {self.snapshot()}: {error}; answered with 507: {FREE_SPACE}")  # noqa: TRY400
            self.refuse(507, "there is no room for the body of the request")
        if self.exceeded and self.channel.loop.names_limits:
            self._name_limit()
        if self.headers_finished and self.expect_continue and not self.completed and self.channel.too_late:
            # Refused before the client sends the body for nothing (RFC 9110 §10.1.1).
            self.rejected = self.completed = True
            self.headers["CONNECTION"] = "close"  # the body may follow all the same
        if self.completed:
            # Nothing more is expected, so the client must not be told to continue: waitress would wait for ever for
            # the body of a request that has none, or ask for one that it already refused.
            self.expect_continue = False
            if not self.id and not self.channel.internal:
                self.channel.loop.accepted(self)
        return consumed

    def _name_limit(self) -> None:
        """Say which setting it goes beyond."""
        what = f"{self.command} {visible(self.target.partition('?')[0])}" if self.command else "a request line"
        setting = f"server.{self.exceeded} ({write_size(getattr(self.adj, self.exceeded))})"
        log.warning(
            f"refused {what} of {self.client} with {self.error.code}: more than {setting} allows",
            extra=bounded_by("requests that are larger than a limit"),
        )

    def close(self) -> None:
        """Free the body. A request that never ran waited behind one that ended the connection: it is over, too."""
        super().close()
        if self.thread is None:
            self.channel.loop.retire(self, "gone")

    @property
    def age(self) -> float:
        """Seconds since the first byte."""
        return time.monotonic() - self.first_byte

    @property
    def client(self) -> str:
        """The address of who sent it: the peer's, or what a trusted proxy says."""
        if self._client is None and self.headers_finished:
            channel = self.channel
            self._client = channel.loop.client_of(channel.addr[0], self.headers) or channel.client
        return self._client or self.channel.client

    @property
    def sent(self) -> int:
        """Bytes of its answer that the kernel has taken, header and all."""
        flushed = self.channel.flushed
        return max(0, (min(flushed, self.ends_at) if self.answered else flushed) - self.starts_at) if self.began else 0

    @property
    def phase(self) -> str:
        """``receiving``, ``queued``, ``running`` or ``sending``."""
        if self.answered:
            return "sending"
        if self.thread is not None:
            return "running"
        return "queued" if self.completed else "receiving"

    @property
    def target(self) -> str:
        """The request target as the client wrote it; empty while it is not known."""
        return self.request_uri

    def snapshot(self, *, stack: bool = False, gone: bool | None = None) -> InFlight:
        """What can be shown of it, from any thread; with the stack of the thread that runs it when asked for.

        `gone` is for who has looked already whether its client has.
        """
        thread = None if self.answered else self.thread
        return InFlight(
            id=self.id,
            client=self.client,
            method=self.command or "?",  # a token: all else is refused
            path=visible(self.target.partition("?")[0]),
            age=self.age,
            phase=self.phase,
            thread=thread.name if thread else "",
            stack=stack_of(thread) if stack and thread else "",
            gone=closed_by_peer(self.channel.socket) if gone is None else gone,
            sent=self.sent,
        )

    def cut(self, reason: str) -> Cut:
        """The ledger's entry for breaking it off now."""
        gone = None if self.channel.connected else False
        return Cut(**vars(self.snapshot(stack=True, gone=gone)), reason=reason)

    def access_fields(self) -> dict[str, Any]:
        """What the access log tells about it."""
        return {
            "id": self.id,
            "client": self.client,
            "time": self.wall_clock,
            "method": self.command or "-",
            "target": self.target or "-",
            "protocol": f"HTTP/{self.version}",
            "status": int(self.status[:3]) if self.status[:3].isdecimal() else 0,
            "bytes": max(0, self.sent - self.header_length),
            "referer": self.headers.get("REFERER", ""),
            "agent": self.headers.get("USER_AGENT", ""),
            "took": round(self.age, 6),
        }


class _ChannelServer:
    """What a channel knows as its server: the acceptor, but it wakes the loop for this one channel."""

    def __init__(self, channel: Channel, acceptor: Any, sock: Any) -> None:
        self._channel = channel
        self._acceptor = acceptor
        self.adj = acceptor.adj
        self.active_channels = channel.loop.probes if channel.internal else acceptor.active_channels
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
            channel.loop.poller.touch(channel)
        # Else waitress is done with the request, and the channel's own service() touches when it is done, too: the loop
        # may take up the next request at once, and the two threads would only fight for the GIL.

    def add_task(self, channel: Channel) -> None:
        # The channel's requests_lock is held in this moment.
        read_after, channel.reads_after = channel.reads_after, None
        if channel.answered_here:
            channel.keeper = None
            channel.loop.answer_soon(channel)
            return
        channel.keeper = channel.requests[0]
        if read_after is not None:
            read_after.following = channel.requests[0]
        else:
            self._acceptor.task_dispatcher.add_task(channel)


class Channel(HTTPChannel):  # type: ignore[misc]
    """A connection; `here`: all is answered by the loop."""

    one_shot = True
    error_task_class = RefusalTask
    internal = False
    """Whether it is a probe's, which appears in no count and no log."""
    here = False
    half_closed = False
    fault = ""
    """Why what was put out cannot be sent, though the client is there."""
    stream_over = False
    keeper: Request | None = None
    """The request for which a worker has the connection, or will have it; meanwhile the loop does not read from it.

    Changed under `requests_lock`, and so is what the poller waits for: the connection is the loop's or a worker's."""
    reads_after: Request | None = None
    """The request that a worker has answered, while it reads the next one from the connection."""
    task: AppTask
    """What the app answers with, or last answered with."""
    requests: list[Request]
    request: Request | None
    current_outbuf_count: int
    total_outbufs_len: int

    def __init__(self, acceptor: Any, sock: Any, addr: Any, adj: Any, map: Any = None) -> None:  # noqa: A002 - waitress' name
        self.loop: EventLoop = acceptor.loop
        self.parser_class = functools.partial(Request, self)
        self.task_class = self._task_for
        self.flushed = 0
        self.unsettled: deque[Request] = deque()
        self.serving: Request
        self.grace_from = time.monotonic()
        self._linger_until, self._unacknowledged = 0.0, 0
        self._half_closed_at = self._heard_at = 0.0
        self._flushing = False
        self._last_activity = self.grace_from
        self._holds = False
        self._held = b""
        self._watch: Any = None
        super().__init__(_ChannelServer(self, acceptor, sock), sock, addr, adj, map=map)
        self.outbufs = [AnswerBuffer(adj.outbuf_overflow)]
        if not self.internal:
            self.loop.connections_accepted += 1
        if self.loop.drains:
            self.loop.at(self.grace_from + self.loop.keepalive_grace, self)

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
            return False  # a worker that holds the lock is about to send
        try:
            return not self.requests or self.total_outbufs_len > 0
        finally:
            self.outbuf_lock.release()

    @property
    def idle(self) -> bool:
        """Whether nothing is in hand: no request, no part of one, no output."""
        return not (self.keeper or self.requests or self.arriving or self.total_outbufs_len or self.unsettled)

    @property
    def arriving(self) -> Request | None:
        """The request that has come in part."""
        request = self.request  # a worker may be done with it in this moment
        return request if request is not None and request.begun else None

    @property
    def grace_left(self) -> float:
        """Seconds in which the client of a drained connection may still send a request, since its last answer."""
        return self.grace_from + self.loop.keepalive_grace - time.monotonic()

    @property
    def too_late(self) -> bool:
        """Whether a request that wants to be told to continue comes after the connection's grace."""
        return self.loop.draining.is_set() and self.grace_left <= 0

    # --- one request ---------------------------------------------------------------------------------------------

    @property
    def answered_here(self) -> bool:
        """Whether the next request is answered by the loop itself, without a worker."""
        request = self.requests[0]
        if request.error or request.rejected or self.loop.refusing or self.loop.alone:
            return True
        return self._asks_for_health(request)

    def _asks_for_health(self, request: Request) -> bool:
        if self.here:
            return True
        path = self.loop.health_path
        return bool(path) and not request.error and request.path == path and request.command in {"GET", "HEAD"}

    def _task_for(self, channel: Channel, request: Request) -> Any:
        if request.rejected or self.loop.refusing:
            request.rejected = True
            return RejectTask(channel, request)
        if self._asks_for_health(request):
            return HealthTask(channel, request)
        self.task = AppTask(channel, request)
        return self.task

    def service(self) -> None:
        """Answer the first request in line, and go on with a client that asks again at once (worker thread).

        Its next request needs no way through the loop, which costs two switches between threads.
        """
        request = self.requests[0]
        quick = request.first_byte - self.grace_from < _QUICK
        while True:
            self._answer(request)
            if self.keeper is not request:  # the next one was in line, and somebody else has the connection
                self.loop.poller.touch(self)
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
        """Read what a quick client sends next; `answered.following` is set if that is for this worker to answer."""
        sock = self.socket  # None once the loop has closed it
        if self.loop.drains or self.loop.workers.wanted or sock is None or not super().readable():
            return
        if self._watch is None:
            try:
                self._watch = self.loop.poller.watch(sock)
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
        if self.reads_after is answered:  # else somebody else may have the connection by now
            self.reads_after = None

    def _give_back(self) -> None:
        """Leave the connection to the loop (who has it)."""
        with self.requests_lock:
            self.keeper = None
            if not (self.writable() or self.loop.drains):
                if (sock := self.socket) is not None and self.readable():
                    self.loop.poller.expect(sock)  # without a word to the loop
                return
        self.loop.poller.touch(self)

    def serve_here(self) -> None:
        """Answer the first request in line without a worker (loop's thread)."""
        if self.requests and self.connected:
            request = self.keeper = self.requests[0]
            self._answer(request)
            if self.keeper is request:
                self._give_back()
            else:
                self.loop.poller.touch(self)

    def _answer(self, request: Request) -> None:
        request.thread = threading.current_thread()
        request.began = time.monotonic()
        request.starts_at = request.ends_at = self.output_length()
        self.serving = request
        try:
            super().service()
        except BaseException:  # never lets a worker or a connection go missing, whatever kills the task
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
        self.loop.answered(request)

    def write_soon(self, data: Any) -> int:
        """Put out a part of a response; a stream that was ended takes no more."""
        if self._holds:
            self._holds, self._held = False, data
            return len(data)
        if self._held:
            data, self._held = self._held + data, b""
        with self.outbuf_lock:  # so that it comes before the end of a stream, or not at all
            if self.stream_over:
                raise ClientDisconnected
            # Where waitress would begin a buffer of its own kind, or has (behind a file), one of ours is begun instead.
            if (
                self.current_outbuf_count >= self.adj.outbuf_high_watermark
                or type(self.outbufs[-1]) is not AnswerBuffer
            ):
                self.outbufs.append(AnswerBuffer(self.adj.outbuf_overflow))
                self.current_outbuf_count = 0
            return int(super().write_soon(data))

    def hold_next(self) -> None:
        """Keep what is put out next, a header, until more follows or `release` (worker thread)."""
        self._holds = True

    def release(self) -> None:
        """Put out what is still held (worker thread)."""
        held, self._holds, self._held = self._held, False, b""
        if held:
            self.write_soon(held)

    def end_stream(self) -> None:
        """End the stream being sent, between two parts (loop's thread); its worker learns at its next write."""
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
        self.loop.lost_thread(request)
        self.loop.poller.touch(self)  # its worker, who would do that, may sleep on

    def _settle(self) -> None:
        """Retire the requests whose answers the kernel has taken, or nobody waits for; `outbuf_lock` is held."""
        while self.unsettled and (not self.connected or self.flushed >= self.unsettled[0].ends_at):
            self._retire(self.unsettled.popleft())
        if not self.connected:  # waitress may leave what is queued lying there, and who is gone is not waited for
            for request in list(self.requests):
                self._retire(request)  # its worker may be about to say that the answer is whole

    def _retire(self, request: Request) -> None:
        if request.whole and self.flushed >= request.ends_at:
            self.loop.retire(request, "rejected" if request.rejected else "completed")
        elif request.began and (fault := request.fault or self.fault):
            self.loop.cut_one(request, fault)
        else:
            self.loop.retire(request, "gone")

    # --- input and output, in the loop's thread --------------------------------------------------------------------

    def readable(self) -> bool:
        """Waitress' rule, unless a worker has the connection; a half-closed one is read to its end."""
        return self.half_closed or (self.keeper is None and bool(super().readable()))

    def writable(self) -> bool:
        """Waitress' rule; nothing is sent after the half-close."""
        return not self.half_closed and bool(super().writable())

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
        """Waitress locks only while a worker runs; here one may begin, having read the next request, in any moment."""
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

    def output_length(self) -> int:
        """All bytes ever put out on this connection, sent or not."""
        if not self.total_outbufs_len:  # nothing is being sent, so nobody else counts at this moment
            return self.flushed
        with self.outbuf_lock:
            return int(self.flushed + self.total_outbufs_len)

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
        if (sock := self.socket) is None:  # closed by the loop, while a worker was about to read
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

        A worker that is just reading it, and so has the lock, does this when it has done so.
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
        return self.loop.closing or self.serving_was_refused or unread(self.socket) > 0

    @property
    def serving_was_refused(self) -> bool:
        """Whether the last request was answered without being read to its end, or the app."""
        serving: Request | None = getattr(self, "serving", None)
        return serving is not None and (bool(serving.error) or serving.rejected)

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
        self.loop.at(now + _LINGER, self)

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
        if (left and now < self._linger_until) or (sending and not self.loop.drains):
            self.loop.at(now + _LINGER_LOOK, self)
        else:
            self.handle_close()


class Probe(Channel):
    """A connection of one's own, which came through no listener."""

    internal = True
