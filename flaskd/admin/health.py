"""The admin listener: liveness, readiness, metrics and status, and a page for people that shows the status.

It has a thread of its own, which answers every request itself: a probe is answered even if all threads of the app are
stuck.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import re
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, Protocol

from flaskd.admin.metrics import Exporter, exporter
from flaskd.admin.page import send_page
from flaskd.admin.status_page import SAFE, StatusPage, is_foreign, own_ports, page_data, wants_page
from flaskd.server import Pushed, WaitressThread
from flaskd.snapshot import Snapshot
from flaskd.sockets import Address, Listener

log = logging.getLogger("flaskd.admin")

_LIMITS = {
    "connection_limit": 128,
    "channel_timeout": 10,
    "cleanup_interval": 2,
    "max_request_body_size": 1024,
    "max_request_header_size": 16 * 1024,
    # Only few pipelined requests are read at once: all of their answers fit into waitress' output buffer.
    "recv_bytes": 2048,
    "ident": "flaskd",
}
_BACKLOG = 128
_PATIENCE = 10.0
"""How many seconds a client has to send a request."""
_MOST_STREAMS = 8
"""How many pages may have a stream of events; further pages ask for the data at intervals."""
_EVERY = 1.0
"""Seconds between two events of a stream."""
_CLOSING = 0.2
"""How many seconds running answers have when the listener closes."""

Headers = list[tuple[str, str]]
Answer = tuple[str, str, bytes | Pushed, Headers]
"""Status, content type, body, further headers."""


class Source(Protocol):
    """What the listener reports about: the daemon. Every method returns at once."""

    def readiness(self) -> tuple[str, str]:
        """A status line and a word that say whether new requests are welcome."""

    @property
    def wedged(self) -> str:
        """Why flaskd is not alive any more; empty if it is."""

    def snapshot(self) -> Snapshot:
        """The daemon's whole status at this moment."""


class AdminServer:
    """Answers on the admin listeners from `open` to `close`; does nothing without listeners."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._server: WaitressThread | None = None

    def open(self, listeners: Sequence[Listener], allowed_hosts: Iterable[str], *, details: bool = False) -> None:
        """Listen and answer; with `details` all addresses show clients' addresses. Raises CannotCreateError."""
        if not listeners:
            return
        exports: Exporter | None = None
        try:
            exports = exporter(self._source.snapshot)
        except ImportError:
            log.info(f"admin: /metrics answers 501: {_NO_METRICS}")
        self._server = WaitressThread(
            AdminApp(self._source, exports, allowed_hosts, None if details else own_ports(listeners)),
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
        """The addresses on which it answers."""
        return [listener.address for listener in self._server.listeners] if self._server else []

    def close(self) -> None:
        """Free the addresses; a second call does nothing."""
        server, self._server = self._server, None
        if server is not None:
            server.stop(_CLOSING)


_NO_METRICS = "prometheus_client is not installed; pip install 'flaskd[metrics]'"


class AdminApp:
    """The pages, as a WSGI app that never waits.

    Every client that can connect may ask for ``/livez`` and ``/readyz``. The others tell more, so web pages of other
    sites must not read them. Therefore over TCP the Host must be an address, localhost or one of `allowed_hosts`
    (``*``: any), which stops names that were made to lead here (DNS rebinding); and a request that a browser sends for
    another site is refused.

    Clients' addresses are shown on `own_ports` only; None: on all.
    """

    def __init__(
        self,
        source: Source,
        metrics: Exporter | None,
        allowed_hosts: Iterable[str],
        own_ports: Collection[str] | None = (),
    ) -> None:
        self._source = source
        self._metrics = metrics
        self._hosts = {host.lower() for host in allowed_hosts}
        self._own_ports = own_ports
        self._page = StatusPage()
        self._streams: list[Pushed] = []
        self._made: dict[str, tuple[float, bytes]] = {}
        self._open_to_all = {"/livez": self._livez, "/readyz": self._readyz}
        self._pages: dict[str, Callable[[dict[str, Any]], Answer]] = {
            **self._open_to_all, "/metrics": self._prometheus, "/status.json": self._status,
            "/page.json": self._page_json, "/events": self._events, "/": self._index,
        }  # fmt: skip

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Answer one request."""
        path, method = environ.get("PATH_INFO", ""), environ["REQUEST_METHOD"]
        page = self._pages.get(path)
        if page is None:
            answer = _text("404 Not Found", f"not found; there are {', '.join(self._pages)}")
        elif method not in {"GET", "HEAD"}:
            answer = _text("405 Method Not Allowed", f"cannot {method[:16]}: expected GET or HEAD")
            answer[3].append(("Allow", "GET, HEAD"))
        elif path in self._open_to_all:
            answer = page(environ)
        elif not self._host_is_allowed(environ):
            host = environ.get("HTTP_HOST", "")[:200]
            answer = _text(
                "421 Misdirected Request",
                f'expected an address or localhost as the Host, got "{host}"; allow it with admin.allowed_hosts',
            )
        elif is_foreign(environ, page=path == "/"):
            answer = _text("403 Forbidden", "cannot tell another site: open this address itself", SAFE)
        else:
            answer = page(environ)
        return send_page(environ, start_response, answer)

    def _host_is_allowed(self, environ: dict[str, Any]) -> bool:
        host = _without_port(environ.get("HTTP_HOST", ""))
        # A browser cannot connect to a Unix socket, and an HTTP/1.0 client without a Host header is no browser.
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
        return _json(self._source.snapshot().as_json())

    def _page_json(self, environ: dict[str, Any]) -> Answer:
        return _json(self._page_data(environ["SERVER_PORT"]))

    def _page_data(self, port: str) -> dict[str, Any]:
        details = self._own_ports is None or port in self._own_ports
        return page_data(self._source.snapshot(), details=details)

    def _events(self, environ: dict[str, Any]) -> Answer:
        """The data of the page once a second, as server-sent events (HTML, §9.2); the loop writes them."""
        self._streams = [each for each in self._streams if each.open]
        if len(self._streams) >= _MOST_STREAMS:
            why = f"cannot open one more stream: {_MOST_STREAMS} are open; ask for /page.json"
            return _text("503 Service Unavailable", why, [*SAFE, ("Retry-After", "2")])
        port = environ["SERVER_PORT"]
        stream = Pushed(lambda: self._event(port), _EVERY)
        if environ["REQUEST_METHOD"] == "GET":
            self._streams.append(stream)
        return "200 OK", "text/event-stream", stream, SAFE

    def _event(self, port: str) -> bytes:
        """One event; streams of the same port that ask within half of `_EVERY` get the same one."""
        now = time.monotonic()
        made, event = self._made.get(port, (-_EVERY, b""))
        if now - made > _EVERY / 2:
            event = b"data: %b\n\n" % _dumped(self._page_data(port))
            self._made[port] = now, event
        return event

    def _prometheus(self, environ: dict[str, Any]) -> Answer:
        if self._metrics is None:
            return _text("501 Not Implemented", f"no metrics: {_NO_METRICS}")
        body, kind = self._metrics(environ.get("HTTP_ACCEPT", ""))
        return "200 OK", kind, body, SAFE

    def _index(self, environ: dict[str, Any]) -> Answer:
        if wants_page(environ.get("HTTP_ACCEPT", "")):
            return "200 OK", "text/html; charset=utf-8", self._page.body, self._page.headers
        shown = "\n".join(page for page in self._pages if page not in {"/", "/page.json", "/events"})
        return _text("200 OK", shown, [*SAFE, ("Vary", "Accept")])


def _without_port(host: str) -> str:
    return re.sub(r":[0-9]*$", "", host).lower() if not host.endswith("]") else host.lower()


def _text(status: str, text: str, headers: Headers | None = None) -> Answer:
    body = f"{text}\n".encode("utf-8", "backslashreplace")
    return status, "text/plain; charset=utf-8", body, list(headers or ())


def _json(told: dict[str, Any]) -> Answer:
    return "200 OK", "application/json", _dumped(told) + b"\n", SAFE


def _dumped(told: dict[str, Any]) -> bytes:
    return json.dumps(told, default=str).encode()
