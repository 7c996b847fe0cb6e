"""Plain connections for the benchmarks, and a load generator; run as a process of its own it is the latter.

``python _wire.py ORDERS`` takes its orders as JSON, and drives the server for some seconds: each connection sends its
next request after the answer to the former. It writes its counts as JSON to standard output. A request takes it some
15 µs of CPU, which is little compared with the servers, but much more than ``wrk`` takes, which `speed.py` prefers.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, Self

PATIENCE = 60.0
"""Seconds of silence after which a connection counts as lost."""
_RECEIVE = 1 << 18
_SHORT = 1024
"""The body of an answer of at most this many bytes is kept."""


def request(target: str, body: bytes = b"", *, host: str = "localhost", headers: Sequence[str] = ()) -> bytes:
    """One request, with further headers; with a body it is a POST."""
    lines = [f"{'POST' if body else 'GET'} {target} HTTP/1.1", f"Host: {host}", *headers]
    if body:
        lines.append(f"Content-Length: {len(body)}")
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode() + body


_IP_BIND_ADDRESS_NO_PORT = 24
"""The port is chosen when the socket connects, and may be in use for another address (ip(7), Linux 4.2)."""
_SOURCE = f"127.{1 + os.getpid() % 250}.{os.getpid() // 250 % 250}.1"


def from_own_address(sock: socket.socket) -> None:
    """Bind a socket to an address of this process, because thousands of connections use up an address' ports.

    They stay used for a minute (TIME_WAIT), and other programs need ports, too.
    """
    sock.setsockopt(socket.IPPROTO_IP, _IP_BIND_ADDRESS_NO_PORT, 1)
    sock.bind((_SOURCE, 0))


class Connection:
    """One connection, and the answer to its last request; `receive_buffer` is SO_RCVBUF in bytes."""

    def __init__(self, address: tuple[str, int], *, receive_buffer: int = 0) -> None:
        self.socket = socket.socket()
        self.socket.settimeout(PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if receive_buffer:  # before the handshake, which announces the window
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        try:
            from_own_address(self.socket)
            self.socket.connect(address)
        except BaseException:
            self.socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def ask(self, target: str) -> Self:
        """Send a request for `target`; a failure shows when the answer is read."""
        with contextlib.suppress(OSError):
            self.socket.sendall(request(target))
        return self

    def answered(self, *, pace: float = 0.0) -> bool:
        """Whether a 200 comes whole; `pace` is the pause between two reads in seconds."""
        head, wanted, status, got = b"", 0, b"", 0
        try:
            while not wanted or got < wanted:
                if not (data := self.socket.recv(65536)):
                    return False
                got += len(data)
                if not wanted:
                    head += data
                    status, wanted = _measured(head)
                if pace:
                    time.sleep(pace)
        except OSError:
            return False
        return status == b"200"


def _measured(head: bytes) -> tuple[bytes, int]:
    """The status of a response and its whole length; 0 until its head has come whole."""
    end = head.find(b"\r\n\r\n")
    if end < 0:
        return b"", 0
    for line in head[:end].split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return head.split(None, 2)[1], end + 4 + int(value)
    raise ValueError("cannot measure a response without Content-Length")


class Crowd:
    """Many connections that send nothing; after `follow`, each is closed when the server closes it, as clients do."""

    def __init__(self, address: tuple[str, int], count: int) -> None:
        self._sockets: dict[int, socket.socket] = {}
        self._epoll = select.epoll()
        self._leaving = threading.Event()
        self._began = time.monotonic()
        self._thread: threading.Thread | None = None
        try:
            for _ in range(count):
                each = socket.create_connection(address, timeout=PATIENCE)
                self._sockets[each.fileno()] = each
                self._epoll.register(each, select.EPOLLIN)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def age(self) -> float:
        """Seconds since the first connection began."""
        return time.monotonic() - self._began

    def follow(self) -> None:
        """From now on, close what the server closes."""
        self._thread = threading.Thread(target=self._follow)
        self._thread.start()

    def _follow(self) -> None:
        while self._sockets and not self._leaving.is_set():
            for fd, _ in self._epoll.poll(0.1):
                self._sockets.pop(fd).close()  # only the end can have come, because nothing was requested

    def close(self) -> None:
        """Close the remaining connections."""
        self._leaving.set()
        if self._thread is not None:
            self._thread.join()
        for each in self._sockets.values():
            each.close()
        self._epoll.close()


class Background:
    """Clients that request `target` all the time, on one connection each; all have an answer when it is entered."""

    def __init__(self, address: tuple[str, int], count: int, target: str) -> None:
        self._address, self._target = address, target
        self._leaving = threading.Event()
        self._first = [threading.Event() for _ in range(count)]
        self._threads = [threading.Thread(target=self._ask, args=(each,)) for each in self._first]
        self.answers: list[bool] = []

    def __enter__(self) -> Self:
        for each in self._threads:
            each.start()
        for first in self._first:
            first.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._leaving.set()
        for each in self._threads:
            each.join()

    def _ask(self, first: threading.Event) -> None:
        """Send one request after the other; when the server ends the connection, go on with a new one."""
        try:
            while not self._leaving.is_set():
                with Connection(self._address) as connection:
                    fine = True
                    while fine and not self._leaving.is_set():
                        fine = connection.ask(self._target).answered()
                        self.answers.append(fine)
                        first.set()
        except OSError:  # the server does not listen any more
            self.answers.append(False)
        finally:
            first.set()


class _Driven:
    """A connection of the generator: what is still to be sent, and how much of the answer is missing."""

    def __init__(self, address: tuple[str, int], what: bytes) -> None:
        self.socket = socket.create_connection(address, timeout=PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self._what = memoryview(what)
        self.began = self.connecting = 0.0
        self._unsent, self._head, self._status, self._wanted, self._got = self._what[:0], b"", b"", 0, 0

    def send(self) -> bool:
        """Send a new request, or the rest of the last one; returns whether all of it is sent."""
        if not self._unsent:
            self.began = time.monotonic()
            self._unsent, self._head, self._status, self._wanted, self._got = self._what, b"", b"", 0, 0
        with contextlib.suppress(BlockingIOError):
            while self._unsent:
                self._unsent = self._unsent[self.socket.send(self._unsent) :]
        return not self._unsent

    @property
    def body(self) -> str:
        """The body of the last answer, if it is short."""
        return self._head.partition(b"\r\n\r\n")[2].decode(errors="replace")

    def receive(self) -> bool | None:
        """Read on; returns whether the answer was a 200, None if it is not complete. Raises OSError at the end."""
        try:
            data = self.socket.recv(_RECEIVE)
        except BlockingIOError:
            return None
        if not data:
            raise ConnectionResetError("the server closed")
        self._got += len(data)
        if not self._wanted:
            self._head += data
            self._status, self._wanted = _measured(self._head)
        elif len(self._head) < _SHORT:
            self._head += data
        return self._status == b"200" if 0 < self._wanted <= self._got else None


class _Drive:
    """The generator; with `fresh` each request has a connection of its own, and bodies are counted, too."""

    def __init__(self, address: tuple[str, int], what: bytes, *, fresh: bool) -> None:
        self._address, self._what, self._fresh = address, what, fresh
        self._epoll, self._driven = select.epoll(), dict[int, _Driven]()
        self._fine = self._failed = 0
        self._took: list[float] = []
        self._bodies: Counter[str] = Counter()

    def begin(self) -> None:
        """Make a connection, and send a request on it."""
        began = time.monotonic()
        each = _Driven(self._address, self._what)
        each.connecting = time.monotonic() - began
        self._driven[each.socket.fileno()] = each
        self._epoll.register(each.socket, select.EPOLLIN if each.send() else select.EPOLLIN | select.EPOLLOUT)

    def turn(self) -> None:
        """Process what comes within a tenth of a second."""
        for fd, event in self._epoll.poll(0.1):
            each = self._driven[fd]
            try:
                if event & select.EPOLLOUT and each.send():
                    self._epoll.modify(fd, select.EPOLLIN)
                if event & ~select.EPOLLOUT and (fine := each.receive()) is not None:
                    self._answered(fd, each, fine)
            except OSError:
                self._failed += 1
                self._driven.pop(fd).socket.close()
                self.begin()

    def _answered(self, fd: int, each: _Driven, fine: bool) -> None:
        self._fine, self._failed = self._fine + fine, self._failed + (not fine)
        took = time.monotonic() - each.began
        self._took.append(took + each.connecting if self._fresh else took)
        if self._fresh:
            self._bodies[each.body] += 1
            self._driven.pop(fd).socket.close()
            self.begin()
            return
        if not each.send():
            self._epoll.modify(fd, select.EPOLLIN | select.EPOLLOUT)

    def finish(self, seconds: float) -> dict[str, Any]:
        """Close all connections; returns the counts for `seconds`."""
        for each in self._driven.values():
            each.socket.close()
        self._epoll.close()
        took = sorted(self._took)
        p99 = took[len(took) * 99 // 100] if took else 0.0
        counted = {"requests": self._fine, "failed": self._failed, "seconds": seconds, "p99": p99}
        return counted | {"bodies": self._bodies} if self._fresh else counted


def drive(
    address: tuple[str, int], what: bytes, connections: int, seconds: float, *, fresh: bool = False
) -> dict[str, Any]:
    """Repeat a request on a number of connections, and count the answers; lost connections are made again."""
    at_work = _Drive(address, what, fresh=fresh)
    for _ in range(connections):
        at_work.begin()
    began = time.monotonic()
    while (now := time.monotonic()) < began + seconds:
        at_work.turn()
    return at_work.finish(now - began)


def main(arguments: Sequence[str]) -> None:
    """Carry out the orders."""
    orders = json.loads(arguments[0])
    what = request(orders["target"], b"x" * orders["body"], headers=orders.get("headers", ()))
    address, fresh = (orders["host"], orders["port"]), orders.get("fresh", False)
    print(json.dumps(drive(address, what, orders["connections"], orders["seconds"], fresh=fresh)))


if __name__ == "__main__":
    main(sys.argv[1:])
