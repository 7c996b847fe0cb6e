"""How all requests since the start ended, and how long they took; each is counted when it is over."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import add
from typing import Any

from flaskd.server.request import Request

BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper bounds of a histogram's buckets, in seconds; one more bucket counts all longer times."""
_SHORTEST = BOUNDS[0]

_OUTCOMES = ("completed", "rejected", "cut", "gone")
_STATUSES = 6
_BUCKETS = len(BOUNDS) + 1

# The positions of the counts in `Counts`, in the order of a tally: the outcomes come first.
_OUTCOME_AT = {outcome: index for index, outcome in enumerate(_OUTCOMES)}
_STATUS_AT = len(_OUTCOMES)
_CLASS_AT = {str(digit): _STATUS_AT + digit for digit in range(1, _STATUSES)}
_TOOK_AT = _STATUS_AT + _STATUSES
_WAITED_AT = _TOOK_AT + _BUCKETS
_LIMITED_AT = _WAITED_AT + _BUCKETS
LIMITS = (
    *("request_timeout", "queue_timeout", "max_queue"),
    *("head_timeout", "min_rate", "channel_timeout", "connection_limit", "outbuf_high_watermark"),
)
"""The limits whose effects are counted, by the names of their settings."""
_COMMON_AT = _LIMITED_AT + len(LIMITS)
"""Where the most common requests are counted, once instead of four times: completed, with a status 2xx, and both times
in the first bucket."""
COUNTS = _COMMON_AT + 1
"""How many counts a tally has."""
SUMS = 2
"""How many sums of seconds a tally has: how long requests took, and how long they waited."""


def _sums(some: Sequence[int], others: Sequence[int]) -> list[int]:
    return list(map(add, some, others))


@dataclass(slots=True)
class Histogram:
    """How many times fell into each bucket, and their sum in seconds."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    total: float = 0.0

    def add(self, seconds: float) -> None:
        """Count one time; a value equal to a bound belongs to the bucket below it, as in Prometheus."""
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.total += seconds

    def __add__(self, other: Histogram) -> Histogram:
        """The sum of two histograms."""
        return Histogram(_sums(self.counts, other.counts), self.total + other.total)


@dataclass(slots=True)
class Tally:
    """Requests by outcome and by class of their status; how long they took, and how long they waited for a thread.

    `outcomes` has ``completed``, ``rejected``, ``cut`` and ``gone`` (the client left). `statuses` is indexed by the
    first digit of the status; 0 is for requests without an answer. `limited` says how often each limit took effect.
    `took` runs from a request's first byte to the moment when the kernel took the last byte of its answer.
    """

    outcomes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_OUTCOMES, 0))
    statuses: list[int] = field(default_factory=lambda: [0] * _STATUSES)
    took: Histogram = field(default_factory=Histogram)
    waited: Histogram = field(default_factory=Histogram)
    limited: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LIMITS, 0))

    def __add__(self, other: Tally) -> Tally:
        """The sum of two tallies, for example of two workers."""
        return Tally(
            {outcome: count + other.outcomes[outcome] for outcome, count in self.outcomes.items()},
            _sums(self.statuses, other.statuses),
            self.took + other.took,
            self.waited + other.waited,
            {limit: count + other.limited[limit] for limit, count in self.limited.items()},
        )

    def as_json(self) -> dict[str, Any]:
        """Stable keys for programs; `took` and `waited` have a count for each bucket, and the sum in seconds."""
        return {
            "outcomes": dict(self.outcomes),
            "statuses": {f"{digit}xx": self.statuses[digit] for digit in range(1, 6)},
            "bounds": list(BOUNDS),
            "took": {"counts": list(self.took.counts), "sum": round(self.took.total, 6)},
            "limited": dict(self.limited),
            "waited": {"counts": list(self.waited.counts), "sum": round(self.waited.total, 6)},
        }


class Counts:
    """The counts behind a tally, in lists or in memory that another process reads while they change."""

    __slots__ = ("_counts", "_sums")

    def __init__(
        self, counts: list[int] | memoryview[int] | None = None, sums: list[float] | memoryview[float] | None = None
    ) -> None:
        self._counts = [0] * COUNTS if counts is None else counts
        self._sums = [0.0] * SUMS if sums is None else sums

    def add(self, request: Request, outcome: str, now: float) -> None:
        """Count a request that is over at `now`, a time.monotonic() moment; the caller holds a lock."""
        counts, sums, first, began = self._counts, self._sums, request.status[:1], request.began
        took, waited = now - request.first_byte, began - request.complete
        if took <= _SHORTEST and waited <= _SHORTEST and began and first == "2" and outcome == "completed":
            counts[_COMMON_AT] += 1
            sums[0] += took
            sums[1] += waited
            return
        counts[_OUTCOME_AT[outcome]] += 1
        counts[_CLASS_AT.get(first, _STATUS_AT)] += 1
        if first:
            counts[_TOOK_AT + bisect_left(BOUNDS, took)] += 1
            sums[0] += took
        if began:
            counts[_WAITED_AT + bisect_left(BOUNDS, waited)] += 1
            sums[1] += waited

    def limited(self, limit: str) -> None:
        """Count that a limit took effect; the caller holds a lock."""
        self._counts[_LIMITED_AT + LIMITS.index(limit)] += 1

    def tally(self) -> Tally:
        """The tally so far; a copy."""
        counts, (took, waited) = list(self._counts), self._sums
        common = counts.pop()
        for at in (_OUTCOME_AT["completed"], _CLASS_AT["2"], _TOOK_AT, _WAITED_AT):
            counts[at] += common
        return Tally(
            dict(zip(_OUTCOMES, counts, strict=False)),
            counts[_STATUS_AT:_TOOK_AT],
            Histogram(counts[_TOOK_AT:_WAITED_AT], took),
            Histogram(counts[_WAITED_AT:_LIMITED_AT], waited),
            dict(zip(LIMITS, counts[_LIMITED_AT:], strict=True)),
        )
