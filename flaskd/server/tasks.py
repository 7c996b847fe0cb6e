"""Tasks write answers: what all of them have in common, and those that answer without the app."""

from __future__ import annotations

import functools
import logging
import operator
import time

from waitress.task import Task
from waitress.utilities import build_http_date

from flaskd.server.output import OutputChannel
from flaskd.server.request import Request
from flaskd.sockets import unread

log = logging.getLogger("flaskd.server")

_SENT_TOGETHER = 1 << 16
"""Most bytes of a body that are copied in order to be sent together with the header."""
RETRY_AFTER = 5
"""Seconds that a refused client is asked to wait before it tries again."""


ID_HEADER = "X-Request-ID"
"""flaskd's spelling; a header that the app sets is written X-Request-Id."""
_WITHOUT_BODY = ("1", "204", "304")
http_date = functools.lru_cache(maxsize=2)(build_http_date)
_by_name = operator.itemgetter(0)


@functools.lru_cache(maxsize=64)
def _tokens(value: str) -> frozenset[str]:
    """The options in a Connection header, in small letters (RFC 9110 §7.6.1)."""
    return frozenset(token.strip().lower() for token in value.split(","))


@functools.lru_cache(maxsize=256)
def _header(  # noqa: PLR0917 - a cache is slower with keyword arguments
    start: str,
    given: tuple[tuple[str, str], ...],
    framing: str,
    connection: str,
    ident: str | None,
    served_by: str,
    names_it: str,
) -> str:
    """A template of status line and headers, sorted by name, in which `length`, `date` and `id` are filled in later.

    Most answers of an app have the same headers, except for their length, their id and the date. `names_it` is the
    name of the header with the id; empty if the client is told none.
    """
    headers = [(name.replace("%", "%%"), value.replace("%", "%%")) for name, value in given]
    names = dict(headers)
    if framing:
        headers.append((framing, "%(length)d" if framing == "Content-Length" else "chunked"))
    own = {"Server": (ident or "").replace("%", "%%"), "X-Served-By": served_by.replace("%", "%%")}
    for name, value in (("Connection", connection), *own.items(), ("Date", "%(date)s")):
        if value and name not in names:
            headers.append((name, value))
    if names_it and "X-Request-Id" not in names:
        headers.append((names_it, "%(id)s"))
    headers.sort(key=_by_name)
    return "\r\n".join([start.replace("%", "%%"), *map(": ".join, headers), "", ""])


class Recorded(Task):  # type: ignore[misc]  # waitress is untyped
    """What all tasks have in common: they build the header, close connections during a drain, and record the answer."""

    channel: OutputChannel
    request: Request
    status: str
    complete: bool
    wrote_header: bool
    chunked_response: bool
    response_headers: list[tuple[str, str]]
    content_length: int | None
    close_on_finish: bool

    @property
    def has_body(self) -> bool:
        """Whether an answer with this status has a body: not with 1xx, 204 and 304."""
        return not self.status.startswith(_WITHOUT_BODY)

    @property
    def sends_body(self) -> bool:
        """Whether bytes may follow the header: never to HEAD, nor with 1xx, 204 and 304 (RFC 9112 §6.3)."""
        return self.channel.serving.command != "HEAD" and not self.status.startswith(_WITHOUT_BODY)

    def build_response_header(self) -> bytes:
        """Status line and headers, sorted by name, with the header that frames the answer (RFC 9112 §6, §9.3).

        Waitress' own method closes the connection after every answer without a Content-Length, drops the requests that
        were pipelined behind it, sends a last chunk to HEAD, and adds ``Via: waitress`` if the app sets Server.
        `response_headers` has no Content-Length, and names in their usual spelling.
        """
        status, framing = self.status, ""
        if not status.startswith(_WITHOUT_BODY):
            if self.content_length is not None:
                framing = "Content-Length"
            elif self.version == "1.1":
                framing, self.chunked_response = "Transfer-Encoding", self.sends_body
        if not self.close_on_finish and self._closes(framing):
            self.close_on_finish = True
        channel = self.channel
        serving = channel.serving
        template = _header(
            f"HTTP/{self.version} {status}",
            tuple(self.response_headers),
            framing,
            "close" if self.close_on_finish else "Keep-Alive" if self.version == "1.0" else "",
            channel.adj.ident,
            channel.context.served_by,
            ID_HEADER if serving.given_id else "",
        )
        values = {"length": self.content_length, "date": http_date(int(self.start_time)), "id": serving.given_id}
        header = (template % values).encode("latin-1")
        serving.status, serving.header_length = status, len(header)
        return header

    def _closes(self, framing: str) -> bool:
        """Whether the connection closes after this answer; `framing` is the name of the header that frames it."""
        asked = _tokens(self.request.headers.get("HTTP_CONNECTION", ""))
        if "close" in asked or self.status.startswith("1"):  # after 1xx the client would wait for another answer
            return True
        if self.version == "1.0" and not ("keep-alive" in asked and framing == "Content-Length"):
            return True
        if self.content_length is None and self.ends_with_connection:
            return True
        channel = self.channel
        if not channel.context.closing:
            return False
        # The server does not read while a request runs: the next request may be in the kernel already.
        last = len(channel.requests) <= 1 and channel.arriving is None
        return last and not (channel.connected and unread(channel.socket))

    @property
    def ends_with_connection(self) -> bool:
        """Whether the connection closes after an answer whose length is not known."""
        return False

    def write(self, data: bytes) -> None:
        """Write a part of the response; the first part is sent together with the header.

        Waitress sends both separately, which costs another system call, in which the GIL is released, and wakes the
        client for the header alone. If no body may follow, `data` is dropped. Raises TypeError if it is not bytes.
        """
        if type(data) is not bytes:
            if not isinstance(data, bytes | bytearray | memoryview):  # checked before the header is sent
                raise TypeError(f"cannot answer with {type(data).__name__}: an app gives bytes (PEP 3333)")
            data = bytes(data)
        if data and not self.sends_body:
            if not self.has_body:  # an app with this fault may have others
                self.close_on_finish = True
                super().write(data)  # logs a warning, and sends the header alone
                return
            data = b""
        length, size = self.content_length, len(data)
        together = self.complete and 0 < size <= _SENT_TOGETHER and (length is None or size <= length)
        if self.wrote_header or not together:
            super().write(data)
            return
        header = self.build_response_header()
        if self.chunked_response:
            self.channel.write_soon(b"%b%X\r\n%b\r\n" % (header, size, data))
        else:
            self.channel.write_soon(header + data)
            self.content_bytes_written += size if length is not None else 0
        self.wrote_header = True

    def service(self) -> None:
        """Write the answer, and note whether it is complete."""
        channel, serving, ended = self.channel, self.channel.serving, False
        self.start_time = time.time()
        try:
            self.execute()
            if not self.wrote_header:
                self.write(b"")
            if self.chunked_response:
                channel.write_soon(b"0\r\n\r\n")
            ended = True
        finally:
            serving.ends_at = channel.output_length() if channel.total_outbufs_len else channel.flushed
            fault = self._fault(serving, ended=ended)
            # Checked last: closing the connection empties the buffers that were measured above.
            if channel.connected and not channel.stream_over:
                serving.fault, serving.whole = fault, self.wrote_header and not fault

    def execute(self) -> None:
        """Write the answer."""
        raise NotImplementedError

    def _fault(self, serving: Request, *, ended: bool) -> str:
        """How the client can see that the answer is incomplete; empty if it is complete."""
        length, missing = self.content_length, 0
        if length is not None:
            missing = length - (serving.ends_at - serving.starts_at - serving.header_length)
        if missing <= 0 and (ended or length is not None):
            return ""
        if not (self.wrote_header and self.sends_body):
            return ""
        if missing > 0:
            return f"its answer is {missing} bytes shorter than its Content-Length says"
        return "the app broke off its answer"


class RefusalTask(Recorded):
    """Answers a request that could not be parsed, or whose app failed, and closes the connection."""

    complete = True

    def execute(self) -> None:
        """Write the error in waitress' form (waitress.utilities.Error)."""
        self.status, headers, body = self.request.error.to_response(self.channel.adj.ident)
        self.response_headers += headers
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)


class PlainTask(Recorded):
    """A short answer in plain text, without the app."""

    complete = True

    def answer(self) -> tuple[str, list[tuple[str, str]], str]:
        """Status line, headers and body."""
        raise NotImplementedError

    def execute(self) -> None:
        """Write what `answer` returns, as UTF-8."""
        self.status, headers, text = self.answer()
        body = text.encode()
        self.response_headers += [("Content-Type", "text/plain; charset=utf-8"), *headers]
        self.content_length = len(body)
        self.write(body)


class RejectTask(PlainTask):
    """Answers 503: flaskd does not take the request now; another instance may, or this one later."""

    def answer(self) -> tuple[str, list[tuple[str, str]], str]:
        """Say why, and in Retry-After when to try again."""
        why = (
            "too many requests wait for this server"
            if self.request.refused_by
            else "this server is stopping or drained"
        )
        return "503 Service Unavailable", [("Retry-After", str(RETRY_AFTER))], f"not now: {why}\n"


class HealthTask(PlainTask):
    """Answers whether new requests are welcome; the loop itself answers, however busy the threads are."""

    def answer(self) -> tuple[str, list[tuple[str, str]], str]:
        """The answer of `Context.health`, not to be cached."""
        status, text = self.channel.context.health()
        return status, [("Cache-Control", "no-store")], text + "\n"
