"""Clients that are slow: how long they are waited for, and what waits for them.

A client has a thread to itself only while the app runs for it. A request is read before a thread takes it; an answer
that its client does not take is kept, at most `server.outbuf_high_watermark` of it, and the thread that has more
gives its place up until there is room (`Waiting`). What a connection itself costs is bounded by `Progress`, by
`server.head_timeout`, and by the connection limit, at which those whose client is waited for are closed
(`flaskd.server.connections`).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from flaskd.server.board import Board
from flaskd.server.request import Request
from flaskd.server.threads import ThreadPool

MOST_WAITING = 64
"""Threads that wait for clients at a time, without a place; beyond it the client that is slowest is closed."""
SLOW = 32 * 1024
"""Bytes a second: a client that is slower than this may be closed to make room for others."""
PATIENCE = 1.0
"""Seconds that each client has before it is closed to make room for others."""


class Progress:
    """Whether a client moves at least so many bytes in each length of time, while it is waited for."""

    __slots__ = ("_moved", "_owed", "_since", "_what")

    def __init__(self) -> None:
        self._what: object = None
        self._since, self._moved, self._owed = 0.0, 0, 0

    def too_slow(self, now: float, what: object, moved: int, *, owed: int = 0, timeout: float, least: float) -> bool:
        """Whether it has moved less than `least` bytes in `timeout` seconds.

        `what` it is waited for, `moved` counts the bytes, and at `owed` of them it has done all that it can by now.
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

    None of them has a place: another request is run meanwhile, and the thread goes on when its client has read on and a
    place is free. At most `MOST_WAITING` do so. With one more, the client that reads most slowly is closed, if it is
    `SLOW`; else the thread waits in its place.
    """

    def __init__(self, pool: ThreadPool) -> None:
        self._pool = pool
        self.close: Callable[[Any, str], None] = lambda _channel, _why: None
        """Closes the connection of a client that is too slow, and says why; called by any thread."""
        self._clients: dict[Any, tuple[float, int]] = {}
        """The connections, since when they are waited for, and what the kernel had taken on them by then."""
        self._lock = threading.Lock()

    def __contains__(self, channel: object) -> bool:
        return channel in self._clients

    def for_client(self, channel: Any) -> None:
        """Wait until the client of a connection has taken so much of its answer that there is room, or is gone.

        The loop never waits: what it answers itself is short.
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
        """Whether its thread may leave its place."""
        now = time.monotonic()
        with self._lock:
            slowest = None if len(self._clients) < MOST_WAITING else self._slowest(now)
            if slowest is None and len(self._clients) >= MOST_WAITING:
                return False
            if slowest is not None:
                del self._clients[slowest]
            self._clients[channel] = now, channel.flushed
        if slowest is not None:
            self.close(slowest, f"{MOST_WAITING} others wait for clients that read slowly, and it reads most slowly")
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
