"""What the event loop and its connections share."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from flaskd.server.account import Account
from flaskd.server.board import Board
from flaskd.server.limits import NO_LIMITS
from flaskd.server.poller import make_poller
from flaskd.server.proxies import BehindProxies
from flaskd.server.request import Connection
from flaskd.server.slow import Waiting
from flaskd.server.threads import ThreadPool
from flaskd.server.timers import Timers


class Context:
    """How to serve at the moment, and the parts that every connection uses; it outlives each of them."""

    def __init__(self, app: Callable[..., Any], threads: int, board: Board | None = None) -> None:
        self.proxies = app if isinstance(app, BehindProxies) else None
        """Tells who the client is behind a proxy; None where no proxy is believed."""
        self.draining = threading.Event()
        self.drains = False
        """The same as a plain attribute, for where it is asked at every event."""
        self.closing = False
        """Whether responses close their connections: while draining, and while a drain is announced."""
        self.refusing = False
        """Whether requests are answered with 503 (drained, on listeners that others share)."""
        self.keepalive_grace = self.stream_grace = 0.0
        """Seconds that a drained connection may still send a request, and that a stream may go on."""
        self.alone = threads == 0
        """Whether the loop runs the app itself; for apps that never wait."""
        self.names_limits = True
        """Whether the log names the setting that a request goes beyond; not where no setting could change that."""
        self.limits = NO_LIMITS
        """The limits in force; `flaskd.server.limit_watch` keeps those of time."""
        self.served_by = ""
        """What each answer says of who served it (X-Served-By); empty: nothing."""
        self.health_path = ""
        self.health: Callable[[], tuple[str, str]] = lambda: ("200 OK", "ready")
        """What is answered on that path: the status line and a text."""
        self.poller = make_poller()
        self.board = board
        """Where a worker notes what it does, for its supervisor; None in a process that serves alone."""
        self.pool = ThreadPool(threads)
        self.account = Account(self.pool, board)
        self.waiting = Waiting(self.pool)
        """The threads that wait for clients that read slowly."""
        self.timers = Timers()
        self.acceptors: list[Any] = []
        """Waitress' servers, one for each listener."""
        self.probes: dict[int, Any] = {}
        """Open connections that came through no listener, by their descriptors."""
        self.on_stream: Callable[[Connection], None] = lambda _: None
        """Is called in the loop's thread when a stream began after a drain did."""
        self.on_closed: Callable[[], None] = lambda: None
        """Is called when a drain has closed all listeners that are not shared."""
        self._closed = False
        self._lock = threading.Lock()
        self._calls: deque[Callable[[], None]] = deque()
        self._answers: deque[Callable[[], None]] = deque()
        self.poller.wake = self.wake

    # --- any thread -----------------------------------------------------------------------------------------------

    def call(self, function: Callable[[], None]) -> None:
        """Run a function in the loop's thread, soon."""
        self._calls.append(function)
        self.wake()

    def wake(self) -> None:
        """Make the loop turn now."""
        with self._lock:
            if not self._closed and self.acceptors:
                self.acceptors[0].trigger.pull_trigger()

    def answer_soon(self, answer: Callable[[], None]) -> None:
        """Call what answers a connection's next request in the loop's thread, once that has run all that was called."""
        self._answers.append(answer)
        self.wake()

    def stream_began(self, channel: Connection) -> None:
        """Note a response that has no end of its own."""
        self.account.streams.add(channel)
        if self.drains:
            self.call(lambda: self.on_stream(channel))

    @property
    def connections(self) -> int:
        """How many connections are open, without those of probes."""
        return sum(len(acceptor.active_channels) for acceptor in self.acceptors)

    # --- the loop's thread ----------------------------------------------------------------------------------------

    def run_calls(self) -> None:
        """Run what `call` was given."""
        while self._calls:
            self._calls.popleft()()

    def answer(self) -> None:
        """Give the answers that need no thread of the pool."""
        while self._answers:
            self._answers.popleft()()

    def close(self) -> None:
        """Wake nothing from now on, because the descriptors are about to be given back (any thread)."""
        with self._lock:
            self._closed = True
