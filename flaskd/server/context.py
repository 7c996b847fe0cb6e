"""What the event loop and its connections share."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from flaskd.process.forks import AppCode
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
    """The current settings of a server, and the objects that all its connections use; it outlives every connection."""

    def __init__(self, app: Callable[..., Any], threads: int, board: Board | None = None) -> None:
        self.proxies = app if isinstance(app, BehindProxies) else None
        """Finds out who the client behind a proxy is; None where no proxy is trusted."""
        self.app = app if self.proxies is None else self.proxies.__call__  # a method is called more quickly
        self.ident = self.url_prefix = ""
        """What each answer says of the server (Server), and the path under which the app is mounted; empty: nothing."""
        self.code = AppCode()
        """The context in which the app's code runs."""
        self.draining = threading.Event()
        self.drains = False
        """The same as a plain attribute, which is quicker to read at every event."""
        self.closing = False
        """Whether each response closes its connection: during a drain, and while one is announced."""
        self.refusing = False
        """Whether requests are answered with 503: when drained, on listeners that other processes share."""
        self.keepalive_grace = self.stream_grace = 0.0
        """Seconds during a drain in which a client may send one more request, and in which a stream may go on."""
        self.alone = threads == 0
        """Whether the loop's thread runs the app itself, which must then never wait."""
        self.names_limits = True
        """Whether the log names the setting whose limit a request exceeds; False where the limit is fixed."""
        self.limits = NO_LIMITS
        """The limits in force; `flaskd.server.limit_watch` enforces those of time."""
        self.served_by = ""
        """The value of X-Served-By in each answer; empty: no such header."""
        self.health_path = ""
        self.health: Callable[[], tuple[str, str]] = lambda: ("200 OK", "ready")
        """Gives the answer on `health_path`: the status line and a text."""
        self.poller = make_poller()
        self.board = board
        """The memory in which a worker notes what it does, for its supervisor; None without workers."""
        self.pool = ThreadPool(threads)
        self.account = Account(self.pool, board)
        self.waiting = Waiting(self.pool)
        """The threads that wait for clients which read slowly."""
        self.timers = Timers()
        self.acceptors: list[Any] = []
        """Waitress' server objects, one for each listener."""
        self.probes: dict[int, Any] = {}
        """Open connections that did not come through a listener, by their descriptors."""
        self.on_stream: Callable[[Connection], None] = lambda _: None
        """Called in the loop's thread for a stream that began after the drain."""
        self.on_closed: Callable[[], None] = lambda: None
        """Called when a drain has closed all listeners that are not shared."""
        self._closed = False
        self._lock = threading.Lock()
        self.calls: deque[Callable[[], None]] = deque()
        """What the loop's thread is to run next."""
        self.answers: deque[Callable[[], None]] = deque()
        """What it is to answer by itself after that."""
        self.poller.wake = self.wake

    # --- any thread -----------------------------------------------------------------------------------------------

    def call(self, function: Callable[[], None]) -> None:
        """Run a function in the loop's thread at its next turn, which begins at once."""
        self.calls.append(function)
        self.wake()

    def wake(self) -> None:
        """Make the loop turn now."""
        with self._lock:
            if not self._closed and self.acceptors:
                self.acceptors[0].trigger.pull_trigger()

    def answer_soon(self, answer: Callable[[], None]) -> None:
        """Call `answer`, which answers a request, in the loop's thread, after all functions that `call` was given."""
        self.answers.append(answer)
        self.wake()

    def stream_began(self, channel: Connection) -> None:
        """Note that a stream has begun on a connection."""
        self.account.streams.add(channel)
        if self.drains:
            self.call(lambda: self.on_stream(channel))

    @property
    def connections(self) -> int:
        """How many connections are open, without those of probes."""
        return sum(len(acceptor.active_channels) for acceptor in self.acceptors)

    # --- the loop's thread ----------------------------------------------------------------------------------------

    def run_calls(self) -> None:
        """Run the functions that `call` was given."""
        while self.calls:
            self.calls.popleft()()

    def answer(self) -> None:
        """Run the functions that `answer_soon` was given."""
        while self.answers:
            self.answers.popleft()()

    def close(self) -> None:
        """Wake the loop no more, because its descriptors are about to be closed (any thread)."""
        with self._lock:
            self._closed = True
