"""Clients that attack a server; run as a process of its own.

``python _attackers.py ORDERS`` takes its orders as JSON. It writes a line to standard output when all clients are
connected and have sent their beginning, goes on until its standard input ends, and then writes how many connections the
server has ended. Each ended connection is made again at once.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from _wire import from_own_address

_PATIENCE = 20.0
"""Seconds that a connection may take."""
_LITTLE = 4096
"""SO_RCVBUF of a client that reads nothing, in bytes."""


@dataclass(frozen=True)
class Attack:
    """A number of clients that send `first`, and then `more` once a second; clients without `more` read nothing."""

    name: str
    text: str
    clients: int
    first: bytes
    more: bytes = b""


ATTACKS = [
    Attack("heads", "200 slow heads", 200, b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Slow: ", b"x"),
    Attack(
        "bodies",
        "200 slow bodies",
        200,
        b"POST /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n",
        b"x",
    ),
    Attack("readers", "64 that read nothing of 10 MB", 64, b"GET /big?mib=10 HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    Attack("idle", "1000 that say nothing", 1000, b""),
]


class Attackers:
    """The clients of an attack in a process of their own; all are connected when the context is entered."""

    def __init__(self, address: tuple[str, int], attack: Attack) -> None:
        orders = {"host": address[0], "port": address[1], "attack": attack.name}
        argv = [sys.executable, __file__, json.dumps(orders)]
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.ended = 0
        """How many connections the server has ended; known afterwards."""

    def __enter__(self) -> Self:
        assert self._process.stdout is not None
        if not self._process.stdout.readline():
            self._process.communicate()
            raise ConnectionError("the attackers cannot connect")
        return self

    def __exit__(self, *_: object) -> None:
        out, _err = self._process.communicate(timeout=_PATIENCE)
        self.ended = int(out or 0)


class _Clients:
    """All clients, in one loop."""

    def __init__(self, address: tuple[str, int], attack: Attack) -> None:
        self._address, self._attack = address, attack
        self._sockets: dict[int, socket.socket] = {}
        self._poll = select.poll()
        self.ended = 0

    def connect(self) -> None:
        """Connect one client, and send its beginning."""
        each = socket.socket()
        each.settimeout(_PATIENCE)
        if not self._attack.more:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _LITTLE)
        from_own_address(each)
        each.connect(self._address)
        each.sendall(self._attack.first)
        each.setblocking(False)
        self._sockets[each.fileno()] = each
        # A client that reads nothing does not read the server's answer, but notices when the server closes.
        self._poll.register(each, select.POLLIN if self._attack.more else select.POLLRDHUP)

    def go_on(self, until: float) -> None:
        """Until a moment, make connections again that the server has ended."""
        while (left := until - time.monotonic()) > 0:
            for fd, _ in self._poll.poll(left * 1000):
                if self._over(self._sockets[fd]):
                    self._poll.unregister(fd)
                    self._sockets.pop(fd).close()
                    self.ended += 1
                    self.connect()

    def _over(self, each: socket.socket) -> bool:
        """Whether the server has ended the connection; reads what the server sends if the client sends more."""
        if not self._attack.more:
            return True
        try:
            return not each.recv(65536)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def send(self) -> None:
        """Send the next byte on each connection."""
        for each in self._sockets.values():
            with contextlib.suppress(OSError):  # reading notices the end
                each.send(self._attack.more)

    def close(self) -> None:
        """Close all connections."""
        for each in self._sockets.values():
            each.close()


def main(arguments: Sequence[str]) -> None:
    """Carry out the orders."""
    orders: dict[str, Any] = json.loads(arguments[0])
    attack = next(each for each in ATTACKS if each.name == orders["attack"])
    clients = _Clients((orders["host"], orders["port"]), attack)
    for _ in range(attack.clients):
        clients.connect()
    print(flush=True)
    while not select.select([sys.stdin], [], [], 0)[0]:
        for _ in range(10):  # so that the end of standard input is noticed soon
            clients.go_on(time.monotonic() + 0.1)
            if select.select([sys.stdin], [], [], 0)[0]:
                break
        else:
            clients.send()
    clients.close()
    print(clients.ended, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
