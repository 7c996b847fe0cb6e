"""Which daemon the shutdown endpoints of this process stop. Few apps have one, so the endpoint is imported late."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from flaskd.sockets import Address

if TYPE_CHECKING:
    from flaskd.admin.endpoint.server import EndpointServer

Opener = Callable[[Address, bytes, Sequence[str]], "EndpointServer"]
"""Opens an endpoint that stops the daemon of this process."""


class HandedOver(Protocol):
    """The part of a `flaskd.admin.endpoint.shutdown.ShutdownEndpoint` that is needed here."""

    def hand_over(self, opener: Opener) -> None:
        """Close, and have `opener` open an endpoint in its place."""


openers: list[Opener] = []
endpoints: list[HandedOver] = []
"""The open endpoints."""


@contextlib.contextmanager
def opened_by(opener: Opener) -> Iterator[None]:
    """As long as this is open, the endpoints of this process stop the daemon that `opener` belongs to.

    Endpoints that are open already are handed over to `opener`; what it raises for them is raised here.
    """
    for endpoint in endpoints.copy():
        endpoint.hand_over(opener)
    openers.append(opener)
    try:
        yield
    finally:
        openers.remove(opener)
