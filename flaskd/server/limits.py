"""What bounds requests: how long the app may take, how long and beside how many they may wait, how slow clients are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from flaskd.server.timers import NEVER


@dataclass(frozen=True)
class Limits:
    """The limits of one server; times in seconds, None for no limit.

    `timeouts` are those of some paths, exact or with ``*`` at their end for all that begin so.
    """

    timeout: float | None = None
    timeouts: Mapping[str, float | None] = field(default_factory=dict)
    queue_timeout: float | None = None
    max_queue: int | None = None
    """How many requests may wait for a thread."""
    head_timeout: float = NEVER
    """Seconds in which the head of a request has to come, from its first byte on."""
    min_rate: int = 0
    """Bytes a second that a client has to send of a body, or read of an answer, over each `channel_timeout`."""

    @property
    def shortest(self) -> float:
        """The least of the times that the app and the queue have, infinity where there is none."""
        return min(filter(None, (self.timeout, self.queue_timeout, *self.timeouts.values())), default=NEVER)


NO_LIMITS = Limits()
