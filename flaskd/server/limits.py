"""What bounds a request: how long the app may take for it, how long it may wait for a thread, and beside how many."""

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

    @property
    def shortest(self) -> float:
        """The least of all times, infinity where there is none."""
        return min(filter(None, (self.timeout, self.queue_timeout, *self.timeouts.values())), default=NEVER)


NO_LIMITS = Limits()
