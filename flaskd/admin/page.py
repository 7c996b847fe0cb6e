"""Sends flaskd's own answers: those of the admin listener and of the shutdown endpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from flaskd.server import Pushed

Page = tuple[str, str, bytes | Pushed, list[tuple[str, str]]]
"""Status line, content type, body, further headers."""


def send_page(environ: dict[str, Any], start_response: Callable[..., Any], page: Page) -> Iterable[bytes]:
    """Answer one request (PEP 3333). Headers forbid to cache it or to guess its type; HEAD gets no body."""
    status, kind, body, more = page
    headers = [
        ("Content-Type", kind),
        *([("Content-Length", str(len(body)))] if isinstance(body, bytes) else []),
        ("Cache-Control", "no-store"),
        ("X-Content-Type-Options", "nosniff"),
        *more,
    ]
    start_response(status, headers)
    if environ["REQUEST_METHOD"] == "HEAD":
        return []
    return [body] if isinstance(body, bytes) else body
