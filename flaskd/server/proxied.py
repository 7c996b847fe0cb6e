"""Whose request it is, where a trusted proxy says so."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from waitress.proxy_headers import PROXY_HEADERS, MalformedProxyHeader, parse_proxy_headers

from flaskd.ledger import visible

_LONGEST = 100
"""Characters of an address that are shown; a proxy may pass on whatever a client sent."""
_nobody = logging.Logger(__name__, logging.CRITICAL + 1)  # noqa: LOG001 - outside of the tree, where it is never heard
"""Waitress says in its own log what is wrong with a header, when the app is asked."""


def client_behind(proxy: str, headers: Mapping[str, str], adj: Any) -> str:
    """The client's address, as the app is told it (REMOTE_ADDR); empty where `proxy`, the peer, is not believed.

    `headers` are a request's as waitress keeps them, `adj` waitress' settings.
    """
    if not adj.trusted_proxy or adj.trusted_proxy not in {"*", proxy}:
        return ""
    environ = {f"HTTP_{name}": headers[name] for name in PROXY_HEADERS if name in headers}
    environ |= {"REMOTE_ADDR": "", "wsgi.url_scheme": adj.url_scheme}
    try:
        parse_proxy_headers(environ, adj.trusted_proxy_count, adj.trusted_proxy_headers, logger=_nobody)
    except MalformedProxyHeader:  # answered with 400
        return ""
    address = environ["REMOTE_ADDR"]
    return visible(address[:_LONGEST]) if address else ""
