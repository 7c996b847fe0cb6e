"""The kinds of answers: the app's own, and those that flaskd gives without it."""

from __future__ import annotations

import logging
import time
from typing import Any

from waitress.buffers import ReadOnlyFileBasedBuffer
from waitress.task import ErrorTask, Task, WSGITask
from waitress.utilities import build_http_date

from flaskd.process.forks import AppCode
from flaskd.server.output import OutputChannel
from flaskd.server.request import Request
from flaskd.server.streams import STREAM_TYPES, Parts
from flaskd.sockets import unread

log = logging.getLogger("flaskd.server")

_SENT_TOGETHER = 1 << 16
"""Bytes of body that are worth copying, so that they go out with the header in one piece."""
RETRY_AFTER = 5
"""Seconds that a refused client is asked to wait."""


class AppExitedError(RuntimeError):
    """The app raised SystemExit, KeyboardInterrupt or the like; waitress would lose the connection for ever."""


class Recorded(Task):  # type: ignore[misc]  # waitress is untyped
    """What all tasks have in common: they close the connection while draining, and record the answer."""

    channel: OutputChannel
    request: Request
    status: str
    response_headers: list[tuple[str, str]]
    content_length: int | None
    close_on_finish: bool

    @property
    def sends_body(self) -> bool:
        """Whether bytes may follow the header: never to HEAD, nor with 1xx, 204 and 304 (RFC 9112 §6.3)."""
        return bool(self.has_body) and getattr(self.channel.serving, "command", "") != "HEAD"

    def build_response_header(self) -> bytes:
        """Status line and headers, sorted by name, with what says where the answer ends (RFC 9112 §6, §9.3).

        Waitress' own closes after every answer without a Content-Length, drops what was pipelined behind it, sends a
        last chunk to HEAD, and adds ``Via: waitress`` where the app names its server.
        """
        headers = [("-".join(map(str.capitalize, name.split("-"))), value) for name, value in self.response_headers]
        headers = [header for header in headers if header[0] != "Content-Length"]
        if self.has_body and self.content_length is not None:
            if self.content_length < 0:
                raise ValueError(f"cannot answer with a Content-Length of {self.content_length}")
            headers.append(("Content-Length", str(self.content_length)))
        elif self.has_body and self.version == "1.1":
            headers.append(("Transfer-Encoding", "chunked"))
            self.chunked_response = self.sends_body
        given = {name for name, _ in headers}
        self.close_on_finish = self.close_on_finish or self._closes(given)
        if "Connection" not in given:
            if self.close_on_finish:
                headers.append(("Connection", "close"))
            elif self.version == "1.0":
                headers.append(("Connection", "Keep-Alive"))
        if "Server" not in given and (ident := self.channel.server.adj.ident):
            headers.append(("Server", ident))
        if "Date" not in given:
            headers.append(("Date", build_http_date(self.start_time)))
        self.response_headers = sorted(headers, key=lambda header: header[0])
        lines = [f"HTTP/{self.version} {self.status}", *map(": ".join, self.response_headers), "", ""]
        header = "\r\n".join(lines).encode("latin-1")
        self.channel.serving.status = self.status
        self.channel.serving.header_length = len(header)
        return header

    def _closes(self, given: set[str]) -> bool:
        """Whether the connection ends with this answer, whose headers have these names."""
        asked = {token.strip().lower() for token in self.request.headers.get("CONNECTION", "").split(",")}
        if "close" in asked or self.status.startswith("1"):  # an interim answer, behind which the client waits for more
            return True
        if self.version == "1.0" and not ("keep-alive" in asked and "Content-Length" in given):
            return True
        if self.ends_with_connection:
            return True
        channel = self.channel
        last = channel.context.closing and len(channel.requests) <= 1 and channel.arriving is None
        # Waitress does not read while a request runs: the next one may lie in the kernel already.
        return last and not (channel.connected and unread(channel.socket))

    @property
    def ends_with_connection(self) -> bool:
        """Whether only the end of the connection is the answer's."""
        return False

    def write(self, data: bytes) -> None:
        """Write a part of the response, the first one in one piece with the header.

        Waitress sends each for itself, which costs a system call more, in which the GIL changes hands, and wakes the
        client for a header alone. Where no body may follow, `data` is dropped.
        """
        if not isinstance(data, bytes | bytearray | memoryview):  # before the header is out
            raise TypeError(f"cannot answer with {type(data).__name__}: an app gives bytes (PEP 3333)")
        if data and not self.sends_body:
            if not self.has_body:  # an app that gets this wrong may get more wrong
                self.close_on_finish = True
                super().write(data)  # says so in the log, and sends the header alone
                return
            data = b""
        if self.wrote_header or not 0 < len(data) <= _SENT_TOGETHER:
            super().write(data)
            return
        self.channel.hold_next()
        try:
            super().write(data)
        finally:
            self.channel.release()  # nothing followed: the response has no body, or a shorter one

    def service(self) -> None:
        """Give the answer, and note whether it is whole."""
        channel, serving, ended = self.channel, self.channel.serving, False
        try:
            super().service()
            ended = True
        finally:
            serving.ends_at = channel.output_length()
            channel.grace_from = time.monotonic()
            fault = self._fault(serving, ended=ended)
            # Asked last: a close empties the buffers that were just measured.
            if channel.connected and not channel.stream_over:
                serving.fault, serving.whole = fault, self.wrote_header and not fault

    def _fault(self, serving: Request, *, ended: bool) -> str:
        """Why the client sees that the answer is not whole; empty where it is."""
        if not (self.wrote_header and self.sends_body):
            return ""
        if self.content_length is None:
            return "" if ended else "the app broke off its answer"
        missing = self.content_length - (serving.ends_at - serving.starts_at - serving.header_length)
        return f"its answer is {missing} bytes shorter than its Content-Length says" if missing > 0 else ""


class AppTask(Recorded, WSGITask):  # type: ignore[misc]
    """Runs the app for one request."""

    _app_code: AppCode
    _is_noted = False

    def execute(self) -> None:
        """Run the app; whatever it raises becomes an Exception, because waitress loses the channel on anything else."""
        try:
            with AppCode() as self._app_code:
                super().execute()
        except Exception:
            raise
        except BaseException as error:
            raise AppExitedError(f"the app raised {type(error).__name__} while answering") from error

    def get_environment(self) -> dict[str, Any]:
        """Waitress' environ, and the event by which a stream learns that a drain began."""
        environ: dict[str, Any] = super().get_environment()
        if self.request.path.startswith("//"):  # another path than with one slash, which waitress makes of it
            environ["PATH_INFO"] = self.request.path
        environ["flaskd.draining"] = self.channel.context.draining
        return environ

    @property
    def ends_with_connection(self) -> bool:
        """A stream's connection is closed: it has been made for the stream alone, and ends with it in a drain."""
        return self._is_stream()

    def run(self, environ: dict[str, Any], start_response: Any) -> Any:
        """Call the app. A stream that it began is known from here on, though its first event may be long in coming."""
        parts = self.channel.server.app(environ, start_response)
        self._app_code.check()
        if self._is_stream():
            self._note_stream()
        if self.complete and self.sends_body:
            return parts
        if isinstance(parts, ReadOnlyFileBasedBuffer):  # waitress would send it whatever the header says
            return self._without_file(parts)
        # Where no body may follow, what has no known length is asked for nothing behind the header: it may be endless.
        return (
            parts
            if hasattr(parts, "__len__")
            else Parts(parts, lambda: self.wrote_header and not self.sends_body, self._app_code)
        )

    def _without_file(self, file: Any) -> Any:
        """Send the header that the file would have had, and not the file, which is closed."""
        size = file.prepare(self.content_length)
        if size and size != self.content_length:
            self.remove_content_length_header()
            self.content_length = size
        self.close_on_finish = self.close_on_finish or not self.has_body
        self.write(b"")
        return Parts(file, lambda: True, self._app_code)

    def write(self, data: bytes) -> None:
        """Write a part of the response; here even an app that is itself a generator has said what it sends."""
        self._app_code.check()
        first = not self.wrote_header
        super().write(data)
        if first and not self._is_noted and self._is_stream():
            self._note_stream()

    def _note_stream(self) -> None:
        self._is_noted = True
        self.channel.context.stream_began(self.channel)

    def last_piece(self, *, begun: bool) -> bytes:
        """What ends the stream: its last chunk, or, where nothing of it is out yet, a header with nothing behind it."""
        if begun:  # an HTTP/1.0 client sees its end by that of the connection
            return b"0\r\n\r\n" if self.chunked_response else b""
        headers = [each for each in self.response_headers if each[0].lower() not in {"connection", "transfer-encoding"}]
        head = [f"HTTP/{self.version} {self.status}", *map(": ".join, headers), "Connection: close"]
        return "\r\n".join([*head, "", ""]).encode("latin-1")

    def _is_stream(self) -> bool:
        """Whether it is to end by a chunk, or by the end of its connection, as an HTTP/1.0 proxy asks for it."""
        return (
            self.sends_body
            and self.content_length is None
            and any(
                name.lower() == "content-type" and value.startswith(STREAM_TYPES)
                for name, value in self.response_headers
            )
        )


class RefusalTask(Recorded, ErrorTask):  # type: ignore[misc]
    """Answers a request that could not be parsed, or whose app failed."""


class PlainTask(Recorded):
    """A short answer in text, without the app."""

    complete = True

    def answer(self) -> tuple[str, list[tuple[str, str]], str]:
        """Status, headers, body."""
        raise NotImplementedError

    def execute(self) -> None:
        """Give it."""
        self.status, headers, text = self.answer()
        body = text.encode()
        self.response_headers += [("Content-Type", "text/plain; charset=utf-8"), *headers]
        self.content_length = len(body)
        self.write(body)


class RejectTask(PlainTask):
    """503: flaskd cannot take the request any more, or not now; another instance, or a later try, may."""

    def answer(self) -> tuple[str, list[tuple[str, str]], str]:
        """Say when to try again."""
        return (
            "503 Service Unavailable",
            [("Retry-After", str(RETRY_AFTER))],
            "not now: this server is stopping or drained\n",
        )


class HealthTask(PlainTask):
    """Whether new requests are welcome, answered by the loop itself, however busy the threads are."""

    def answer(self) -> tuple[str, list[tuple[str, str]], str]:
        """Say what the owner of the loop says."""
        status, text = self.channel.context.health()
        return status, [("Cache-Control", "no-store")], text + "\n"
