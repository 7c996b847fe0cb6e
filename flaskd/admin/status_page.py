"""The page for people at the admin listener's ``/``, and the JSON that its script reads once a second.

The page is one file, which is sent unchanged. Everything that it shows comes from the JSON, and its script inserts that
as text.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import re
import socket
from collections.abc import Iterable, Mapping
from importlib.resources import files
from typing import Any

from flaskd.ledger import InFlight
from flaskd.process.usage import resident
from flaskd.snapshot import Snapshot
from flaskd.sockets import Listener

_MOST_REQUESTS = 50
"""How many requests in flight the page lists, the oldest first; it also shows the number of all."""
_LONGEST_TRACE = 8000
"""How many characters of a traceback the page shows: the last ones, which have the fault."""

SAFE = [
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Referrer-Policy", "no-referrer"),
    ("X-Frame-Options", "DENY"),
]
"""Headers with which a browser lets no other site read or frame the answer, and sends no Referer."""


class StatusPage:
    """The page, read once from its file, and the policy that lets a browser run only what is in it (CSP, level 3)."""

    def __init__(self) -> None:
        self.body = files("flaskd.admin").joinpath("status_page.html").read_bytes()
        self.headers = [*SAFE, ("Vary", "Accept"), ("Content-Security-Policy", _policy(self.body))]


def _policy(page: bytes) -> str:
    [style] = re.findall(rb"<style>(.*?)</style>", page, re.DOTALL)
    [script] = re.findall(rb"<script>(.*?)</script>", page, re.DOTALL)
    return "; ".join([
        "default-src 'none'", f"script-src {_hash(script)}", f"style-src {_hash(style)}", "connect-src 'self'",
        "img-src data:", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
        # In browsers that support it, a script that inserts text as HTML fails.
        "require-trusted-types-for 'script'", "trusted-types 'none'",
    ])  # fmt: skip


def _hash(content: bytes) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}'"


def wants_page(accept: str) -> bool:
    """Whether an Accept header names HTML (RFC 9110 §12.5.1): browsers' headers do, and curl's ``*/*`` does not."""
    for each in accept.lower().split(","):
        kind, *parameters = (part.strip() for part in each.split(";"))
        if kind == "text/html":
            return not any(re.fullmatch(r"q=0(\.0*)?", parameter) for parameter in parameters)
    return False


def is_foreign(environ: Mapping[str, Any], *, page: bool) -> bool:
    """Whether a browser sends the request for another site (Fetch Metadata); such a request is refused.

    A link to the `page` may stand on any site, because only the user who follows it sees the page.
    """
    site = environ.get("HTTP_SEC_FETCH_SITE", "same-origin")
    if page and environ.get("HTTP_SEC_FETCH_MODE") == "navigate" and environ.get("HTTP_SEC_FETCH_DEST") == "document":
        return False
    return site not in {"same-origin", "none"}


def own_ports(listeners: Iterable[Listener]) -> set[str]:
    """The ports and Unix paths that only this machine can reach, as SERVER_PORT has them."""
    found: dict[str, bool] = {}
    for listener in listeners:
        sock, path = listener.socket, listener.address.path
        own = sock.family == socket.AF_UNIX or ipaddress.ip_address(sock.getsockname()[0].partition("%")[0]).is_loopback
        port = path or str(sock.getsockname()[1])
        found[port] = found.get(port, True) and own
    return {port for port, own in found.items() if own}


def page_data(now: Snapshot, *, details: bool) -> dict[str, Any]:
    """The data that the page shows of one moment; `details` adds clients' addresses and the app's traceback."""
    serving = now.serving
    oldest = serving.requests[:_MOST_REQUESTS]
    return {
        "status": now.as_json(),
        "requests": [_request(each, details=details) for each in oldest],
        "workers": [{**each, "memory": resident(each["pid"])} for each in serving.workers],
        "steps": serving.steps,
        "trace": now.counts.trace[-_LONGEST_TRACE:] if details else "",
        "details": details,
    }


def _request(request: InFlight, *, details: bool) -> dict[str, Any]:
    """A request without its stack: the page never shows stacks."""
    told = request.as_json()
    keys = ("id", "method", "path", "age", "phase", "thread", "sent", "gone", "worker", "request_id")
    return {key: told[key] for key in (*keys, *(("client",) if details else ())) if key in told}
