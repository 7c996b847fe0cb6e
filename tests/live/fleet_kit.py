"""Several flaskds behind a balancer."""

from __future__ import annotations

import socket
from contextlib import suppress

from patience import PATIENCE


def agent_says(address: str) -> str:
    """The line that an agent has for who connects now; empty when nobody listens there."""
    host, _, port = address.rpartition(":")
    with suppress(ConnectionRefusedError), socket.create_connection((host, int(port)), PATIENCE) as client:
        return b"".join(iter(lambda: client.recv(100), b"")).decode().rstrip("\n")
    return ""
