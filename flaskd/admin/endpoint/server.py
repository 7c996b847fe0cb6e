"""The endpoint's own listener: the rules, served by a bare server of one thread."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

from flaskd.admin.endpoint.rules import PATH, EndpointRules
from flaskd.background_work import in_background
from flaskd.server import WaitressThread
from flaskd.sockets import Address, Listener

log = logging.getLogger("flaskd.endpoint")

_ACCEPTED = 202
_LIMITS = {
    "ident": "",
    "connection_limit": 32,
    "max_request_body_size": 1024,
    "max_request_header_size": 8192,
    "channel_timeout": 10,
    "cleanup_interval": 2,
}
"""Limits against hostile clients (names of waitress.adjustments); times in seconds."""
_PATIENCE = 10.0
"""How many seconds a client has to send a whole request."""


class EndpointServer:
    """Serves the rules on `address`; `stop` is called with the peer once an accepted request has been answered.

    `plan` gives the content of the answer. Both are called in the server's threads.
    """

    def __init__(
        self,
        address: Address,
        token: bytes,
        *,
        allowed_hosts: Iterable[str] = (),
        plan: Callable[[], Mapping[str, Any]],
        stop: Callable[[str], None],
    ) -> None:
        self.address = address
        self._token, self._allowed_hosts = token, list(allowed_hosts)
        self._plan, self._stop = plan, stop
        self._server: WaitressThread | None = None
        self._listener: Listener | None = None

    def open(self) -> Self:
        """Bind, listen and answer; raises CannotCreateError if the address cannot be bound."""
        listener = Listener.bind(self.address)
        self.address = listener.address
        server = WaitressThread(
            EndpointRules(self._token, self._allowed_hosts or usual_hosts(self.address), self._plan),
            threads=1,
            listeners=[listener],
            adjustments=_LIMITS,
            keepalive_grace=0.0,
            patience=_PATIENCE,
            fixed_limits=True,
            reserved=True,
            on_answer=self._answered,
        ).start()
        server.announce()  # each connection closes after its answer
        self._listener, self._server = listener, server
        log.info(f"shutdown endpoint: POST {self.address.announced.removesuffix('/')}{PATH}")
        return self

    @property
    def url(self) -> str:
        """The URL to POST to."""
        return self.address.url.removesuffix("/") + PATH

    def _answered(self, fields: Mapping[str, Any]) -> None:
        """Begin the stop. By now the kernel has the whole answer, or the client has gone away."""
        if fields["status"] == _ACCEPTED:
            self._stop(fields["client"])

    def close(self, timeout: float) -> None:
        """Answer running requests within `timeout` seconds, and free the address; a second call does nothing."""
        server, self._server = self._server, None
        if server is None:
            return
        if in_background():  # this drain must not wait for the app's background work
            server.abandon()
        else:
            server.stop(timeout)

    def withdraw(self) -> None:
        """Remove the node of a Unix socket: the last call before an immediate exit."""
        if self._listener is not None:
            self._listener.withdraw()


def usual_hosts(address: Address) -> list[str]:
    """The Host headers that mean an address: itself, and this machine's names if it listens on a local address."""
    if address.path:
        return ["localhost"]
    host = f"[{address.host}]" if ":" in address.host else address.host
    names = {host}
    if host in {"localhost", "[::1]", "[::]", "0.0.0.0"} or host.startswith("127."):  # noqa: S104 - compared
        names |= {"localhost", "[::1]" if host.startswith("[") else "127.0.0.1"}
    names -= {"0.0.0.0", "[::]"}  # noqa: S104 - these mean "every address", and no client sends them
    hosts = [f"{name}:{address.port}" for name in sorted(names)]
    # A client leaves out the port if it is the default of the scheme: RFC 9110 §7.2.
    return hosts + (sorted(names) if address.port == 80 else [])  # noqa: PLR2004
