"""How long no client has asked for anything that counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from flaskd.background_work import in_background
from flaskd.server.connections import Connections
from flaskd.server.lines import path_pattern
from flaskd.server.request import Request

_AGAIN = 1.0
"""Seconds until `on_idle` is called again, where the first call changed nothing; and between two notes on a board."""
_NOTES = 4
"""How often at least it is noted on a board, within the time that makes idle, what is in hand."""


class IdleWatch:
    """Calls `on_idle`, in the loop's thread, once nothing that counts was asked for `after` seconds.

    What is in `ignore` does not count: paths, as a client writes them, or with ``*`` at the end all that begin so;
    nor do `health_path`, probes, and what is no request at all. One in flight that counts, or whose body is still
    coming, is no idleness, however long it takes; nor is work in the background (`flaskd.background`). The loop looks
    when time may be up, and not before: all that it costs a request is to be told from those that do not count.

    Where there is a board, the watch notes on it what it knows. Without `on_idle` it does nothing else: a worker's
    supervisor decides, from the boards of all workers (`Board.idle_for`).
    """

    def __init__(
        self, connections: Connections, after: float, ignore: Sequence[str], on_idle: Callable[[], None] | None
    ) -> None:
        self._connections = connections
        self._context = connections.context
        self._after = after
        self._on_idle = on_idle
        paths = [path_pattern(each) for each in ignore]
        self._exact = {path for begins, path in paths if not begins}
        self._beginnings = tuple(path for begins, path in paths if begins)
        self.used = self.next_look = time.monotonic()
        """When the last answer that counts was given, or the watch began; and when to look again."""
        self._board = connections.context.board

    def go_on(self, before: IdleWatch | None) -> None:
        """Count from where the watch `before` did, or from the begin."""
        self._use(before.used if before is not None else self.used)

    def restart(self) -> None:
        """Count from now."""
        self._use(time.monotonic())

    def _use(self, moment: float) -> None:
        self.used = moment
        if self._board is not None:
            self._board.use(moment)

    def note(self, request: Request) -> None:
        """Note a request that came, or was answered (any thread).

        Called before it is out of flight, lest it be missed in between. One that came is noted for the board alone,
        because what is in hand is noted there only now and then.
        """
        if self._counts(request):
            self._use(time.monotonic())

    def _counts(self, request: Request) -> bool:
        path: str = getattr(request, "path", "")  # waitress knows it once it has understood the first line
        return bool(path) and not (
            request.error
            or path in self._exact
            or path == self._context.health_path
            or path.startswith(self._beginnings)
        )

    @property
    def idle_for(self) -> float:
        """Seconds since the last answer that counts; 0 while something is in hand that counts (any thread)."""
        # First what is in hand, then since when nothing is: the other way round, an answer in between would be missed.
        return 0.0 if self._in_use else time.monotonic() - self.used

    @property
    def _in_use(self) -> bool:
        return in_background() or any(self._counts(request) for request in self._connections.in_hand())

    def left(self) -> float:
        """Seconds until time is up, if nothing comes (any thread)."""
        return max(0.0, self._after - self.idle_for)

    def look(self, now: float) -> None:
        """Call `on_idle` if time is up; not while draining or drained, because a resume may follow."""
        if self._board is not None:
            self._board.count_for_idle(in_use=self._in_use)
        if self._on_idle is None:
            self.next_look = now + min(_AGAIN, self._after / _NOTES)
            return
        left = self._after if self._context.drains else self.left()
        if left <= 0:
            self._on_idle()
            left = _AGAIN
        self.next_look = now + left
