"""Streams that end in time, for the servers that run the app in their own way: Werkzeug's, in a thread or under Flask.

(Waitress' channel does it better: it ends a stream whose next part never comes, too.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from flaskd.process.forks import AppCode

STREAM_TYPES = ("text/event-stream", "multipart/x-mixed-replace")
"""Responses without an end of their own, which may be ended between two parts. Any other chunked response is somebody's
data, and ending it early with a proper last chunk would make half of it look whole."""
STREAM_GRACE = 1.0
"""Seconds that a stream may go on after a drain began."""


class EndingStreams:
    """A WSGI app around another; a response without an end of its own ends between two parts once it is `over()`."""

    def __init__(self, app: Callable[..., Iterable[bytes]], over: Callable[[], bool]) -> None:
        self._app = app
        self._over = over

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Run the app, which says by its headers whether it is such a response (at the latest with the first part)."""
        endless = False

        def started(status: str, headers: list[tuple[str, str]], *more: Any) -> Any:
            nonlocal endless
            endless = any(name.lower() == "content-type" and value.startswith(STREAM_TYPES) for name, value in headers)
            return start_response(status, headers, *more)

        with AppCode() as code:
            parts = self._app(environ, started)
        return Parts(parts, lambda: endless and self._over(), code)


class Parts:
    """What an app returned, until it is over."""

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
        """Close it as the server should (PEP 3333), though it may not have been begun."""
        if hasattr(self._parts, "close"):
            with self._code:
                self._parts.close()
