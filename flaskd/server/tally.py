"""What became of all requests since the start, and how long they took; counted where a request is over."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Any

from flaskd.server.request import Request

BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of the buckets of a histogram, in seconds; one more bucket holds what is above."""


_CLASSES = {str(digit): digit for digit in range(1, 6)}


@dataclass(slots=True)
class Histogram:
    """How many lengths of time fell into which bucket, and their sum in seconds."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    total: float = 0.0

    def add(self, seconds: float) -> None:
        """Count one; a value on a bound belongs to the bucket below it, as Prometheus has it."""
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.total += seconds

    def copy(self) -> Histogram:
        """A copy that does not change."""
        return Histogram(self.counts.copy(), self.total)


@dataclass(slots=True)
class Tally:
    """Requests by outcome and by class of their status; how long they took, and how long they waited for a thread.

    `outcomes` has ``completed``, ``rejected``, ``cut`` and ``gone`` (the client left). `statuses` is indexed by the
    first digit of the status; 0 is for those without an answer. Times run from a request's first byte to the moment
    that the kernel took the last of its answer.
    """

    outcomes: dict[str, int] = field(default_factory=lambda: {"completed": 0, "rejected": 0, "cut": 0, "gone": 0})
    statuses: list[int] = field(default_factory=lambda: [0] * 6)
    took: Histogram = field(default_factory=Histogram)
    waited: Histogram = field(default_factory=Histogram)

    def add(self, request: Request, outcome: str, now: float) -> None:
        """Count a request that is over at `now`, a time.monotonic() moment; some microseconds (callers hold a lock)."""
        self.outcomes[outcome] += 1
        first = request.status[:1]
        self.statuses[_CLASSES.get(first, 0)] += 1
        # What `Histogram.add` does; this runs for every request.
        if first:
            took, seconds = self.took, now - request.first_byte
            took.counts[bisect_left(BOUNDS, seconds)] += 1
            took.total += seconds
        if request.began:
            waited, seconds = self.waited, request.began - request.complete
            waited.counts[bisect_left(BOUNDS, seconds)] += 1
            waited.total += seconds

    def copy(self) -> Tally:
        """A copy that does not change."""
        return Tally(self.outcomes.copy(), self.statuses.copy(), self.took.copy(), self.waited.copy())

    def as_json(self) -> dict[str, Any]:
        """Stable keys for programs; `took` and `waited` have the count of each bucket, and the sum in seconds."""
        return {
            "outcomes": dict(self.outcomes),
            "statuses": {f"{digit}xx": self.statuses[digit] for digit in range(1, 6)},
            "bounds": list(BOUNDS),
            "took": {"counts": list(self.took.counts), "sum": round(self.took.total, 6)},
            "waited": {"counts": list(self.waited.counts), "sum": round(self.waited.total, 6)},
        }
