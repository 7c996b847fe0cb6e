"""The kinds of answers: the app's own, and those that flaskd gives without it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from waitress.channel import ClientDisconnected
from waitress.task import ErrorTask, Task, WSGITask

from flaskd.forks import AppCode
from flaskd.sockets import unread

if TYPE_CHECKING:
    from flaskd.server.channel import Channel, Request

STREAM_TYPES = ("text/event-stream", "multipart/x-mixed-replace")
"""Responses without an end of their own, which may be ended between two parts. Any other chunked response is somebody's
data, and ending it early with a proper last chunk would make half of it look whole."""

_SENT_TOGETHER = 1 << 16
"""Bytes of body that are worth copying, so that they go out with the header in one piece."""
RETRY_AFTER = 5
"""Seconds that a refused client is asked to wait."""


class AppExitedError(RuntimeError):
    """The app raised SystemExit, KeyboardInterrupt or the like; waitress would lose the connection for ever."""


class Recorded(Task):  # type: ignore[misc]  # waitress is untyped
    """What all tasks have in common: they close the connection while draining, and record the answer."""

    channel: Channel
    request: Request
    status: str

    def build_response_header(self) -> bytes:
        channel = self.channel
        closes = channel.loop.closing and len(channel.requests) <= 1 and channel.arriving is None
        # Waitress does not read while a request runs: the next one may lie in the kernel already.
        if closes and not (channel.connected and unread(channel.socket)):
            # As if the client had asked for it: set_close_on_finish() would not keep an HTTP/1.0 client's keep-alive
            # from being confirmed in the same breath.
            self.request.headers["CONNECTION"] = "close"
        header: bytes = super().build_response_header()
        channel.serving.status = self.status
        channel.serving.header_length = len(header)
        return header

    def write(self, data: bytes) -> None:
        """Write a part of the response, the first one in one piece with the header.

        Waitress sends each for itself, which costs a system call more, in which the GIL changes hands, and wakes the
        client for a header alone.
        """
        if self.wrote_header or not 0 < len(data) <= _SENT_TOGETHER:
            super().write(data)
            return
        self.channel.hold_next()
        try:
            super().write(data)
        finally:
            self.channel.release()  # nothing followed: the response has no body, or a shorter one

    def service(self) -> None:
        serving = self.channel.serving
        try:
            super().service()
        finally:
            serving.ends_at = self.channel.output_length()
            self.channel.grace_from = time.monotonic()
        serving.whole = self.channel.connected  # asked last: a close empties the buffers that were just measured


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
        environ["flaskd.draining"] = self.channel.loop.draining
        return environ

    def set_close_on_finish(self) -> None:
        """Keep the connection after an answer that ends by itself: with its last chunk, or with its header.

        Waitress closes after every answer without a Content-Length, 204 and 304 included, and drops what was pipelined
        behind it. A stream's connection is closed: it has been made for the stream alone, and ends with it in a drain.
        """
        asked_to_close = self.request.headers.get("CONNECTION", "").lower() == "close"
        ends_by_itself = not self.has_body or (self.chunked_response and not self._is_stream())
        # Waitress sends the last chunk to HEAD as well, where there is no body, and no chunk to be expected.
        if self.version != "1.1" or self.request.command == "HEAD" or asked_to_close or not ends_by_itself:
            super().set_close_on_finish()

    def run(self, environ: dict[str, Any], start_response: Any) -> Any:
        """Call the app. A stream that it began is known from here on, though its first event may be long in coming."""
        parts = self.channel.server.app(environ, start_response)
        self._app_code.check()
        if self._is_stream():
            self._note_stream()
        return parts

    def write(self, data: bytes) -> None:
        """Write a part of the response; here even an app that is itself a generator has said what it sends."""
        self._app_code.check()
        first = not self.wrote_header
        super().write(data)
        if first and not self._is_noted and self._is_stream():
            self._note_stream()

    def _note_stream(self) -> None:
        self._is_noted = True
        self.channel.loop.stream_began(self.channel)

    def last_piece(self, *, begun: bool) -> bytes:
        """What ends the stream: its last chunk, or, where nothing of it is out yet, a header with nothing behind it."""
        if begun:  # an HTTP/1.0 client sees its end by that of the connection
            return b"0\r\n\r\n" if self.chunked_response else b""
        headers = [each for each in self.response_headers if each[0].lower() not in {"connection", "transfer-encoding"}]
        head = [f"HTTP/{self.version} {self.status}", *map(": ".join, headers), "Connection: close"]
        return "\r\n".join([*head, "", ""]).encode("latin-1")

    def _is_stream(self) -> bool:
        """Whether it is to end by a chunk, or by the end of its connection, as an HTTP/1.0 proxy asks for it."""
        return self.content_length is None and any(
            name.lower() == "content-type" and value.startswith(STREAM_TYPES) for name, value in self.response_headers
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
        if self.request.command == "HEAD":
            self.write(b"")
        else:
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
    """Whether new requests are welcome, answered by the loop itself, however busy the workers are."""

    def answer(self) -> tuple[str, list[tuple[str, str]], str]:
        """Say what the owner of the loop says."""
        status, text = self.channel.loop.health()
        return status, [("Cache-Control", "no-store")], text + "\n"


__all__ = ["AppTask", "ClientDisconnected", "HealthTask", "RefusalTask", "RejectTask"]
