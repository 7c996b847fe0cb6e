"""Slow clients: how long the server waits for them, and which threads do.

A client keeps a thread only while the app runs for it. A request is read completely before a thread takes it. Of an
answer that the client does not read, up to `server.outbuf_high_watermark` bytes are buffered; a thread that has more
gives up its place until there is room (`Waiting`). The cost of a connection itself is bounded by `Progress`, by
`server.head_timeout`, and by the connection limit, at which connections that wait for their clients are closed
(`flaskd.server.connections`).
"""

from __future__ import annotations

import _thread
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from flaskd.server.board import Board
from flaskd.server.request import Request
from flaskd.server.threads import ThreadPool

MOST_WAITING = 64
"""Most threads that wait for clients without a place; for one more, the connection of the slowest client is closed."""
SLOW = 32 * 1024
"""Bytes a second; the connection of a client that is slower may be closed to make room for others."""
PATIENCE = 1.0
"""Seconds that each client has before its connection may be closed to make room for others."""


class OutputLock(_thread.RLock):  # type: ignore[misc]  # final for type checkers only
    """The lock of a connection's output, on which a thread can also wait; few do, and only for them there is more."""

    __slots__ = ("_condition",)

    def __init__(self) -> None:
        super().__init__()
        self._condition: threading.Condition | None = None

    def wait(self, timeout: float | None = None) -> bool:
        """Release the lock, wait for `notify`, and take it again, as `threading.Condition.wait`."""
        if self._condition is None:
            self._condition = threading.Condition(self)
        return self._condition.wait(timeout)

    def notify(self) -> None:
        """Wake a thread that waits; the caller holds the lock."""
        if self._condition is not None:
            self._condition.notify()


class Progress:
    """Tells whether a client for which the server waits moves enough bytes in each period of time."""

    __slots__ = ("_moved", "_owed", "_since", "_what")

    def __init__(self) -> None:
        self._what: object = None
        self._since, self._moved, self._owed = 0.0, 0, 0

    def too_slow(self, now: float, what: object, moved: int, *, owed: int = 0, timeout: float, least: float) -> bool:
        """Whether the client has moved less than `least` bytes in the last `timeout` seconds.

        `what` is the request or answer that the server waits for; a new one starts a new period. `moved` counts the
        bytes so far. Once `moved` reaches `owed` (if not 0), the client has done all that it can, and a new period
        starts.
        """
        if what is not self._what or (self._owed and moved >= self._owed):
            self._what, self._since, self._moved, self._owed = what, now, moved, owed
            return False
        if now - self._since < timeout:
            return False
        slow = moved - self._moved < least
        self._since, self._moved, self._owed = now, moved, owed
        return slow


class Waiting:
    """The threads that wait for clients which read more slowly than the app writes.

    Such a thread gives up its place, in which another request runs, and goes on when its client has read enough and a
    place is free. At most `MOST_WAITING` threads do so. For one more, the connection of the slowest client is closed,
    if that reads more slowly than `SLOW`; otherwise the thread keeps its place while it waits.
    """

    def __init__(self, pool: ThreadPool) -> None:
        self._pool = pool
        self.close: Callable[[Any, str], None] = lambda _channel, _why: None
        """Closes the connection of a client that is too slow, for the given reason; called by any thread."""
        self._clients: dict[Any, tuple[float, int]] = {}
        """The connections, with the moment at which the wait began, and the bytes the kernel had taken by then."""
        self._lock = threading.Lock()

    def __contains__(self, channel: object) -> bool:
        return channel in self._clients

    def for_client(self, channel: Any) -> None:
        """Wait until the client has read so much that there is room for more output, or has left.

        The loop's thread never waits here: the answers that it gives itself are short.
        """
        if channel.serving.here:
            return
        with contextlib.ExitStack() as aside:
            aside.enter_context(_shown_as_sending(channel.serving, channel.context.board))
            left = False
            while True:
                if not left and self._enter(channel):
                    aside.callback(self._leave, channel)
                    aside.enter_context(self._pool.without_place())
                    left = True
                with channel.outbuf_lock:
                    if not channel.backed_up:
                        break
                    channel.server.pull_trigger()
                    channel.outbuf_lock.wait(None if left else PATIENCE)

    def _enter(self, channel: Any) -> bool:
        """Add a connection to those that are waited for; False if its thread must keep its place."""
        now = time.monotonic()
        with self._lock:
            slowest = None if len(self._clients) < MOST_WAITING else self._slowest(now)
            if slowest is None and len(self._clients) >= MOST_WAITING:
                return False
            if slowest is not None:
                del self._clients[slowest]
            self._clients[channel] = now, channel.flushed
        if slowest is not None:
            self.close(slowest, f"{MOST_WAITING} threads wait for slow clients, and this one is the slowest")
        return True

    def _slowest(self, now: float) -> Any | None:
        rates = {
            each: (each.flushed - before) / (now - since)
            for each, (since, before) in self._clients.items()
            if now - since >= PATIENCE
        }
        slowest = min(rates, key=rates.__getitem__, default=None)
        return slowest if slowest is not None and rates[slowest] < SLOW else None

    def _leave(self, channel: Any) -> None:
        with self._lock:
            self._clients.pop(channel, None)


@contextlib.contextmanager
def _shown_as_sending(request: Request, board: Board | None) -> Iterator[None]:
    def show(*, waits: bool) -> None:
        request.waits = waits
        if board is not None:
            board.send(request, sending=waits)

    show(waits=True)
    try:
        yield
    finally:
        show(waits=False)
