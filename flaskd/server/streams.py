"""Streams: responses without an end, such as server-sent events, which flaskd ends when a drain wants them to.

`EndingStreams` is for Werkzeug's server, in a thread or under ``flask run``. With Waitress the channel ends streams
(`OutputChannel.end_stream`), even one whose next part never comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from flaskd.process.forks import AppCode

STREAM_TYPES = ("text/event-stream", "multipart/x-mixed-replace")
"""The content types of streams, which may be ended between two parts. Any other chunked response may be data: ended
early with a proper last chunk, half of it would look complete."""
STREAM_GRACE = 1.0
"""Seconds that a stream may go on after a drain began."""


class EndingStreams:
    """A WSGI app around another; it ends a stream between two parts once `over()` is true."""

    def __init__(self, app: Callable[..., Iterable[bytes]], over: Callable[[], bool]) -> None:
        self._app = app
        self._over = over

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Run the app. Its headers, which come with its first part at the latest, say whether it sends a stream."""
        endless = False

        def started(status: str, headers: list[tuple[str, str]], *more: Any) -> Any:
            nonlocal endless
            endless = any(name.lower() == "content-type" and value.startswith(STREAM_TYPES) for name, value in headers)
            return start_response(status, headers, *more)

        with AppCode() as code:
            parts = self._app(environ, started)
        return Parts(parts, lambda: endless and self._over(), code)


class Parts:
    """The parts that an app returned, up to the moment when `over()` is true."""

    def __init__(self, parts: Iterable[bytes], over: Callable[[], bool], code: AppCode) -> None:
        self._parts = parts
        self._over = over
        self._code = code

    def __iter__(self) -> Iterator[bytes]:
        if self._over():
            return
        with self._code:
            for part in self._parts:
                self._code.check()
                yield part
                if self._over():
                    return

    def close(self) -> None:
        """Close what the app returned (PEP 3333), even if no part was asked for."""
        if hasattr(self._parts, "close"):
            with self._code:
                self._parts.close()
