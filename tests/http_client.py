"""An HTTP client for tests: one request per connection, in the calling thread or in one of its own."""

import contextlib
import http.client
import socket
import threading
from collections.abc import Mapping
from typing import Any

from patience import PATIENCE

Page = tuple[int, bytes]
"""Status and body of an answer."""


def ask(
    url: str, path: str = "/", method: str = "GET", body: bytes | None = None, headers: Mapping[str, str] | None = None
) -> Page:
    """Make one request; `url` is http://host:port/ or unix:/path."""
    host = url.removeprefix("http://").rstrip("/")
    connection = http.client.HTTPConnection("localhost" if url.startswith("unix:") else host, timeout=PATIENCE)
    with contextlib.closing(connection):
        if url.startswith("unix:"):
            connection.sock = socket.socket(socket.AF_UNIX)
            connection.sock.connect(url.removeprefix("unix:"))
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, response.read()


def get(url: str, path: str = "/", **headers: str) -> Page:
    """GET a path."""
    return ask(url, path, headers=headers)


def outcome(
    url: str, path: str = "/", method: str = "GET", body: bytes | None = None
) -> Page | OSError | http.client.HTTPException:
    """The result of a request: the answer, or the error."""
    try:
        return ask(url, path, method, body)
    except (OSError, http.client.HTTPException) as error:
        return error


class Answer(threading.Thread):
    """A GET made in a thread; its result is that of `outcome`."""

    def __init__(self, url: str, path: str) -> None:
        super().__init__(daemon=True)
        self._url, self._path = url, path
        self.start()

    def run(self) -> None:
        self._outcome = outcome(self._url, self._path)

    def result(self) -> Any:
        """Wait for the result; most tests know whether it is an answer or an error."""
        self.join(PATIENCE)
        assert not self.is_alive(), f"no answer to {self._path}"
        return self._outcome


def place_of(url: str) -> tuple[str, int]:
    """The host and the port of a URL."""
    host, _, port = url.removeprefix("http://").rstrip("/").rpartition(":")
    return host.strip("[]"), int(port)


def connect(url: str) -> socket.socket:
    """A connection to the URL's place, for what is no complete request."""
    return socket.create_connection(place_of(url), timeout=PATIENCE)


def refused(url: str) -> bool:
    """Whether connecting to the URL is refused."""
    try:
        connect(url).close()
    except ConnectionRefusedError:
        return True
    return False
