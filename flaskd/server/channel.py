"""A connection and its requests, on waitress' own channel, parser and tasks.

Everything here overrides a method of waitress 3; each of those internals has a contract test in
``tests/test_server_contract.py``, so that a new waitress fails a test and not a user.
"""

from __future__ import annotations

import functools
import logging
import sys
import threading
import time
import traceback
from collections import deque
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser
from waitress.task import ErrorTask, WSGITask
from waitress.utilities import BadRequest

from flaskd.ledger import Cut, InFlight

if TYPE_CHECKING:
    from flaskd.server.loop import EventLoop

log = logging.getLogger("flaskd.server")

_VISIBLE = bytes(range(0x21, 0x7F))
"""ASCII that is shown as it is; a client may put anything else into its request's path, escape sequences included."""


class AppExitedError(RuntimeError):
    """The app raised SystemExit, KeyboardInterrupt or the like; waitress would lose the connection for ever."""


class Request(HTTPRequestParser):  # type: ignore[misc]  # waitress is untyped
    """One request, from its first byte until its answer has been handed to the kernel."""

    error: Any

    def __init__(self, channel: Channel, adj: Any) -> None:
        super().__init__(adj)
        self.channel = channel
        self.id = 0
        self.first_byte = time.monotonic()
        self.wall_clock = time.time()
        self.thread: threading.Thread | None = None
        self.answered = False
        self.status = ""
        self.whole = False
        self.header_length = 0
        self.starts_at = 0
        self.ends_at = 0

    def received(self, data: bytes) -> int:
        """Parse on; a request that is complete is from then on in flight."""
        consumed: int = super().received(data)
        understood = self.headers_finished and not (self.error or self.empty)
        if understood and self.version == "1.1" and "HOST" not in self.headers:  # RFC 9112 §3.2
            self.error = BadRequest("HTTP/1.1 requests need a Host header")
            self.completed = True
        if self.completed:
            # Nothing more is expected, so the client must not be told to continue: waitress would wait for ever for
            # the body of a request that has none, or ask for one that it already refused.
            self.expect_continue = False
            if not self.id and not self.empty and not self.channel.internal:
                self.channel.loop.accepted(self)
        return consumed

    def close(self) -> None:
        """Free the body. A request that never ran waited behind one that ended the connection: it is over, too."""
        super().close()
        if self.thread is None:
            self.channel.loop.retire(self, "gone")

    @property
    def begun(self) -> bool:
        """Whether more of it has come than the blank lines that may stand before a request (RFC 9112 §2.2)."""
        return self.headers_finished or bool(self.header_plus.strip())

    @property
    def age(self) -> float:
        """Seconds since the first byte."""
        return time.monotonic() - self.first_byte

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
        return str(getattr(self, "request_uri", "") or getattr(self, "path", ""))

    def snapshot(self, *, stack: bool = False) -> InFlight:
        """What can be shown of it, from any thread; with the stack of the thread that runs it when asked for."""
        thread = None if self.answered else self.thread
        return InFlight(
            id=self.id,
            client=self.channel.client,
            method=str(getattr(self, "command", "") or "?"),
            path=quote(self.target.partition("?")[0].encode("latin-1"), safe=_VISIBLE) or "?",
            age=self.age,
            phase=self.phase,
            thread=thread.name if thread else "",
            stack=stack_of(thread) if stack and thread else "",
        )

    def cut(self, reason: str) -> Cut:
        """The ledger's entry for breaking it off now."""
        return Cut(**vars(self.snapshot(stack=True)), reason=reason)

    def access_fields(self) -> dict[str, Any]:
        """What the access log tells about it."""
        return {
            "client": self.channel.client,
            "time": self.wall_clock,
            "method": str(getattr(self, "command", "") or "-"),
            "target": self.target or "-",
            "protocol": f"HTTP/{self.version}",
            "status": int(self.status[:3]) if self.status[:3].isdecimal() else 0,
            "bytes": max(0, self.ends_at - self.starts_at - self.header_length),
            "referer": self.headers.get("REFERER", ""),
            "agent": self.headers.get("USER_AGENT", ""),
            "took": round(self.age, 6),
        }


class _Recorded:
    """What both kinds of task have in common: they close the connection while draining, and record the answer."""

    channel: Channel
    request: Request
    status: str

    def build_response_header(self) -> bytes:
        channel = self.channel
        if channel.loop.draining.is_set() and len(channel.requests) <= 1 and channel.arriving is None:
            # As if the client had asked for it: set_close_on_finish() would not keep an HTTP/1.0 client's keep-alive
            # from being confirmed in the same breath.
            self.request.headers["CONNECTION"] = "close"
        header: bytes = super().build_response_header()  # type: ignore[misc]
        channel.serving.status = self.status
        channel.serving.header_length = len(header)
        return header

    def service(self) -> None:
        serving = self.channel.serving
        try:
            super().service()  # type: ignore[misc]
        finally:
            serving.ends_at = self.channel.output_length()
        serving.whole = self.channel.connected  # asked last: a close empties the buffers that were just measured


class Task(_Recorded, WSGITask):  # type: ignore[misc]
    """Runs the app for one request."""

    def execute(self) -> None:
        """Run the app; whatever it raises becomes an Exception, because waitress loses the channel on anything else."""
        try:
            super().execute()
        except Exception:
            raise
        except BaseException as error:
            raise AppExitedError(f"the app raised {type(error).__name__} while answering") from error

    def get_environment(self) -> dict[str, Any]:
        """Waitress' environ, and the event by which a stream learns that a drain began."""
        environ: dict[str, Any] = super().get_environment()
        environ["flaskd.draining"] = self.channel.loop.draining
        return environ


class RefusalTask(_Recorded, ErrorTask):  # type: ignore[misc]
    """Answers a request that could not be parsed, or whose app failed."""


class Channel(HTTPChannel):  # type: ignore[misc]
    """A connection. `internal` ones (probes) appear in no count and no log."""

    task_class = Task
    error_task_class = RefusalTask
    internal = False
    requests: list[Request]

    def __init__(self, server: Any, sock: Any, addr: Any, adj: Any, map: Any = None) -> None:  # noqa: A002 - waitress' name
        self.loop: EventLoop = server.loop
        self.parser_class = functools.partial(Request, self)
        self.flushed = 0
        self.unsettled: deque[Request] = deque()
        self.serving: Request
        super().__init__(server, sock, addr, adj, map=map)
        self.loop.connections_accepted += 1

    @property
    def client(self) -> str:
        """The peer's address; ``unix`` for a Unix socket."""
        return "unix" if self.addr[1] is None else str(self.addr[0])

    @property
    def idle(self) -> bool:
        """Whether nothing is in hand: no request, no part of one, no output."""
        return not (self.requests or self.arriving or self.total_outbufs_len or self.unsettled)

    @property
    def arriving(self) -> Request | None:
        """The request that has come in part."""
        request: Request | None = self.request
        return request if request is not None and request.begun else None

    def send(self, data: bytes, do_close: bool = True) -> int:
        """Send, and count what the kernel took."""
        sent: int = super().send(data, do_close=do_close)
        self.flushed += sent or 0
        return sent

    def output_length(self) -> int:
        """All bytes ever put out on this connection, sent or not."""
        with self.outbuf_lock:
            return int(self.flushed + self.total_outbufs_len)

    def service(self) -> None:
        """Answer the first request in line, in a worker thread."""
        request: Request = self.requests[0]
        request.thread = threading.current_thread()
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
        request.answered = True
        with self.outbuf_lock:
            self.unsettled.append(request)
            self._settle()
        self.loop.answered(request)

    def _settle(self) -> None:
        """Retire the requests whose answers the kernel has taken, or nobody waits for; `outbuf_lock` is held."""
        while self.unsettled and (not self.connected or self.flushed >= self.unsettled[0].ends_at):
            request = self.unsettled.popleft()
            self.loop.retire(request, "completed" if request.whole and self.flushed >= request.ends_at else "gone")
        if not self.connected:  # waitress may leave what is queued lying there
            for request in list(self.requests):
                if request.thread is None:
                    self.loop.retire(request, "gone")

    def handle_write(self) -> None:
        """Flush, in the loop's thread, and retire what is done."""
        super().handle_write()
        if self.unsettled:
            with self.outbuf_lock:
                self._settle()

    def handle_close(self) -> None:
        """Close; what was in hand and does not run any more is over."""
        super().handle_close()
        with self.outbuf_lock:
            self._settle()


def stack_of(thread: threading.Thread) -> str:
    """The stack of a running thread, innermost call last; empty when it has ended."""
    frame = sys._current_frames().get(thread.ident or 0)  # noqa: SLF001 - the documented way to see another thread
    return "".join(traceback.format_stack(frame)).rstrip() if frame else ""
