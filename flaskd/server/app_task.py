"""Running the app for a request, and sending what it answers (PEP 3333)."""

from __future__ import annotations

import functools
import logging
import re
import sys
from typing import Any

from waitress.buffers import ReadOnlyFileBasedBuffer
from waitress.task import hop_by_hop

from flaskd.process.forks import AppCode
from flaskd.server.lines import TOKEN
from flaskd.server.pushed import Pushed
from flaskd.server.streams import STREAM_TYPES, Parts
from flaskd.server.tasks import ID_HEADER, Recorded

log = logging.getLogger("waitress")
"""The logger to which Waitress writes what is wrong with an answer."""


_STATUS = re.compile(r"[1-9][0-9]{2} [^\x00-\x08\x0a-\x1f\x7f]*")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_NAME = re.compile(TOKEN)
_LENGTH = re.compile(r" *[0-9]{1,18} *")


class AppExitedError(RuntimeError):
    """The app raised SystemExit, KeyboardInterrupt or the like."""


class AppTask(Recorded):
    """Runs the app for one request."""

    _code: AppCode
    _is_noted = False

    def execute(self) -> None:
        """Run the app; SystemExit and the like become an AppExitedError, so that they cannot end the thread."""
        try:
            with AppCode() as self._code:
                self._execute()
        except Exception:
            raise
        except BaseException as error:
            raise AppExitedError(f"the app raised {type(error).__name__} while answering") from error

    def _execute(self) -> None:
        parts = self.channel.server.app(self._environ(), self.start_response)
        self._code.check()
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
            self.set_close_on_finish()
            log.warning(
                "application returned too few bytes (%s) for specified Content-Length (%s) via app_iter",
                written,
                length,
            )

    # --- environ and headers --------------------------------------------------------------------------------------

    def _environ(self) -> dict[str, Any]:
        """The environ as waitress makes it (waitress.task), from the connection's prepared one, with flaskd's keys.

        The path differs: waitress turns ``//admin`` into ``/admin``, flaskd does not.
        """
        request, channel = self.request, self.channel
        prefix, path = channel.adj.url_prefix, request.path
        if prefix and not path.startswith("//"):
            if path == prefix:
                path = ""
            elif path.startswith(prefix + "/"):
                path = path[len(prefix) :]
        environ = channel.environ.copy()
        environ["REQUEST_METHOD"] = request.command
        if self.version != "1.1":
            environ["SERVER_PROTOCOL"] = "HTTP/1.0"
        environ["PATH_INFO"] = path
        environ["REQUEST_URI"] = request.request_uri
        environ["QUERY_STRING"] = request.query
        environ["wsgi.errors"] = sys.stderr
        environ["wsgi.input"] = request.get_body_stream()
        environ.update(request.headers)
        if request.given_id:
            environ["flaskd.request_id"] = request.given_id
        return environ

    def start_response(self, status: Any, headers: Any, exc_info: Any = None) -> Any:
        """Take and check status and headers; returns `write` (PEP 3333). Raises TypeError or ValueError."""
        if exc_info:
            try:
                if self.wrote_header:
                    raise exc_info[1]
                self.response_headers, self.content_length = [], None
            finally:
                exc_info = None
        elif self.complete:
            raise ValueError("cannot call start_response a second time without exc_info (PEP 3333)")
        self.complete = True
        self.status = _status(status)
        self.response_headers += self._given(headers)
        return self.write

    def _given(self, headers: Any) -> list[tuple[str, str]]:
        """The checked headers without Content-Length, which is stored in `content_length`."""
        given: list[tuple[str, str]] = []
        for name, value in headers:
            if not (isinstance(name, str) and isinstance(value, str)):
                raise TypeError(f"cannot answer with the header {(name, value)!r}: an app gives strings (PEP 3333)")
            if not value.isprintable() and _CONTROL.search(value):
                raise ValueError(f"cannot answer with the header {name}: {value!r} has a control character")
            if (written := _written(name)) == "Content-Length":
                self.content_length = _length(value)
            else:
                given.append((written, value))
        return given

    def write(self, data: bytes) -> None:
        """Write a part of the response. By now even an app that is a generator has called start_response."""
        self._code.check()
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
            return Parts(parts, lambda: True, self._code)
        # A body of unknown length may be endless, so no part of it is asked for after the header.
        if hasattr(parts, "__len__"):
            return parts
        return Parts(parts, lambda: self.wrote_header and not self.sends_body, self._code)

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


@functools.lru_cache(maxsize=1024)
def _written(name: str) -> str:
    """A header's name in its usual spelling; raises ValueError for one that an app may not set."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"cannot answer with a header of the name {name!r} (RFC 9110 §5.1)")
    if name.lower() in hop_by_hop:
        raise ValueError(f"cannot answer with the header {name}: it is the server's to give (PEP 3333)")
    return "-".join(map(str.capitalize, name.split("-")))


@functools.lru_cache(maxsize=1024)
def _length(value: str) -> int:
    """The number of bytes in a Content-Length; raises ValueError."""
    if not _LENGTH.fullmatch(value):
        raise ValueError(f"cannot answer with the Content-Length {value!r}: expected a number of bytes")
    return int(value)


@functools.lru_cache(maxsize=256)
def _status(status: str) -> str:
    """A status line's code and reason; the app may leave out the reason and the blank before it (RFC 9112 §4)."""
    if not isinstance(status, str):
        raise TypeError(f"cannot answer with the status {status!r}: an app gives a string (PEP 3333)")
    written = status + " " if re.fullmatch("[1-9][0-9]{2}", status) else status
    if not _STATUS.fullmatch(written):
        raise ValueError(f"cannot answer with the status {status!r}: expected one such as 200 OK")
    return written
