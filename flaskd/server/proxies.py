"""The proxies whose headers are believed; the headers of everybody else are taken out before the app sees them.

Waitress' own middleware reads and takes out; which peers it believes is decided here, because it compares one address.
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import logging
import sys
import types
from typing import TYPE_CHECKING, Any

from waitress.proxy_headers import PROXY_HEADERS, MalformedProxyHeader, parse_proxy_headers, proxy_headers_middleware

from flaskd.ledger import visible
from flaskd.server.request_ids import NO_IDS, Ids, read_ids

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from flaskd.config import ServerConfig

_USUAL = frozenset({"x-forwarded-for", "x-forwarded-proto"})
"""Believed when a trusted proxy is named without headers: what every proxy sets, and none passes on from a client."""
_HEADERS = tuple(f"HTTP_{name}" for name in sorted(PROXY_HEADERS))
_LOCAL = ("127.0.0.0/8", "::1")
"""What `localhost` stands for, beside the peers on a Unix socket, which Waitress calls so."""
_MOST = 200
"""Objects in which middleware is looked for."""
_LONGEST = 100
"""Characters of an address that are shown; a proxy may pass on whatever a client sent."""
_nobody = logging.Logger(__name__, logging.CRITICAL + 1)  # noqa: LOG001 - outside of the tree, where it is never heard
"""Waitress says in its own log what is wrong with a header, when the app is asked."""


class BehindProxies:
    """The app as clients reach it: with what `server.trusted_proxy` says of them, without what all others say."""

    def __init__(self, app: Callable[..., Any], server: ServerConfig) -> None:
        self._trusted = peers(server.trusted_proxy)
        self._told = {
            "trusted_proxy_count": server.trusted_proxy_count or 1,
            "trusted_proxy_headers": _believed(server),
        }
        self._app = app
        self._doubting: Callable[..., Any] = proxy_headers_middleware(app)
        self._believing: Callable[..., Any] = proxy_headers_middleware(app, trusted_proxy="*", **self._told)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Run the app."""
        if environ.keys().isdisjoint(_HEADERS):  # nothing to believe or to take out
            plain: Iterable[bytes] = self._app(environ, start_response)
            return plain
        chosen = self._believing if self._trusted(environ["REMOTE_ADDR"]) else self._doubting
        answer: Iterable[bytes] = chosen(environ, start_response)
        return answer

    def client(self, peer: str, headers: Mapping[str, str]) -> str:
        """The client's address, as the app is told it; empty where `peer` says nothing of it, or is not believed.

        `headers` are a request's, by their names in an environ. For the log: of requests that the app never sees, too.
        """
        if not self._trusted(peer):
            return ""
        environ = {name: headers[name] for name in _HEADERS if name in headers}
        environ |= {"REMOTE_ADDR": "", "wsgi.url_scheme": "http"}
        try:
            parse_proxy_headers(environ, **self._told, logger=_nobody)
        except MalformedProxyHeader:  # answered with 400
            return ""
        address = environ["REMOTE_ADDR"]
        return visible(address[:_LONGEST]) if address else ""

    def ids(self, peer: str, headers: Mapping[str, str]) -> Ids:
        """What `peer` calls a request that has these headers; nothing where it is not believed."""
        return read_ids(headers) if self._trusted(peer) else NO_IDS


def _believed(server: ServerConfig) -> frozenset[str]:
    return frozenset(server.trusted_proxy_headers) or _USUAL


def peers(trusted: Sequence[str]) -> Callable[[str], bool]:
    """What tells whether a peer's address, as Waitress has it, is one of those that `server.trusted_proxy` names."""
    everybody, local = "*" in trusted, "localhost" in trusted
    named = [each for each in trusted if each not in {"*", "localhost"}]
    networks = [ipaddress.ip_network(each) for each in (*named, *(_LOCAL if local else ()))]

    @functools.lru_cache(maxsize=1024)
    def contains(peer: str) -> bool:
        if everybody:
            return True
        try:
            address = ipaddress.ip_address(peer.partition("%")[0])  # without the interface of a link-local address
        except ValueError:  # a Unix socket's
            return local
        # A listener for both families shows IPv4 addresses within IPv6 ones (ipv6(7)).
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        return any(address in network or (mapped and mapped in network) for network in networks)

    return contains


def missed_by_proxy_fix(app: object, server: ServerConfig) -> str:
    """What to do so that Werkzeug's ProxyFix in the app sees the headers it is there for; empty when it does."""
    if (module := sys.modules.get("werkzeug.middleware.proxy_fix")) is None:
        return ""
    kind: type[Any] = module.ProxyFix
    reads = {"x-forwarded-for": "x_for", "x-forwarded-proto": "x_proto",
             "x-forwarded-host": "x_host", "x-forwarded-port": "x_port"}  # fmt: skip
    found = [each for each in _within(app) if issubclass(type(each), kind)]
    wanted = {header for header, field in reads.items() if any(getattr(each, field, 0) for each in found)}
    missed = sorted(wanted - _believed(server)) if server.trusted_proxy else sorted(wanted)
    if not missed:
        return ""
    key = (
        "set server.trusted_proxy_headers to all that your proxy sets"
        if server.trusted_proxy
        else "set server.trusted_proxy to the address of your proxy"
    )
    return f"the app's ProxyFix never sees {', '.join(missed)}, which flaskd takes out: {key}"


def _within(app: object) -> Iterator[object]:
    """The app, and the callables that it is made of: what middleware wraps, in attributes and closures."""
    queue, seen = [app], set[int]()
    while queue and len(seen) < _MOST:
        here = queue.pop(0)
        if id(here) in seen or not callable(here):
            continue
        seen.add(id(here))
        yield here
        queue += _held(here)


def _held(thing: object) -> Iterator[object]:
    if isinstance(thing, types.MethodType):
        yield thing.__self__
    if isinstance(thing, types.FunctionType):
        for cell in thing.__closure__ or ():
            with contextlib.suppress(ValueError):  # not filled yet
                yield cell.cell_contents
    with contextlib.suppress(AttributeError):
        yield from object.__getattribute__(thing, "__dict__").copy().values()  # runs no code of the app's
