"""What can be seen of a server from outside: addresses, figures, what is in hand, and whether it answers."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Hashable, Sequence

from flaskd.errors import AppError, FlaskdError
from flaskd.ledger import Cut, InFlight
from flaskd.process.descriptors import open_files
from flaskd.server.loop import EventLoop
from flaskd.server.tally import Tally
from flaskd.sockets import Address, Listener


class ObservedServer:
    """The part of `WaitressThread` that changes nothing; all of it may be asked from any thread, and at any time."""

    loop: EventLoop | None = None
    """What serves, once it was started."""
    _serves = False
    """Whether it was started, and has not been told to end."""
    _addresses: Sequence[Address]
    _listeners: list[Listener] | None

    @property
    def _serving(self) -> EventLoop:
        if self.loop is None:
            raise FlaskdError("cannot do that: this server has not been started")
        return self.loop

    @property
    def _turning(self) -> bool:
        return self._serves and self.loop is not None and self.loop.alive

    @property
    def addresses(self) -> list[Address]:
        """Where it listens; ports are real ones after the start."""
        return list(self._addresses)

    @property
    def listeners(self) -> list[Listener]:
        """The listeners themselves; new ones after a resume."""
        return list(self._listeners or ())

    @property
    def url(self) -> str:
        """The URL of the first listener, ending in a slash."""
        return self._addresses[0].url

    # --- figures --------------------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """Requests accepted and not yet completely answered."""
        return self.loop.account.in_flight if self.loop else 0

    @property
    def connections(self) -> int:
        """Open connections."""
        return self.loop.connections.count if self.loop else 0

    @property
    def queued(self) -> int:
        """Requests that wait for a thread."""
        return len(self.loop.context.pool.queue) if self.loop else 0

    @property
    def completed(self) -> int:
        """Requests answered in full since the start."""
        return self.counted[0]

    @property
    def counted(self) -> tuple[int, int]:
        """How many requests have been completed and rejected since the start."""
        return self.loop.account.counted if self.loop else (0, 0)

    def tally(self) -> Tally:
        """The account of all requests since the start."""
        return self.loop.account.tally() if self.loop else Tally()

    @property
    def idle(self) -> tuple[float, float] | None:
        """Seconds without anything that counts, and until `on_idle`; None where idleness is not watched."""
        watch = self.loop.idle if self.loop else None
        return (watch.idle_for, watch.left()) if watch else None

    # --- requests and threads -------------------------------------------------------------------------------------

    def requests(self, *, stacks: bool = False) -> list[InFlight]:
        """What is in flight, oldest first; with the stacks of the threads on request."""
        return self.loop.account.requests(stacks=stacks) if self.loop else []

    def cut(self, reason: str) -> tuple[Cut, ...]:
        """What is in flight, as cut: for when the serving thread cannot do it any more."""
        return self.loop.account.cut(reason) if self.loop else ()

    def app_threads(self) -> list[threading.Thread]:
        """The threads that run the app and have not ended."""
        return [each for each in self.loop.context.pool.started if each.is_alive()] if self.loop else []

    def left_behind(self) -> dict[threading.Thread, InFlight]:
        """The threads that go on with a request that is over: it was cut, or its stream was ended."""
        return self.loop.context.pool.left_behind() if self.loop else {}

    @property
    def short(self) -> int:
        """How many threads are missing, because they go on with requests that are over."""
        return self.loop.context.pool.short if self.loop else 0

    def all_are_at(self) -> Hashable | None:
        """What all threads that run the app are at; see `Account.all_are_at`."""
        return self.loop.account.all_are_at() if self.loop else None

    def moved(self) -> Hashable:
        """How far the requests are; see `Connections.moved`."""
        return self.loop.connections.moved() if self.loop else None

    # --- does it answer? ------------------------------------------------------------------------------------------

    @property
    def silent_for(self) -> float:
        """Seconds since the serving thread last turned, which it does every second when all is well."""
        return time.monotonic() - self.loop.last_turn if self.loop else 0.0

    def turns(self, timeout: float) -> bool:
        """Whether the serving thread turns within `timeout` seconds."""
        if not self._turning:
            return False
        turned = threading.Event()
        self._serving.call(turned.set)
        return turned.wait(timeout)

    def probe(self, path: str, timeout: float) -> int:
        """Ask the app for `path` over a connection of one's own, needing no listener; returns the status code.

        Raises AppError when no answer came within `timeout` seconds.
        """
        status = self._ask(path, timeout, here=False)
        if isinstance(status, str):
            raise AppError(f"cannot get ready: {status}")
        return status

    def answers(self, timeout: float) -> bool:
        """Whether the loop accepts a connection of one's own and answers a request on it within `timeout` seconds."""
        return self._turning and isinstance(self._ask("/", timeout, here=True), int)

    def _ask(self, path: str, timeout: float, *, here: bool) -> int | str:
        """Send a request on a connection of one's own; gives the status code, or what was wrong."""
        loop = self._serving
        until = time.monotonic() + timeout
        ours, theirs = open_files.open(socket.socketpair)
        with ours:
            loop.call(lambda: loop.connections.attach(theirs, here=here))
            head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nUser-Agent: flaskd-probe\r\nConnection: close\r\n\r\n"
            answer = b""
            try:
                ours.sendall(head.encode("latin-1"))
                while b"\r\n" not in answer:
                    ours.settimeout(max(0.001, until - time.monotonic()))
                    received = ours.recv(4096)
                    if not received or time.monotonic() > until:
                        break
                    answer += received
            except TimeoutError:
                received = b"late"
            except OSError as error:
                return f"the probe of {path} was broken off: {error}"
        status = re.match(rb"HTTP/1\.[01] (\d{3}) ", answer)
        if status and b"\r\n" in answer:
            return int(status[1])
        if received:
            return f"{path} did not answer the probe within {timeout:g}s"
        return f"the probe of {path} was broken off without an answer"
