"""Tasks write answers: what all of them have in common, and those that answer without the app."""

from __future__ import annotations

import functools
import logging
import time
from typing import Any

from waitress.task import Task
from waitress.utilities import build_http_date

from flaskd.server.head import connection_options
from flaskd.server.headers import ID_HEADER, SENT_TOGETHER, WITHOUT_BODY, template
from flaskd.server.output import OutputChannel
from flaskd.server.request import Request
from flaskd.sockets import unread

log = logging.getLogger("flaskd.server")

RETRY_AFTER = 5
"""Seconds that a refused client is asked to wait before it tries again."""

http_date = functools.lru_cache(maxsize=2)(build_http_date)


class Recorded(Task):  # type: ignore[misc]  # waitress is untyped
    """What all tasks have in common: they build the header, close connections during a drain, and record the answer."""

    channel: OutputChannel
    request: Request
    status: str
    complete: bool
    wrote_header: bool
    chunked_response: bool
    response_headers: Any
    """Pairs of names and values: a list, or a tuple."""
    content_length: int | None
    close_on_finish: bool

    @property
    def has_body(self) -> bool:
        """Whether an answer with this status has a body: not with 1xx, 204 and 304."""
        return not self.status.startswith(WITHOUT_BODY)

    @property
    def sends_body(self) -> bool:
        """Whether bytes may follow the header: never to HEAD, nor with 1xx, 204 and 304 (RFC 9112 §6.3)."""
        return self.channel.serving.command != "HEAD" and not self.status.startswith(WITHOUT_BODY)

    def build_response_header(self) -> bytes:
        """Status line and headers, sorted by name, with the header that frames the answer (RFC 9112 §6, §9.3).

        Waitress' own method closes the connection after every answer without a Content-Length, drops the requests that
        were pipelined behind it, sends a last chunk to HEAD, and adds ``Via: waitress`` if the app sets Server.
        `response_headers` has no Content-Length, and names in their usual spelling.
        """
        status, framing = self.status, ""
        if not status.startswith(WITHOUT_BODY):
            if self.content_length is not None:
                framing = "Content-Length"
            elif self.version == "1.1":
                framing, self.chunked_response = "Transfer-Encoding", self.sends_body
        if not self.close_on_finish and self._closes(framing):
            self.close_on_finish = True
        channel = self.channel
        serving = channel.serving
        text = template(
            f"HTTP/{self.version} {status}",
            tuple(self.response_headers),
            framing,
            "close" if self.close_on_finish else "Keep-Alive" if self.version == "1.0" else "",
            channel.adj.ident,
            channel.context.served_by,
            ID_HEADER if serving.given_id else "",
        )
        values = {"length": self.content_length, "date": http_date(int(time.time())), "id": serving.given_id}
        header = (text % values).encode("latin-1")
        serving.status, serving.header_length = status, len(header)
        return header

    def _closes(self, framing: str) -> bool:
        """Whether the connection closes after this answer; `framing` is the name of the header that frames it."""
        asked = connection_options(self.request.headers.get("HTTP_CONNECTION", ""))
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
        together = self.complete and 0 < size <= SENT_TOGETHER and (length is None or size <= length)
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
        """Write the answer, and note on the request whether it is whole."""
        ended = False
        try:
            self.execute()
            self._write_rest()
            ended = True
        finally:
            self._note(ended=ended)

    def _write_rest(self) -> None:
        """Write what may still be missing of the answer: its header, or its last chunk."""
        if not self.wrote_header:
            self.write(b"")
        if self.chunked_response:
            self.channel.write_soon(b"0\r\n\r\n")

    def _note(self, *, ended: bool) -> None:
        """Note on the request whether its answer is whole; `ended` is false if something was raised meanwhile."""
        channel = self.channel
        serving = channel.serving
        ends_at = serving.ends_at = channel.output_length() if channel.total_outbufs_len else channel.flushed
        whole = ended and ends_at - serving.starts_at - serving.header_length == self.content_length
        fault = "" if whole else self._fault(serving, ended=ended)
        # Asked last, because closing empties the buffers that were just measured.
        if channel.connected and not channel.stream_over:
            if fault:
                serving.fault = fault
            serving.whole = self.wrote_header and not fault

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
