"""Enforces the time limits: a request that hangs is given up, one that waits too long for a thread is refused."""

from __future__ import annotations

import logging
import time
from collections import deque

from flaskd.log.setup import bounded_by
from flaskd.server.channel import Channel
from flaskd.server.connections import Connections
from flaskd.server.limits import Limits
from flaskd.server.lines import path_pattern
from flaskd.server.request import Request
from flaskd.server.timers import NEVER
from flaskd.units import format_duration

log = logging.getLogger("flaskd.server")

_LOOKS = 10
"""How often at least, within their limit, the queue and the requests whose answer has begun are looked at."""
_LEAST = 0.02
"""Least seconds between two looks."""
_STOOD = 1.0
"""Seconds that a look may be late. A later one shows that the process stood still; requests get that time back."""
_MOST_STOOD = 100
"""How many of the times at which the process stood still are remembered."""


class LimitWatch:
    """Gives up requests that hang, and refuses those that waited too long for a thread, in the loop's thread.

    A request hangs if its time limit has passed since a thread began to run it, or since the kernel last took a part of
    its answer: a long answer that is being sent does not hang, nor does one that waits for its client to read. Streams
    are exempt (`flaskd.server.streams`). The loop looks only when the first request may be due, so a quick request
    costs nothing.
    """

    def __init__(self, connections: Connections, limits: Limits) -> None:
        self._context = connections.context
        self._limits = limits
        patterns = [(*path_pattern(written), written, seconds) for written, seconds in limits.timeouts.items()]
        # Exact paths come first, then patterns with ``*``, the longest first.
        self._patterns = sorted(patterns, key=lambda each: (each[0], -len(each[1])))
        self._moved: dict[int, tuple[int, float]] = {}
        """For requests whose answer has begun, by id: the bytes sent on the connection, and when the last were sent."""
        self._stood: deque[tuple[float, float]] = deque(maxlen=_MOST_STOOD)
        """When the process went on after it had stood still, and for how many seconds it had, the last times."""
        self.next_moment = time.monotonic()
        """The time.monotonic() moment at which the first request may be due."""

    def look(self, now: float, before: float) -> None:
        """Give up and refuse the requests that are due, and set `next_moment`.

        If this comes much later than it should, the process stood still: none of the time since `before` is counted,
        the last moment in which the loop is known to have run.
        """
        if now - self.next_moment > _STOOD:
            self._stood.append((now, now - before))
        moments = [now + self._limits.shortest, self._look_at_queue(now), self._look_at_requests(now)]
        self.next_moment = max(min(moments), now + _LEAST)

    def _excuse(self, since: float) -> float:
        """Seconds for which the process has stood still since that moment."""
        return sum(seconds for until, seconds in self._stood if since < until)

    # --- requests that wait ---------------------------------------------------------------------------------------

    def _look_at_queue(self, now: float) -> float:
        if (limit := self._limits.queue_timeout) is None:
            return NEVER
        pool = self._context.pool
        while (channel := pool.take_late(lambda since: since + limit + self._excuse(since) <= now)) is not None:
            self._refuse(channel, now - channel.waits_since)
        return now + limit / _LOOKS if pool.queue else NEVER

    def _refuse(self, channel: Channel, waited: float) -> None:
        if channel.requests and channel.connected:
            channel.refuse("queue_timeout")
            log.warning(
                f"refused {channel.requests[0].snapshot()} with 503: it waited {waited:.1f}s for a thread "
                f"(server.queue_timeout is {format_duration(self._limits.queue_timeout or 0)})",
                extra=bounded_by("requests that waited too long for a thread"),
            )
        channel.serve_here()

    # --- requests that hang ---------------------------------------------------------------------------------------

    def _look_at_requests(self, now: float) -> float:
        moved, self._moved = self._moved, {}
        moment = NEVER
        if self._limits.timeout is None and not self._patterns:
            return moment
        streams = self._context.account.streams
        for request in list(self._context.account.in_hand.values()):
            if request.thread is None or not request.began or request.answered or request.channel in streams:
                continue
            limit, name = self._limit_of(request)
            if limit is None:
                continue
            since, sent = self._moved_at(request, moved, now)
            due = max(since + limit + self._excuse(since), request.more_until)
            if due <= now:
                request.channel.give_up(request, f"the app takes longer than {name} allows", sent)
                moment = min(moment, now + limit / _LOOKS)  # in case it could not be given up now
            else:
                moment = min(moment, due, now + limit / _LOOKS if request.id in self._moved else due)
        return moment

    def _moved_at(self, request: Request, before: dict[int, tuple[int, float]], now: float) -> tuple[float, int]:
        """When the app began, or its answer was last seen to move; and the bytes sent on the connection."""
        sent, waits = request.channel.flushed, request.channel.total_outbufs_len
        if sent <= request.starts_at and not waits:
            return request.began, sent
        was, since = before.get(request.id, (-1, now))
        since = now if waits or sent != was else since
        self._moved[request.id] = (sent, since)
        return since, sent

    def _limit_of(self, request: Request) -> tuple[float | None, str]:
        """How many seconds the app may take for a request (None: no limit), and the setting that says so."""
        for begins, path, written, seconds in self._patterns:
            if request.path == path or (begins and request.path.startswith(path)):
                return seconds, f"server.request_timeouts ({written}: {format_duration(seconds or 0)})"
        seconds = self._limits.timeout
        return seconds, f"server.request_timeout ({format_duration(seconds or 0)})"
