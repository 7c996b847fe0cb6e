"""How flaskd's own pages are answered: those of the admin listener, and the shutdown endpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Page = tuple[str, str, bytes, list[tuple[str, str]]]
"""Status line, content type, body, further headers."""


def send_page(environ: dict[str, Any], start_response: Callable[..., Any], page: Page) -> list[bytes]:
    """Answer one request (PEP 3333): nothing keeps it, nothing takes it for another content type; HEAD gets no body."""
    status, kind, body, more = page
    headers = [
        ("Content-Type", kind),
        ("Content-Length", str(len(body))),
        ("Cache-Control", "no-store"),
        ("X-Content-Type-Options", "nosniff"),
        *more,
    ]
    start_response(status, headers)
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]
