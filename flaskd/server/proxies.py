"""Which proxies' headers are trusted; from all other peers, these headers are removed before the app sees them.

Waitress' middleware reads and removes the headers. It knows a single trusted address, so which peers are trusted is
decided here.
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
"""Trusted if `trusted_proxy_headers` is not set: every proxy sets these, and none passes them on from a client."""
_HEADERS = tuple(f"HTTP_{name}" for name in sorted(PROXY_HEADERS))
_LOCAL = ("127.0.0.0/8", "::1")
"""The networks that `localhost` means, beside the peers on a Unix socket, for which Waitress uses that name."""
_MOST = 200
"""Most objects that are searched for middleware."""
_LONGEST = 100
"""Most characters of a client's address that are shown; a proxy may pass on anything that a client sent."""
_silent = logging.Logger(__name__, logging.CRITICAL + 1)  # noqa: LOG001 - outside of the tree of loggers, so it writes nothing
"""A silent logger: Waitress itself logs what is wrong with a header, when the app is called."""


class BehindProxies:
    """A WSGI app around the app: it applies the headers of `server.trusted_proxy`, and removes those of other peers."""

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
        if environ.keys().isdisjoint(_HEADERS):  # nothing to apply or to remove
            app = self._app
            plain: Iterable[bytes] = app(environ, start_response)
            return plain
        chosen = self._believing if self._trusted(environ["REMOTE_ADDR"]) else self._doubting
        answer: Iterable[bytes] = chosen(environ, start_response)
        return answer

    def client(self, peer: str, headers: Mapping[str, str]) -> str:
        """The client's address for the log, as the app gets it; empty if `peer` is not trusted or does not give it.

        `headers` are those of a request, by their names in an environ; the app may never see that request.
        """
        if not self._trusted(peer):
            return ""
        environ = {name: headers[name] for name in _HEADERS if name in headers}
        environ |= {"REMOTE_ADDR": "", "wsgi.url_scheme": "http"}
        try:
            parse_proxy_headers(environ, **self._told, logger=_silent)
        except MalformedProxyHeader:  # answered with 400
            return ""
        address = environ["REMOTE_ADDR"]
        return visible(address[:_LONGEST]) if address else ""

    def ids(self, peer: str, headers: Mapping[str, str]) -> Ids:
        """The ids that `peer` gave a request in these headers; none if it is not trusted."""
        return read_ids(headers) if self._trusted(peer) else NO_IDS


def _believed(server: ServerConfig) -> frozenset[str]:
    return frozenset(server.trusted_proxy_headers) or _USUAL


def peers(trusted: Sequence[str]) -> Callable[[str], bool]:
    """Make a function that tells whether a peer's address, as Waitress has it, is among the `trusted` ones."""
    everybody, local = "*" in trusted, "localhost" in trusted
    named = [each for each in trusted if each not in {"*", "localhost"}]
    networks = [ipaddress.ip_network(each) for each in (*named, *(_LOCAL if local else ()))]

    @functools.lru_cache(maxsize=1024)
    def contains(peer: str) -> bool:
        if everybody:
            return True
        try:
            address = ipaddress.ip_address(peer.partition("%")[0])  # without the interface of a link-local address
        except ValueError:  # a peer on a Unix socket
            return local
        # A listener for both families shows IPv4 addresses as IPv6 ones, such as ::ffff:192.0.2.1 (ipv6(7)).
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        return any(address in network or (mapped and mapped in network) for network in networks)

    return contains


def missed_by_proxy_fix(app: object, server: ServerConfig) -> str:
    """Advice if flaskd removes headers that Werkzeug's ProxyFix in the app reads; empty if it removes none."""
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
    return f"the app's ProxyFix never sees {', '.join(missed)}, which flaskd removes: {key}"


def _within(app: object) -> Iterator[object]:
    """The app, and the callables inside of it: those that middleware holds in attributes and closures."""
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
            with contextlib.suppress(ValueError):  # the cell is empty
                yield cell.cell_contents
    with contextlib.suppress(AttributeError):
        yield from object.__getattribute__(thing, "__dict__").copy().values()  # runs no code of the app's
