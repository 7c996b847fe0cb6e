"""Replacing workers that have reached a limit, one at a time.

The limits are `pool.max_requests`, `max_age` and `max_memory`. A worker is also replaced if one of its threads hangs in
a request that was given up (`server.request_timeout`).
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf

from flaskd.config import Config
from flaskd.config.fields import write_size
from flaskd.errors import FlaskdError, NotNowError, shortage
from flaskd.lifecycle import StopReason
from flaskd.pool.handle import Handle
from flaskd.pool.slots import Slots
from flaskd.pool.sums import Sums
from flaskd.process.usage import exists, read_pss, resident
from flaskd.serving.api import Outcome
from flaskd.units import format_duration
from flaskd.values import value

log = logging.getLogger("flaskd.pool")

_LOOK, _LOOK_CLOSELY = 0.5, 0.1
"""Seconds between two looks; the second while a worker uses more than half of `max_memory`."""
_JITTER = 0.1
"""The largest part of a limit by which a worker's own limit is lower."""
_GROWTH_OVER, _STARTS = 5.0, 3.0
"""The growth of a worker is averaged over at least this many seconds, and over at least this many times the length of
its start, because what it loads at first is not a leak. So at most a third of its growth so far is expected to come
while another worker starts."""
_READING = 50.0
"""A worker's memory is read again after this many times the length of the last reading: it takes 2 % of a core."""
_OVERGROWN = 1.3
"""At this many times `max_memory`, the log says that a worker grows faster than it can be replaced."""
_SOON = 2.0
"""A worker that reaches a limit within this many seconds after it was ready has reached it too soon."""
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 300.0
"""Seconds without a replacement after one that came too soon or failed; each further one doubles them."""
_MIB = 1024**2
_CALM = 60.0
"""Seconds without a worker at a limit after which the trouble is over."""


@dataclass
class _Seen:
    """What was seen of a serving worker; all moments are those of time.monotonic()."""

    share: float = field(default_factory=lambda: random.uniform(1 - _JITTER, 1))  # noqa: S311 - no secret
    """The part of each limit that is its own: so workers that began together do not reach a limit together."""
    memory: int = 0
    """Its memory in bytes at the last reading; 0 if it was certainly below the limit."""
    resident_then: int | None = None
    """Its resident set in bytes at the first look."""
    half_full: bool = False
    """Whether it may use more than half of `max_memory`."""
    ahead: float = 0.0
    """Bytes by which it will have grown when another worker is ready, if it grows as it has so far."""
    read_again_at: float = 0.0
    reading: bool = False
    reached_at: float = 0.0
    """When it was first seen at a limit."""
    memory_then: int = 0
    overgrown: bool = False


@value
class _Reached:
    """A limit that a worker has reached: its key, the worker's value divided by the limit, and a text for the log."""

    key: str
    times: float
    text: str


class Recycling:
    """Looks at all workers every `_LOOK` seconds, in the thread of the events, once it has begun.

    Memory is PSS. To read it the kernel walks through the worker's pages, and may have to wait for the worker: so it is
    read in another thread, and only if the resident set, which is never smaller and quick to read, has reached the
    limit. `replace` begins to replace a worker, unless flaskd stops, and calls the outcome when the new worker has its
    place, or did not become ready. `busy` says whether workers are being replaced for another reason. `changed` is
    called when `Sums.trouble` has changed.
    """

    def __init__(
        self,
        slots: Slots,
        sums: Sums,
        *,
        config: Callable[[], Config],
        do: Callable[[Callable[[], None]], None],
        later: Callable[[float, Callable[[], None]], None],
        replace: Callable[[Handle, StopReason, Outcome], bool],
        busy: Callable[[], bool],
        changed: Callable[[], None],
    ) -> None:
        self._slots, self._sums, self._config = slots, sums, config
        self._do, self._later, self._replace, self._busy, self._changed = do, later, replace, busy, changed
        self._seen: dict[Handle, _Seen] = {}
        self._limits: tuple[int | None, float | None, int | None] = (None, None, None)
        self._pause = self._not_before = self._calm_since = 0.0
        self._told_unreadable = False

    def begin(self) -> None:
        """Begin to look at the workers."""
        self._later(_LOOK, self._look)

    def _look(self) -> None:
        try:
            pool = self._config().pool
            limits = (pool.max_requests, pool.max_age, pool.max_memory)
            if limits != self._limits:
                self._limits = limits
                self._well()
            serving = [each.worker for each in self._slots if each.worker is not None and each.worker.serves]
            self._seen = {each: self._seen.get(each) or _Seen() for each in serving}
            if pool.max_memory:
                for worker, seen in self._seen.items():
                    self._look_at_memory(worker, seen, pool.max_memory)
            self._judge()
        finally:
            closely = self._limits[-1] and any(each.half_full for each in self._seen.values())
            self._later(_LOOK_CLOSELY if closely else _LOOK, self._look)

    def _judge(self) -> None:
        """Replace the worker that is farthest beyond a limit, if a replacement may begin now."""
        due, now = [], time.monotonic()
        for worker, seen in self._seen.items():
            if worker.serves and (reached := self._reached(worker, seen)) is not None:
                if not seen.reached_at:
                    seen.reached_at, seen.memory_then = now, seen.memory
                due.append((worker, reached))
                self._tell_overgrown(worker, seen)
        if due:
            self._calm_since = now
        elif now - self._calm_since >= _CALM:
            self._well()
        if due and self._may(now):
            self._recycle(*max(due, key=lambda each: each[1].times), now)

    def _reached(self, worker: Handle, seen: _Seen) -> _Reached | None:
        """The limit that a worker has reached; of several, the one that it is farthest beyond."""
        requests, age, memory = self._limits
        found: list[_Reached] = []

        def compare(key: str, value: float, limit: float | None, words: str, write: Callable[[float], str]) -> None:
            if limit and value >= (own := limit * seen.share):
                text = f"{words} (pool.{key} is {write(limit)}; its own limit {write(own)})"
                found.append(_Reached(key, value / own, text))

        if requests:
            outcomes = worker.board.tally().outcomes
            taken = sum(outcomes.values()) - outcomes["rejected"]
            compare("max_requests", taken, requests, f"it has dealt with {taken} requests", lambda each: f"{each:.0f}")
        compare("max_age", worker.age, age, f"it is {_in_seconds(worker.age)} old", _in_seconds)
        if memory and seen.memory:
            more = f", and {_in_mib(seen.ahead)} more when another worker is ready" if seen.ahead >= _MIB else ""
            compare(
                "max_memory", seen.memory + seen.ahead, memory, f"its memory is {_in_mib(seen.memory)}{more}", _in_mib
            )
        if lost := worker.board.lost:
            text = f"{lost} of its threads {'hang' if lost > 1 else 'hangs'} in requests that were given up"
            found.append(_Reached("request_timeout", inf, text))
        return max(found, key=lambda each: each.times, default=None)

    def _may(self, now: float) -> bool:
        """Whether a replacement may begin now: no other is under way, and not too many workers are still stopping."""
        return not (
            now < self._not_before
            or self._busy()
            or any(each.worker is None or each.coming is not None for each in self._slots)
            or len(self._slots.leaving) >= self._slots.wanted
        )

    def _recycle(self, worker: Handle, reached: _Reached, now: float) -> None:
        seen = self._seen[worker]
        lived = seen.reached_at - worker.ready_at

        def told(error: FlaskdError | None) -> None:
            if isinstance(error, NotNowError):
                return  # a drain, a reload or another number of workers came first
            if error is not None:
                self._slow_down(f"{worker} has reached {_named(reached.key)}, and its replacement did not become ready")
                return
            if worker.death:
                return  # it died meanwhile, and its slot was filled again
            self._sums.recycled[reached.key] += 1
            took = time.monotonic() - now
            if lived < max(_SOON, took * self._slots.wanted):
                self._too_soon(worker, reached.key, lived, took)
            elif not seen.overgrown:
                self._well()

        self._replace(worker, StopReason("recycle", reached.text), told)

    # --- trouble ------------------------------------------------------------------------------------------------------

    def _too_soon(self, worker: Handle, key: str, lived: float, took: float) -> None:
        if key != "max_memory":
            why = "workers cannot be replaced so often"
        elif lived < _SOON:
            why = "the app needs that much right after its start, or it grows faster than workers can be replaced"
        else:
            why = "it grows faster than workers can be replaced"
        after = f"{lived:.1f}s after it was ready, and it took {took:.1f}s to replace it"
        advice = "the log has the stacks of what hangs" if key == "request_timeout" else "raise the limit"
        said = f"{worker} reached {_named(key)}{self._written(key)} {after}: {why}; {advice}"
        if key == "max_memory" and lived >= _SOON:
            self._pause = 0.0  # workers would grow during a pause, and only one starts at a time anyway
            log.warning(said)
            self._say(said)
        else:
            self._slow_down(said)

    def _tell_overgrown(self, worker: Handle, seen: _Seen) -> None:
        """Log, once for a worker, that it grows while its replacement is due; a pause has a log line of its own."""
        limit = self._limits[-1]
        grows = limit is not None and seen.memory >= limit * _OVERGROWN and seen.memory > seen.memory_then
        if limit and grows and not seen.overgrown and not self._pause:
            seen.overgrown = True
            what = f"{_in_mib(seen.memory)}, {seen.memory / limit:.1f} times pool.max_memory ({_in_mib(limit)})"
            why = f"{worker} grows faster than it can be replaced: its memory is {what}, and no other one is ready yet"
            log.error(why)
            self._say(why)

    def _written(self, key: str) -> str:
        limit = getattr(self._config().pool, key, None)
        if limit is None:
            return ""
        return f" ({write_size(limit) if key == 'max_memory' else _in_seconds(limit) if key == 'max_age' else limit})"

    def _slow_down(self, why: str) -> None:
        self._pause = min(_LONGEST_PAUSE, self._pause * 2 or _FIRST_PAUSE)
        self._not_before = time.monotonic() + self._pause
        log.warning(f"{why}. The next worker is replaced in {self._pause:g}s at the earliest")
        self._say(why)

    def _well(self) -> None:
        self._pause = self._not_before = 0.0
        self._say("")

    def _say(self, trouble: str) -> None:
        if trouble != self._sums.trouble:
            self._sums.trouble = trouble
            self._changed()

    # --- memory -------------------------------------------------------------------------------------------------------

    def _look_at_memory(self, worker: Handle, seen: _Seen, limit: int) -> None:
        held = resident(worker.pid)
        seen.half_full = held is None or held >= limit / 2
        if held is not None:
            seen.resident_then = held if seen.resident_then is None else seen.resident_then
            start, lived = worker.ready_at - worker.born, time.monotonic() - worker.ready_at
            growth = max(0, held - seen.resident_then) / max(_GROWTH_OVER, _STARTS * start, lived)
            seen.ahead = growth * start
        if held is not None and held + seen.ahead < limit * seen.share:
            seen.memory = 0
        elif not seen.reading and time.monotonic() >= seen.read_again_at:
            seen.reading = True
            try:
                aside(f"flaskd-memory-{worker.slot}", lambda: self._read(worker, seen))
            except RuntimeError as error:  # no thread can be started
                seen.reading = False
                self._tell_unreadable(worker, str(shortage(error) or error))

    def _read(self, worker: Handle, seen: _Seen) -> None:
        """Read the memory of a worker (a thread of its own)."""
        began, memory, why = time.monotonic(), 0, ""
        try:
            memory = read_pss(worker.pid)
        except ProcessLookupError:
            pass  # it has just ended
        except (OSError, ValueError) as error:
            why = str(error) if exists(worker.pid) else ""
        took = time.monotonic() - began

        def over() -> None:
            seen.memory, seen.reading = memory, False
            seen.read_again_at = time.monotonic() + took * _READING
            if why:
                self._tell_unreadable(worker, why)
            self._judge()

        self._do(over)

    def _tell_unreadable(self, worker: Handle, why: str) -> None:
        if not self._told_unreadable:
            self._told_unreadable = True
            log.error(f"cannot read the memory of {worker}: {why}; until that changes, pool.max_memory has no effect")


def aside(name: str, work: Callable[[], None]) -> None:
    """Call `work`, which may take long, in a thread of its own."""
    threading.Thread(target=work, name=name, daemon=True).start()


def _named(key: str) -> str:
    return f"server.{key}" if key == "request_timeout" else f"pool.{key}"


def _in_mib(size: float) -> str:
    return f"{size / _MIB:.0f} MiB"


def _in_seconds(seconds: float) -> str:
    return format_duration(round(seconds, 1))
