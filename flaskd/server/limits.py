"""The limits of requests: how long the app may take, how long and how many may wait, and how slow clients may be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field

from flaskd.server.timers import NEVER
from flaskd.values import value


@value
class Limits:
    """The limits of one server; times in seconds, None for no limit.

    `timeout` is for the app's work on one request; `timeouts` replaces it for some paths, exact or with ``*`` at the
    end for all paths that begin so. `queue_timeout` is for the wait for a thread.
    """

    timeout: float | None = None
    timeouts: Mapping[str, float | None] = field(default_factory=dict)
    queue_timeout: float | None = None
    max_queue: int | None = None
    """How many requests may wait for a thread."""
    head_timeout: float = NEVER
    """Seconds in which the whole head of a request has to come, counted from its first byte."""
    min_rate: int = 0
    """Bytes a second that a client has to send of a body, or read of an answer, on average over `channel_timeout`."""

    @property
    def shortest(self) -> float:
        """The shortest of the times for the app and the queue, in seconds; infinity if there is none."""
        return min(filter(None, (self.timeout, self.queue_timeout, *self.timeouts.values())), default=NEVER)


NO_LIMITS = Limits()
