"""What others can ask of a server: addresses, figures, requests and threads, and whether it answers."""

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
    """The part of `WaitressThread` that only reads; for any thread, at any time."""

    loop: EventLoop | None = None
    """The event loop; None before the start."""
    _serves = False
    """Whether the server was started, and has not been told to end."""
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
        """The addresses that it listens on; after the start, port 0 is replaced by the real port."""
        return list(self._addresses)

    @property
    def listeners(self) -> list[Listener]:
        """The listeners; after a resume they are new ones."""
        return list(self._listeners or ())

    @property
    def url(self) -> str:
        """The URL of the first listener, ending in a slash."""
        return self._addresses[0].url

    # --- figures --------------------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """How many requests were accepted and are not yet completely answered."""
        return self.loop.account.in_flight if self.loop else 0

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return self.loop.connections.count if self.loop else 0

    @property
    def queued(self) -> int:
        """How many requests wait for a thread."""
        return len(self.loop.context.pool.queue) if self.loop else 0

    @property
    def completed(self) -> int:
        """How many requests were answered in full since the start."""
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
        """For how many seconds it has been idle, and seconds until `on_idle`; None if idleness is not watched."""
        watch = self.loop.idle if self.loop else None
        return (watch.idle_for, watch.left()) if watch else None

    # --- requests and threads -------------------------------------------------------------------------------------

    def requests(self, *, stacks: bool = False) -> list[InFlight]:
        """The requests in flight, oldest first; with `stacks`, each with the stack of its thread."""
        return self.loop.account.requests(stacks=stacks) if self.loop else []

    def cut(self, reason: str) -> tuple[Cut, ...]:
        """Entries for all requests in flight, as cut; for when the serving thread is dead or hangs."""
        return self.loop.account.cut(reason) if self.loop else ()

    def app_threads(self) -> list[threading.Thread]:
        """The threads that run the app and have not ended."""
        return [each for each in self.loop.context.pool.started if each.is_alive()] if self.loop else []

    def left_behind(self) -> dict[threading.Thread, InFlight]:
        """The threads that still run a request that is over (it was cut, or its stream ended), and that request."""
        return self.loop.context.pool.left_behind() if self.loop else {}

    @property
    def short(self) -> int:
        """How many threads are missing, because they still run requests that are over and were not replaced."""
        return self.loop.context.pool.short if self.loop else 0

    def all_are_at(self) -> Hashable | None:
        """A value that stays the same while all threads are busy and none moves on; see `Account.all_are_at`."""
        return self.loop.account.all_are_at() if self.loop else None

    def moved(self) -> Hashable:
        """A value that changes when any request moves on; see `Connections.moved`."""
        return self.loop.connections.moved() if self.loop else None

    # --- does it answer? ------------------------------------------------------------------------------------------

    @property
    def silent_for(self) -> float:
        """Seconds since the serving thread last turned; one that is well turns every second."""
        return time.monotonic() - self.loop.last_turn if self.loop else 0.0

    def turns(self, timeout: float) -> bool:
        """Whether the serving thread turns within `timeout` seconds."""
        if not self._turning:
            return False
        turned = threading.Event()
        self._serving.call(turned.set)
        return turned.wait(timeout)

    def probe(self, path: str, timeout: float) -> int:
        """Ask the app for `path` over a connection inside this process, without a listener; returns the status code.

        Raises AppError if no answer came within `timeout` seconds.
        """
        status = self._ask(path, timeout, here=False)
        if isinstance(status, str):
            raise AppError(f"cannot get ready: {status}")
        return status

    def answers(self, timeout: float) -> bool:
        """Whether the loop itself answers a request from inside this process within `timeout` seconds."""
        return self._turning and isinstance(self._ask("/", timeout, here=True), int)

    def _ask(self, path: str, timeout: float, *, here: bool) -> int | str:
        """Send a request from inside this process; returns the status code, or a text that says what went wrong."""
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
