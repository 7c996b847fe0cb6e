"""The app's own answer to a request (PEP 3333)."""

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
"""Where Waitress tells what is wrong with an answer."""


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
        """Run the app; whatever it raises becomes an Exception."""
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
        if self.content_length is None and self._is_stream():  # its first event may be long in coming
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
        """Send the first part; the loop goes on with the answer, so it has no last chunk, and the connection stays."""
        self._is_noted = True  # a drain has no request to end
        self.write(parts.news())
        parts.go_on(self.channel, chunked=self.chunked_response)
        self.chunked_response = self.close_on_finish = False

    def _write_all(self, parts: Any) -> None:
        first = True
        for part in parts:
            if first:
                first = False
                # It may have called start_response with its first part only.
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

    # --- what the app is given ------------------------------------------------------------------------------------

    def _environ(self) -> dict[str, Any]:
        """Waitress' environ (waitress.task), made from a prepared one, and the event that tells of a drain.

        Beside that it differs in the path: ``//admin`` is not ``/admin``, which waitress makes of it.
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
        """Take status and headers, checked as waitress does; gives `write` (PEP 3333)."""
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
        """The headers, but for Content-Length."""
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
        """Write a part of the response; here even an app that is itself a generator has said what it sends."""
        self._code.check()
        first = not self.wrote_header
        super().write(data)
        if first and self.content_length is None and not self._is_noted and self._is_stream():
            self._note_stream()

    # --- answers without a body, and files ------------------------------------------------------------------------

    def _asked_for_nothing(self, parts: Any) -> Any:
        """What the app returned, where no body may follow, or nothing is known of the answer yet."""
        if isinstance(parts, ReadOnlyFileBasedBuffer):
            self._measure(parts)
            self.close_on_finish = self.close_on_finish or not self.has_body
            self.write(b"")
            return Parts(parts, lambda: True, self._code)
        # What has no known length is asked for nothing behind the header: it may be endless.
        if hasattr(parts, "__len__"):
            return parts
        return Parts(parts, lambda: self.wrote_header and not self.sends_body, self._code)

    def _write_file(self, file: Any) -> bool:
        """Send a file (wsgi.file_wrapper), which the channel closes then; whether there was something in it."""
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
        """A stream's connection is closed: it has been made for the stream alone, and ends with it in a drain."""
        return self._is_stream()

    def _note_stream(self) -> None:
        self._is_noted = True
        self.channel.context.stream_began(self.channel)

    def last_piece(self, *, begun: bool) -> bytes:
        """What ends the stream: its last chunk, or, where nothing of it is out yet, a header with nothing behind it."""
        if begun:  # an HTTP/1.0 client sees its end by that of the connection
            return b"0\r\n\r\n" if self.chunked_response else b""
        headers = [each for each in self.response_headers if each[0] not in {"Connection", "Transfer-Encoding"}]
        if self.request.given_id and "X-Request-Id" not in dict(headers):
            headers.append((ID_HEADER, self.request.given_id))
        head = [f"HTTP/{self.version} {self.status}", *map(": ".join, headers), "Connection: close"]
        return "\r\n".join([*head, "", ""]).encode("latin-1")

    def _is_stream(self) -> bool:
        """Whether it is to end by a chunk, or by the end of its connection, as an HTTP/1.0 proxy asks for it."""
        return (
            self.content_length is None
            and self.sends_body
            and any(name == "Content-Type" and value.startswith(STREAM_TYPES) for name, value in self.response_headers)
        )


@functools.lru_cache(maxsize=1024)
def _written(name: str) -> str:
    """A header's name as it is usually written, if an app may give it."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"cannot answer with a header of the name {name!r} (RFC 9110 §5.1)")
    if name.lower() in hop_by_hop:
        raise ValueError(f"cannot answer with the header {name}: it is the server's to give (PEP 3333)")
    return "-".join(map(str.capitalize, name.split("-")))


@functools.lru_cache(maxsize=1024)
def _length(value: str) -> int:
    """The number that a Content-Length gives."""
    if not _LENGTH.fullmatch(value):
        raise ValueError(f"cannot answer with the Content-Length {value!r}: expected a number of bytes")
    return int(value)


@functools.lru_cache(maxsize=256)
def _status(status: str) -> str:
    """A status of three digits and a reason, which may be empty (RFC 9112 §4), as may be the blank between them."""
    if not isinstance(status, str):
        raise TypeError(f"cannot answer with the status {status!r}: an app gives a string (PEP 3333)")
    written = status + " " if re.fullmatch("[1-9][0-9]{2}", status) else status
    if not _STATUS.fullmatch(written):
        raise ValueError(f"cannot answer with the status {status!r}: expected one such as 200 OK")
    return written
