"""Running the app for a request, and sending what it answers (PEP 3333)."""

from __future__ import annotations

import io
import logging
import sys
import time
from typing import Any

from waitress.buffers import ReadOnlyFileBasedBuffer

from flaskd.server import tasks
from flaskd.server.headers import ID_HEADER, Given, checked
from flaskd.server.output import OutputChannel
from flaskd.server.pushed import Pushed
from flaskd.server.request import Request
from flaskd.server.streams import STREAM_TYPES, Parts
from flaskd.server.tasks import Recorded

log = logging.getLogger("waitress")
"""The logger to which Waitress writes what is wrong with an answer."""


_SENT_OTHERWISE = (Pushed, ReadOnlyFileBasedBuffer)


class AppExitedError(RuntimeError):
    """The app raised SystemExit, KeyboardInterrupt or the like."""


class AppTask(Recorded):
    """Runs the app for one request."""

    _is_noted = False
    response_headers: tuple[tuple[str, str], ...] = ()

    def __init__(self, channel: OutputChannel, request: Request) -> None:
        self.channel, self.request = channel, request
        channel.task = self
        self._given: Given | None = None
        """What the app said of its answer."""
        # On the class, where waitress has them, they are found less quickly.
        self.complete = self.wrote_header = self.chunked_response = self.close_on_finish = False
        self._is_out = False
        """Whether all of the answer is known to be in the kernel."""
        self.version = "1.1" if request.version == "1.1" else "1.0"  # as waitress does

    def service(self) -> None:
        """Run the app and write its answer; SystemExit and the like become an AppExitedError, which ends no thread."""
        context = self.channel.context
        app, code, ended = context.app, context.code, False
        try:
            parts = app(self._environ(), self.start_response)
            given = self._given
            if given is None or not (given.plain and self.request.plain) or isinstance(parts, _SENT_OTHERWISE):
                code.check()
                self._send(parts)
                code.check()
                self._write_rest()
            else:
                try:
                    for part in parts:
                        if part:
                            self.write(part)
                    if self.content_bytes_written != self.content_length:
                        self._tell_too_few()
                finally:
                    if hasattr(parts, "close"):
                        parts.close()
                code.check()
                if not self.wrote_header:
                    self.write(b"")
            ended = True
        except BaseException as error:
            code.check(error)
            if isinstance(error, Exception):
                raise
            raise AppExitedError(f"the app raised {type(error).__name__} while answering") from error
        finally:
            if not self._is_out:
                self._note(ended=ended)

    def _send(self, parts: Any) -> None:
        """Send what the app returned, whatever it may be."""
        if isinstance(parts, Pushed):
            self._begin_pushing(parts)
            return
        if self.content_length is None and self._is_stream():  # its first event may come much later
            self._note_stream()
        closes = True
        try:
            if not (self.complete and self.sends_body):
                parts = self._asked_for_nothing(parts)
            elif isinstance(parts, ReadOnlyFileBasedBuffer) and self._write_file(parts):
                closes = False
                return
            self._write_all(parts)
        finally:
            if closes and hasattr(parts, "close"):
                parts.close()

    def _begin_pushing(self, parts: Pushed) -> None:
        """Send the first part. The loop sends the others, so no last chunk follows, and the connection stays open."""
        self._is_noted = True  # not counted as a stream: a drain closes its connection as an idle one
        self.write(parts.news())
        parts.go_on(self.channel, chunked=self.chunked_response)
        self.chunked_response = self.close_on_finish = False

    def _write_all(self, parts: Any) -> None:
        first = True
        for part in parts:
            if first:
                first = False
                # The app may have called start_response only just before it gave its first part.
                if self.content_length is None and hasattr(parts, "__len__") and len(parts) == 1:
                    self.content_length = len(part)
            if part:
                self.write(part)
        length, written = self.content_length, self.content_bytes_written
        if length is not None and written != length and self.sends_body:
            self._tell_too_few()

    def _tell_too_few(self) -> None:
        """Close the connection after an answer that is shorter than its Content-Length, and say so in the log."""
        self.set_close_on_finish()
        log.warning(
            "application returned too few bytes (%s) for specified Content-Length (%s) via app_iter",
            self.content_bytes_written,
            self.content_length,
        )

    # --- environ and headers --------------------------------------------------------------------------------------

    def _environ(self) -> dict[str, Any]:
        """The environ as waitress makes it (waitress.task), from the connection's prepared one, with flaskd's keys.

        The path differs: waitress turns ``//admin`` into ``/admin``, flaskd does not.
        """
        request, channel = self.request, self.channel
        environ = channel.environ_with(request.headers)
        if request.line is None or channel.context.url_prefix:
            self._describe(environ)
        else:
            environ.update(request.line)
        environ["wsgi.errors"] = sys.stderr
        environ["wsgi.input"] = request.get_body_stream() if request.line is None else io.BytesIO(request.short_body)
        if not request.plain and request.given_id:
            environ["flaskd.request_id"] = request.given_id
        return environ

    def _describe(self, environ: dict[str, Any]) -> None:
        """Put into the environ what the request line says."""
        request, prefix = self.request, self.channel.context.url_prefix
        path = request.path
        if prefix and not path.startswith("//"):
            if path == prefix:
                path = ""
            elif path.startswith(prefix + "/"):
                path = path[len(prefix) :]
        environ["REQUEST_METHOD"] = request.command
        if self.version != "1.1":
            environ["SERVER_PROTOCOL"] = "HTTP/1.0"
        environ["PATH_INFO"] = path
        environ["REQUEST_URI"] = request.request_uri
        environ["QUERY_STRING"] = request.query

    def start_response(self, status: Any, headers: Any, exc_info: Any = None) -> Any:
        """Take and check status and headers; returns `write` (PEP 3333). Raises TypeError or ValueError."""
        if exc_info or self.complete:
            self._start_again(exc_info)
        self.complete = True
        context, headers = self.channel.context, tuple(headers)
        try:
            given = checked(status, headers, context.ident, context.served_by)
        except TypeError:  # it cannot be kept, because it has parts that can change, or is wrong
            given = checked.__wrapped__(status, headers, context.ident, context.served_by)
        self._given, self.status = given, given.status
        self.response_headers += given.headers
        if given.length is not None:
            self.content_length = given.length
        return self.write

    def _start_again(self, exc_info: Any) -> None:
        """Forget what `start_response` was told before, if its caller has an error to report, and may do so."""
        if not exc_info:
            raise ValueError("cannot call start_response a second time without exc_info (PEP 3333)")
        try:
            if self.wrote_header:
                raise exc_info[1]
            self.response_headers, self.content_length, self._given = (), None, None
        finally:
            exc_info = None

    def write(self, data: bytes) -> None:
        """Write a part of the response. By now even an app that is a generator has called start_response."""
        channel, given, request = self.channel, self._given, self.request
        channel.context.code.check()
        if (
            given is not None
            and given.plain
            and request.plain
            and type(data) is bytes
            and given.length == len(data) == self.content_length
            and not (self.wrote_header or channel.context.closing)
        ):
            date = tasks.http_date(int(time.time())).encode()
            channel.write_soon(b"".join((given.before, date, given.after, data)))
            request.status, request.header_length = given.status, given.header_length
            self.content_bytes_written, self.wrote_header = given.length, True
            if not channel.total_outbufs_len:
                request.ends_at = channel.flushed
                request.whole = self._is_out = True
            return
        first = not self.wrote_header
        super().write(data)
        if first and self.content_length is None and not self._is_noted and self._is_stream():
            self._note_stream()

    # --- answers without a body, and files ------------------------------------------------------------------------

    def _asked_for_nothing(self, parts: Any) -> Any:
        """Prepare what the app returned, where no body may be sent, or where start_response was not called yet."""
        if isinstance(parts, ReadOnlyFileBasedBuffer):
            self._measure(parts)
            self.close_on_finish = self.close_on_finish or not self.has_body
            self.write(b"")
            return Parts(parts, lambda: True, self.channel.context.code)
        # A body of unknown length may be endless, so no part of it is asked for after the header.
        if hasattr(parts, "__len__"):
            return parts
        return Parts(parts, lambda: self.wrote_header and not self.sends_body, self.channel.context.code)

    def _write_file(self, file: Any) -> bool:
        """Send a file (wsgi.file_wrapper), which the channel then closes; False where the file is empty."""
        if not self._measure(file):
            return False
        self.write(b"")
        self.channel.write_soon(file)
        return True

    def _measure(self, file: Any) -> bool:
        if size := file.prepare(self.content_length):
            self.content_length = size
        return bool(size)

    # --- streams --------------------------------------------------------------------------------------------------

    @property
    def ends_with_connection(self) -> bool:
        """True for a stream: browsers open a connection for it alone, and the end of the connection ends it."""
        return self._is_stream()

    def _note_stream(self) -> None:
        self._is_noted = True
        self.channel.context.stream_began(self.channel)

    def last_piece(self, *, begun: bool) -> bytes:
        """What ends the stream: its last chunk; if nothing of it was sent yet, a header without a body."""
        if begun:  # for an HTTP/1.0 client the end of the connection is the end of the stream
            return b"0\r\n\r\n" if self.chunked_response else b""
        headers = [each for each in self.response_headers if each[0] not in {"Connection", "Transfer-Encoding"}]
        if self.request.given_id and "X-Request-Id" not in dict(headers):
            headers.append((ID_HEADER, self.request.given_id))
        head = [f"HTTP/{self.version} {self.status}", *map(": ".join, headers), "Connection: close"]
        return "\r\n".join([*head, "", ""]).encode("latin-1")

    def _is_stream(self) -> bool:
        """Whether the answer is a stream: of a type in `STREAM_TYPES`, and without a Content-Length."""
        return (
            self.content_length is None
            and self.sends_body
            and any(name == "Content-Type" and value.startswith(STREAM_TYPES) for name, value in self.response_headers)
        )
