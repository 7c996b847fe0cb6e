"""The configuration's ``server`` section, translated to waitress' settings (waitress.adjustments.Adjustments)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flaskd.server.limits import Limits

if TYPE_CHECKING:
    from flaskd.config import ServerConfig

_RESERVED_FILES = 128
"""Open files that connections may not use: for the app, listeners and control clients."""


def most_connections(open_files: int) -> int:
    """How many connections are allowed if the process may have `open_files` descriptors."""
    return max(16, open_files - _RESERVED_FILES)


def limits(server: ServerConfig) -> Limits:
    """The limits of requests, from the configuration."""
    return Limits(
        server.request_timeout,
        server.request_timeouts,
        server.queue_timeout,
        server.max_queue,
        server.head_timeout,
        server.min_rate,
    )


def adjustments(server: ServerConfig, open_files: int) -> dict[str, Any]:
    """Waitress' settings; `open_files` is the process' limit of descriptors, which bounds the connections."""
    most = most_connections(open_files)
    return {
        "connection_limit": min(most, server.connection_limit or most),
        "url_scheme": server.url_scheme,
        "url_prefix": server.url_prefix,
        "max_request_body_size": server.max_request_body_size,
        "max_request_header_size": server.max_request_header_size,
        "channel_timeout": max(1, round(server.channel_timeout)),
        "outbuf_high_watermark": server.outbuf_high_watermark,
        "backlog": server.backlog,
        "ident": server.ident,
        "clear_untrusted_proxy_headers": False,  # flaskd.server.proxies does this
    }
