"""Clients that record what became of each of their requests; run as a process of its own.

``python _load.py ORDERS`` takes its orders as JSON, goes on until its standard input ends, and lets each client finish
its request. It writes two lines to standard output: that it has begun, and its account as JSON. It uses raw sockets, so
that nothing is retried or hidden:

========  ==========================================================================================================
answered  status 200, and the whole expected content
refused   no process listened (ECONNREFUSED); no connection was made
rejected  a whole 503: the client was told plainly
raced     the request crossed the server's close on the wire (below)
reset     the connection was made and ended before any byte of the response
cut       the connection ended after the response had begun
wrong     any other status, or unexpected content
========  ==========================================================================================================

``raced`` is narrow. The connection had carried a response before; it was open when the client checked, just before
sending; and when the send had returned, the server's FIN was there. On the loopback interface a send returns when the
request is in the server's socket. A FIN that comes later was therefore sent by a server that could have read the
request, and counts as ``reset``. So does every RST without a FIN before it: the kernel sends it when a server closes a
connection whose request it has not read.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import random
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from _wire import from_own_address
from app import PATTERN

FATES = ("answered", "refused", "rejected", "raced", "reset", "cut", "wrong")
LOST = ("reset", "cut", "wrong")
"""What should not happen to a request on an open connection; ``raced`` is shown in a column of its own."""

PATIENCE = 30.0
"""Seconds without progress after which a client gives up; this counts as a reset or a cut."""
_AFTER_REFUSAL = 0.02
"""Seconds until a refused client tries again."""
_MOST_OPEN = 64
"""How many requests of the open loop may wait at the same time; further arrivals are skipped and counted."""
_RECEIVE = 65536
_BIG = PATTERN * 3
_MOST_LOSSES = 10_000
"""How many losses are kept with their moments."""


class Load:
    """The clients, in a process of their own; `patience` replaces PATIENCE, `pause` (seconds) is for paced ones."""

    def __init__(self, port: int, kind: str, clients: int, patience: float = PATIENCE, *, pause: float = 0.04) -> None:
        orders = {"host": "127.0.0.1", "port": port, "load": kind, "clients": clients, "patience": patience}
        orders["pause"] = pause
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(orders)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def wait_begun(self) -> None:
        """Wait until the clients begin to send."""
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def finish(self) -> dict[str, Any]:
        """Let each client finish its request, and return the account."""
        out, _ = self._process.communicate(timeout=120)
        account: dict[str, Any] = json.loads(out.splitlines()[-1])
        return account

    def close(self) -> None:
        """End the process if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


class BrokenOffError(Exception):
    """The connection ended before the response did; the message says how."""


@dataclass
class Response:
    """A complete response."""

    status: int
    headers: dict[str, str]
    body: bytes


class Connection:
    """One connection, watched closely."""

    def __init__(
        self, address: tuple[str, int], *, receive_buffer: int = 0, pace: float = 0.0, patience: float = PATIENCE
    ) -> None:
        self._address = address
        self._patience = patience
        self._pace = pace
        self._socket = socket.socket()
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if receive_buffer:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._end = ""
        self.responses = 0
        self.crossed = False
        self.begun = False
        self.keep = True

    async def open(self) -> None:
        """Connect; raises the kernel's error."""
        async with asyncio.timeout(self._patience):
            from_own_address(self._socket)
            await self._loop.sock_connect(self._socket, self._address)

    def close(self) -> None:
        """Close at once."""
        self._socket.close()

    def look(self) -> bool:
        """Whether it is open as far as this side knows; reads nothing."""
        if not self._end:
            try:
                if self._socket.recv(1, socket.MSG_PEEK) == b"":
                    self._end = "FIN"
            except BlockingIOError:
                pass
            except OSError:  # the kernel reports it only once, so it is kept
                self._end = "RST"
        return not self._end

    async def send(self, data: bytes, *, first: bool = False) -> None:
        """Send; `first` checks whether the server's close crossed. A failure shows when the response is read."""
        if first:
            self.begun = self.crossed = False
        try:
            async with asyncio.timeout(self._patience):
                await self._loop.sock_sendall(self._socket, data)
        except (BrokenPipeError, ConnectionResetError):
            pass
        except TimeoutError:
            raise BrokenOffError("silence") from None
        if first:
            self.crossed = self.responses > 0 and not self.look() and self._end == "FIN"

    async def _fill(self) -> None:
        if self._pace:
            await asyncio.sleep(self._pace)
        try:
            async with asyncio.timeout(self._patience):
                data = await self._loop.sock_recv(self._socket, _RECEIVE)
        except TimeoutError:
            raise BrokenOffError("silence") from None
        except OSError:
            raise BrokenOffError("RST") from None
        if not data:
            raise BrokenOffError(self._end or "FIN")
        self.begun = True
        self._buffer += data

    async def _line(self) -> bytes:
        while (end := self._buffer.find(b"\r\n")) < 0:
            await self._fill()
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 2]
        return line

    async def _exactly(self, length: int) -> bytes:
        while len(self._buffer) < length:
            await self._fill()
        data = bytes(self._buffer[:length])
        del self._buffer[:length]
        return data

    async def response(self) -> Response:
        """Read one response and its interim ones; raises BrokenOffError if it does not come whole."""
        self.begun = bool(self._buffer)
        status_line = await self._line()
        if not status_line.startswith(b"HTTP/1."):
            raise ValueError(f"not a status line: {status_line[:40]!r}")
        status, headers = int(status_line.split()[1]), {}
        while line := await self._line():
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.strip().lower()] = value.strip()
        if status < 200:
            return Response(status, headers, b"")
        if "chunked" in headers.get("transfer-encoding", "").lower():
            body = await self._chunks()
        elif "content-length" in headers:
            body = await self._exactly(int(headers["content-length"]))
        else:
            raise ValueError("a response without a length")  # then it is not known whether it came whole
        self.responses += 1
        self.keep = "close" not in headers.get("connection", "").lower()
        return Response(status, headers, body)

    async def _chunks(self) -> bytes:
        body = b""
        while size := int((await self._line()).split(b";")[0], 16):
            body += await self._exactly(size)
            if await self._line():
                raise ValueError("a chunk that is longer than it says")
        while await self._line():  # trailers
            pass
        return body


@dataclass
class Account:
    """What became of the requests; `requests` is counted before sending, the fates afterwards."""

    requests: int = 0
    fates: Counter[str] = field(default_factory=Counter)
    details: Counter[str] = field(default_factory=Counter)
    losses: list[dict[str, Any]] = field(default_factory=list)
    left_out: int = 0
    silence: float = 0.0
    _answered: float = field(default_factory=time.monotonic)

    def enter(self, fate: str, kind: str, how: str, began: float, target: str = "") -> None:
        """Enter one request's fate; losses are kept with their moment (time.time()) and the request's age."""
        self.fates[fate] += 1
        if fate == "answered":
            self._end_silence()
        if fate in (*LOST, "raced", "rejected"):
            self.details[f"{fate}: {kind}, {how}"] += 1
            if len(self.losses) < _MOST_LOSSES:
                now = time.time()
                each = {"at": now, "fate": fate, "kind": kind, "how": how, "age": round(now - began, 6)}
                self.losses.append(each | {"target": target})

    def _end_silence(self) -> None:
        now = time.monotonic()
        self.silence, self._answered = max(self.silence, now - self._answered), now

    def as_json(self) -> dict[str, Any]:
        """The account as JSON; `silence` is the longest time in which no client got an answer, in seconds."""
        self._end_silence()
        return {
            "requests": self.requests,
            "fates": {fate: self.fates[fate] for fate in FATES},
            "details": dict(self.details.most_common()),
            "losses": self.losses,
            "left_out": self.left_out,
            "silence": round(self.silence, 3),
        }


@dataclass
class Exchange:
    """What is sent at once on one connection, and one expected body for each request in it."""

    parts: Sequence[bytes | float]
    expected: Sequence[bytes]
    wait_for_100: bool = False

    @property
    def targets(self) -> list[str]:
        """The target of each request."""
        heads = self.parts[0]
        assert isinstance(heads, bytes)
        return [each.decode() for each in re.findall(rb"(?:GET|POST) (\S+) HTTP/1.1\r\n", heads)]


def _get(target: str) -> bytes:
    return f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


def _post(target: str, length: int, more: str = "") -> bytes:
    return f"POST {target} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n{more}\r\n".encode()


class Clients:
    """Closed loops (each sends its next request after the answer) and one open loop (Poisson arrivals)."""

    def __init__(self, address: tuple[str, int], patience: float = PATIENCE) -> None:
        self.account = Account()
        self._patience = patience
        self.stopping = asyncio.Event()
        self._address = address
        self._tokens = itertools.count(1)
        self._random = random.Random(1)
        self._idle: list[Connection] = []
        self._waiting: set[asyncio.Task[None]] = set()

    # --- what is sent -------------------------------------------------------------------------------------------

    def _hello(self) -> Exchange:
        token = next(self._tokens)
        return Exchange([_get(f"/?token={token}")], [b"hello %d\n" % token])

    def _slow(self) -> Exchange:
        token = next(self._tokens)
        return Exchange([_get(f"/slow?seconds=0.05&token={token}")], [b"slow %d\n" % token])

    def _leak(self) -> Exchange:
        token = next(self._tokens)
        return Exchange([_get(f"/leak?token={token}")], [b"leaked %d\n" % token])

    def _keepalive(self) -> Exchange:
        return self._slow() if self._random.random() < 0.1 else self._hello()

    def _pipelined(self) -> Exchange:
        three = [self._hello() for _ in range(3)]
        return Exchange([b"".join(each.parts[0] for each in three)], [each.expected[0] for each in three])  # type: ignore[misc]

    def _split(self) -> Exchange:
        body = self._random.randbytes(self._random.randint(1000, 200_000))
        cut = len(body) // 3
        parts = [_post(f"/upload?token={next(self._tokens)}", len(body)), 0.01, body[:cut], 0.005, body[cut:]]
        return Exchange(parts, [_digest(body)])

    def _expect(self) -> Exchange:
        body = self._random.randbytes(self._random.randint(1000, 50_000))
        head = _post(f"/upload?token={next(self._tokens)}", len(body), "Expect: 100-continue\r\n")
        return Exchange([head, body], [_digest(body)], True)

    def _stream(self) -> Exchange:
        token = next(self._tokens)
        body = b"".join(b"chunk %d %d\n" % (number, token) for number in range(10))
        return Exchange([_get(f"/stream?chunks=10&token={token}")], [body])

    def _big(self) -> Exchange:
        return Exchange([_get(f"/big?token={next(self._tokens)}")], [_BIG])

    # --- how it is sent -----------------------------------------------------------------------------------------

    async def _connect(self, kind: str, **options: Any) -> Connection | None:
        """Connect for one request; enters the request if that fails."""
        connection, began = Connection(self._address, patience=self._patience, **options), time.time()
        try:
            await connection.open()
        except ConnectionRefusedError:
            self._enter_unsent("refused", kind, "", began)
        except ConnectionResetError:
            self._enter_unsent("reset", kind, "RST while connecting", began)
        except TimeoutError:
            self._enter_unsent("reset", kind, "silence while connecting", began)
        except OSError:  # a limit of this machine: there is no request to count
            pass
        else:
            return connection
        connection.close()
        await asyncio.sleep(_AFTER_REFUSAL * (0.5 + self._random.random()))
        return None

    def _enter_unsent(self, fate: str, kind: str, how: str, began: float) -> None:
        self.account.requests += 1
        self.account.enter(fate, kind, how, began)

    async def exchange(self, kind: str, connection: Connection, what: Exchange) -> bool:
        """Send, read the responses, and enter each request's fate; returns whether the connection can be used again."""
        self.account.requests += len(what.expected)
        began, entered, how = time.time(), 0, ""
        reused = "reused" if connection.responses else "fresh"
        try:
            response = await self._send(connection, what)
            for expected in what.expected:
                while response is None or response.status < 200:
                    response = await connection.response()
                fate, how = _judge(response, expected)
                response = None
                self.account.enter(fate, kind, how, began, what.targets[entered] if how else "")
                entered += 1
            return connection.keep and not how and connection.look()
        except BrokenOffError as broken:
            how, targets = f"{broken}, {reused}", what.targets
            if connection.begun:
                self.account.enter("cut", kind, how, began, targets[entered])
            elif connection.crossed and not entered:
                self.account.enter("raced", kind, how, began, targets[entered])
            else:
                how_reset = how + (" (behind an answer)" if entered else "")
                self.account.enter("reset", kind, how_reset, began, targets[entered])
            rest = "raced" if connection.crossed and not entered and not connection.begun else "reset"
            for target in targets[entered + 1 :]:
                self.account.enter(rest, kind, f"{how} (behind another)", began, target)
        except (ValueError, IndexError) as fault:
            for target in what.targets[entered:]:
                self.account.enter("wrong", kind, f"cannot be read: {fault}", began, target)
        return False

    async def _send(self, connection: Connection, what: Exchange) -> Response | None:
        """Send it all, or only the head, if a 100 is awaited and another response comes."""
        first = True
        for part in what.parts:
            if isinstance(part, float):
                await asyncio.sleep(part)
                continue
            await connection.send(part, first=first)
            if first and what.wait_for_100:
                response = await connection.response()
                if response.status != 100:
                    return response
            first = False
        return None

    async def closed_loop(
        self, kind: str, make: Callable[[], Exchange], *, keep: bool = True, pause: float = 0.0, **options: Any
    ) -> None:
        """Send the next request after each answer, until told to stop."""
        connection: Connection | None = None
        while not self.stopping.is_set():
            what = make()  # before the check, so that sending follows the check at once
            if connection is None or not connection.look():
                if connection is not None:
                    connection.close()
                connection = await self._connect(kind, **options)
            if connection is None:
                continue
            if not await self.exchange(kind, connection, what) or not keep:
                connection.close()
                connection = None
            if pause:
                await asyncio.sleep(pause * self._random.random())
        if connection is not None:
            connection.close()

    async def open_loop(self, rate: float, make: Callable[[], Exchange] | None = None) -> None:
        """Send `rate` requests a second, whatever becomes of earlier ones, on idle connections if there are any."""
        due = time.monotonic()
        while not self.stopping.is_set():
            due += self._random.expovariate(rate)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            if len(self._waiting) >= _MOST_OPEN:
                self.account.left_out += 1
                continue
            task = asyncio.create_task(self._arrival((make or self._keepalive)()))
            self._waiting.add(task)
            task.add_done_callback(self._waiting.discard)
        await asyncio.gather(*self._waiting)
        for each in self._idle:
            each.close()

    async def _arrival(self, what: Exchange) -> None:
        connection = None
        while self._idle and connection is None:
            connection = self._idle.pop()
            if not connection.look():
                connection.close()
                connection = None
        connection = connection or await self._connect("open")
        if connection is None:
            return
        if await self.exchange("open", connection, what):
            self._idle.append(connection)
        else:
            connection.close()

    def mixed(self, count: int, *, plain: bool = False) -> list[Coroutine[Any, Any, None]]:
        """Give `count` clients of eight kinds in turn, and the open loop with two arrivals a second for each.

        With `plain` there are six kinds, without what some servers never answer: pipelining, and Expect.
        """
        kinds: list[Callable[[], Coroutine[Any, Any, None]]] = [
            lambda: self.closed_loop("keep-alive", self._keepalive),
            lambda: self.closed_loop("fresh", self._hello, keep=False),
            lambda: self.closed_loop("pipelined", self._pipelined),
            lambda: self.closed_loop("split POST", self._split),
            lambda: self.closed_loop("slow reader", self._big, receive_buffer=65536, pace=0.004),
            lambda: self.closed_loop("stream", self._stream),
            lambda: self.closed_loop("expect", self._expect),
            lambda: self.closed_loop("pausing", self._hello, pause=0.05),
        ]
        if plain:
            kinds = [each for number, each in enumerate(kinds) if number not in {2, 6}]
        return [kinds[number % len(kinds)]() for number in range(count)] + [self.open_loop(2.0 * count)]

    def paced(self, count: int, pause: float) -> list[Coroutine[Any, Any, None]]:
        """Give `count` clients that pause up to `pause` seconds: kept-alive, fresh, slow and posting ones in turn."""
        kinds: list[tuple[str, Callable[[], Exchange], bool]] = [
            ("keep-alive", self._keepalive, True),
            ("fresh", self._hello, False),
            ("slow", self._slow, True),
            ("split POST", self._split, True),
        ]
        chosen = [kinds[number % len(kinds)] for number in range(count)]
        return [self.closed_loop(kind, make, keep=keep, pause=pause) for kind, make, keep in chosen]

    def leaking(self, rate: int) -> list[Coroutine[Any, Any, None]]:
        """Give an open loop of `rate` requests a second, each of which leaks memory."""
        return [self.open_loop(rate, self._leak)]

    def connecting(self, count: int) -> list[Coroutine[Any, Any, None]]:
        """Give `count` clients that make a connection for each request."""
        return [self.closed_loop("fresh", self._hello, keep=False) for _ in range(count)]


def _digest(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest().encode() + b"\n"


def _judge(response: Response, expected: bytes) -> tuple[str, str]:
    if response.status == 503:
        return "rejected", "503"
    if response.status != 200:
        return "wrong", f"status {response.status}"
    return ("answered", "") if response.body == expected else ("wrong", f"other content, {len(response.body)} bytes")


async def _main(orders: dict[str, Any]) -> dict[str, Any]:
    clients = Clients((orders["host"], orders["port"]), orders["patience"])
    count, load = orders["clients"], orders["load"]
    if load in {"leak", "paced"}:
        loops = clients.leaking(count) if load == "leak" else clients.paced(count, orders["pause"])
    else:
        loops = clients.connecting(count) if load == "connect" else clients.mixed(count, plain=load == "plain")
    tasks = [asyncio.create_task(each) for each in loops]
    print("begun", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    clients.stopping.set()
    await asyncio.gather(*tasks)
    return clients.account.as_json()


if __name__ == "__main__":
    print(json.dumps(asyncio.run(_main(json.loads(sys.argv[1])))))
