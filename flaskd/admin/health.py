"""The admin listener: whether flaskd lives and is ready, what it counts and does, on addresses of its own.

Its thread is its own, too, and answers every request itself: it waits for no worker of the app, so a probe is
answered when all of them are stuck.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from flaskd.admin.metrics import Exporter, exporter
from flaskd.admin.page import send_page
from flaskd.server import WaitressThread
from flaskd.snapshot import Snapshot
from flaskd.sockets import Address, Listener

log = logging.getLogger("flaskd.admin")

_LIMITS = {
    "connection_limit": 128,
    "channel_timeout": 10,
    "cleanup_interval": 2,
    "max_request_body_size": 1024,
    "max_request_header_size": 16 * 1024,
    # Few pipelined requests at once: their answers together stay far below what waitress would wait for to be read.
    "recv_bytes": 2048,
    "ident": "flaskd",
}
_BACKLOG = 128
_PATIENCE = 10.0
"""Seconds that a client has for a request, however slowly it goes on with it."""
_CLOSING = 0.2
"""Seconds that answers under way get at the end."""

Answer = tuple[str, str, bytes]
"""Status, content type, body."""


class Source(Protocol):
    """What is told of: the daemon. Every method returns at once."""

    def readiness(self) -> tuple[str, str]:
        """A status line, and a word: whether new requests are welcome."""

    @property
    def wedged(self) -> str:
        """Why it does not live any more; empty while it does."""

    def snapshot(self) -> Snapshot:
        """What there is to know."""


class AdminServer:
    """Answers on the admin listeners from `open` to `close`; without listeners it does nothing."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._server: WaitressThread | None = None

    def open(self, listeners: Sequence[Listener], allowed_hosts: Iterable[str]) -> None:
        """Listen and answer. Raises CannotCreateError."""
        if not listeners:
            return
        exports: Exporter | None = None
        try:
            exports = exporter(self._source.snapshot)
        except ImportError:
            log.info(f"admin: /metrics answers 501: {_NO_METRICS}")
        self._server = WaitressThread(
            AdminApp(self._source, exports, allowed_hosts),
            threads=0,
            listeners=listeners,
            adjustments=_LIMITS,
            backlog=_BACKLOG,
            keepalive_grace=0.0,
            patience=_PATIENCE,
            fixed_limits=True,
            reserved=True,
            name="flaskd-admin",
        ).start()

    @property
    def addresses(self) -> list[Address]:
        """Where it answers."""
        return [listener.address for listener in self._server.listeners] if self._server else []

    def close(self) -> None:
        """Give the addresses back; a second call does nothing."""
        server, self._server = self._server, None
        if server is not None:
            server.stop(_CLOSING)


_NO_METRICS = "prometheus_client is not installed; pip install 'flaskd[metrics]'"


class AdminApp:
    """The pages, as a WSGI app that never waits.

    ``/livez`` and ``/readyz`` are for everybody who can connect. The others tell more, so a page in a browser must not
    get at them under a name that was made to lead here (DNS rebinding): over TCP, their Host is an address, localhost
    or one of `allowed_hosts` (``*``: any).
    """

    def __init__(self, source: Source, metrics: Exporter | None, allowed_hosts: Iterable[str]) -> None:
        self._source = source
        self._metrics = metrics
        self._hosts = {host.lower() for host in allowed_hosts}
        self._open_to_all = {"/livez": self._livez, "/readyz": self._readyz}
        self._pages: dict[str, Callable[[dict[str, Any]], Answer]] = {
            **self._open_to_all, "/metrics": self._prometheus, "/status.json": self._status, "/": self._index,
        }  # fmt: skip

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        """Answer one request."""
        more: list[tuple[str, str]] = []
        path, method = environ.get("PATH_INFO", ""), environ["REQUEST_METHOD"]
        page = self._pages.get(path)
        if page is None:
            status, kind, body = _text("404 Not Found", f"not found; there are {', '.join(self._pages)}")
        elif method not in {"GET", "HEAD"}:
            status, kind, body = _text("405 Method Not Allowed", f"cannot {method[:16]}: expected GET or HEAD")
            more = [("Allow", "GET, HEAD")]
        elif path not in self._open_to_all and not self._host_is_allowed(environ):
            host = environ.get("HTTP_HOST", "")[:200]
            status, kind, body = _text(
                "421 Misdirected Request",
                f'expected an address or localhost as the Host, got "{host}"; allow it with admin.allowed_hosts',
            )
        else:
            status, kind, body = page(environ)
        return send_page(environ, start_response, (status, kind, body, more))

    def _host_is_allowed(self, environ: dict[str, Any]) -> bool:
        host = _without_port(environ.get("HTTP_HOST", ""))
        # A browser cannot connect to a Unix socket, and a client of HTTP/1.0 without a Host is none.
        if environ.get("REMOTE_PORT") == "None" or host in {"", "localhost"} or self._hosts & {host, "*"}:
            return True
        try:
            ipaddress.ip_address(host.strip("[]"))
        except ValueError:
            return False
        return True

    def _livez(self, _environ: dict[str, Any]) -> Answer:
        why = self._source.wedged
        return _text("503 Service Unavailable", why) if why else _text("200 OK", "alive")

    def _readyz(self, _environ: dict[str, Any]) -> Answer:
        return _text(*self._source.readiness())

    def _status(self, _environ: dict[str, Any]) -> Answer:
        return "200 OK", "application/json", json.dumps(self._source.snapshot().as_json(), default=str).encode() + b"\n"

    def _prometheus(self, environ: dict[str, Any]) -> Answer:
        if self._metrics is None:
            return _text("501 Not Implemented", f"no metrics: {_NO_METRICS}")
        body, kind = self._metrics(environ.get("HTTP_ACCEPT", ""))
        return "200 OK", kind, body

    def _index(self, _environ: dict[str, Any]) -> Answer:
        return _text("200 OK", "\n".join(page for page in self._pages if page != "/"))


def _without_port(host: str) -> str:
    return re.sub(r":[0-9]*$", "", host).lower() if not host.endswith("]") else host.lower()


def _text(status: str, text: str) -> Answer:
    return status, "text/plain; charset=utf-8", f"{text}\n".encode("utf-8", "backslashreplace")
