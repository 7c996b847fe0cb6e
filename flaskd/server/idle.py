"""How long no request that counts for the idle stop has come."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from flaskd.background_work import in_background
from flaskd.server.connections import Connections
from flaskd.server.lines import path_pattern
from flaskd.server.request import Request

_AGAIN = 1.0
"""Seconds until `on_idle` is called again if the server still serves; also the most between two notes on the board."""
_NOTES = 4
"""How often at least, within the idle time, the board is told whether a request that counts is in hand."""


class IdleWatch:
    """Calls `on_idle`, in the loop's thread, once no request that counts has come for `after` seconds.

    Requests do not count for the paths in `ignore` (as a client writes them; with ``*`` at the end, all paths that
    begin so) and for `health_path`; nor do probes and malformed requests. While a request that counts is in flight or
    its body is still coming, however long it takes, the server is not idle; nor while background work is under way
    (`flaskd.background`). The loop looks only when the time may be over, so a request costs one check of its path.

    In a worker, the watch also writes to the board. Without `on_idle` it does only that: the supervisor decides, from
    the boards of all workers (`Board.idle_for`).
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
        self.used = self.next_moment = time.monotonic()
        """When the last request that counts was answered, or the watch began; and when to look again."""
        self._board = connections.context.board

    def go_on(self, before: IdleWatch | None) -> None:
        """Count from where the watch `before` counted, or else from the begin of this one."""
        self._use(before.used if before is not None else self.used)

    def restart(self) -> None:
        """Count from now on."""
        self._use(time.monotonic())

    def _use(self, moment: float) -> None:
        self.used = moment
        if self._board is not None:
            self._board.use(moment)

    def note(self, request: Request) -> None:
        """Note a request that came or was answered (any thread).

        An answered one is noted before it leaves the requests in flight, so that it is missed at no moment. One that
        came is noted for the board alone, to which the requests in hand are written only now and then.
        """
        if self._counts(request):
            self._use(time.monotonic())

    def _counts(self, request: Request) -> bool:
        path: str = getattr(request, "path", "")  # known once the first line was parsed
        return bool(path) and not (
            request.error
            or path in self._exact
            or path == self._context.health_path
            or path.startswith(self._beginnings)
        )

    @property
    def idle_for(self) -> float:
        """Seconds since the last answer that counts; 0 while a request or work that counts is in hand (any thread)."""
        # What is in hand is read first: in the other order an answer given in between would be missed.
        return 0.0 if self._in_use else time.monotonic() - self.used

    @property
    def _in_use(self) -> bool:
        return in_background() or any(self._counts(request) for request in self._connections.in_hand())

    def left(self) -> float:
        """Seconds until the idle time is over, if nothing comes (any thread)."""
        return max(0.0, self._after - self.idle_for)

    def look(self, now: float) -> None:
        """Call `on_idle` if the idle time is over; not during or after a drain, because a resume may follow."""
        if self._board is not None:
            self._board.count_for_idle(in_use=self._in_use)
        if self._on_idle is None:
            self.next_moment = now + min(_AGAIN, self._after / _NOTES)
            return
        left = self._after if self._context.drains else self.left()
        if left <= 0:
            self._on_idle()
            left = _AGAIN
        self.next_moment = now + left
