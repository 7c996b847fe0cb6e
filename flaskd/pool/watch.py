"""Workers that hang: their stacks are logged, they are replaced, and killed if they do not stop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from flaskd.config import Config
from flaskd.lifecycle import StopReason
from flaskd.pool.handle import Handle, Phase
from flaskd.pool.slots import Slots

log = logging.getLogger("flaskd.pool")

_LOOK = 1.0
"""Seconds between two looks."""
_LATE = 2.0
"""Seconds that a look may be late; a later one shows that the whole service or the machine stood still."""
_SILENT = 10.0
"""Seconds after which a worker whose event loop has not turned counts as hanging; a good loop turns every second."""
_STACKS = 1.0
"""Seconds that a worker has to write the stacks of its threads."""
_AGAIN = 30.0
"""Seconds until a hanging worker is replaced again if its replacement did not become ready."""


@dataclass
class _Seen:
    """What was seen of a worker; all moments are those of time.monotonic()."""

    at: Hashable | None
    """The last value of `Board.all_are_at`, which changes when any thread makes progress; None while one is free."""
    since: float
    told: bool = False
    """Whether the log says that it hangs; it may recover, and hang again."""
    replaced_at: float = 0.0


class Watch:
    """Looks at all workers once a second, in the thread of the events, once it has begun.

    `replace` begins to replace a worker, and returns whether it does.
    """

    def __init__(
        self,
        slots: Slots,
        *,
        config: Callable[[], Config],
        later: Callable[[float, Callable[[], None]], None],
        replace: Callable[[Handle, StopReason], bool],
    ) -> None:
        self._slots, self._config, self._later, self._replace = slots, config, later, replace
        self._due = self._well_since = 0.0
        self._seen: dict[Handle, _Seen] = {}

    def begin(self) -> None:
        """Begin to look at the workers."""
        self._well_since = time.monotonic()
        self._look_later()

    def _look_later(self) -> None:
        self._due = time.monotonic() + _LOOK
        self._later(_LOOK, self._look)

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._due > _LATE:  # no worker is to blame for a look that is late
            self._well_since = now
            for slot in self._slots:
                slot.late_at += now - self._due
        try:
            workers = self._slots.all_workers
            self._seen = {each: seen for each, seen in self._seen.items() if each in workers}
            for each in workers:
                self._look_at(each, now)
        finally:
            self._look_later()

    def _look_at(self, worker: Handle, now: float) -> None:
        if worker.deaf_since and now - worker.deaf_since > self._config().shutdown.deadline:
            worker.kill("it had closed its connection to the supervisor long before")
        if worker.phase is not Phase.READY:  # all others have a deadline, or no requests
            self._seen.pop(worker, None)
            return
        seen, at = self._seen.get(worker), worker.board.all_are_at()
        if seen is None:
            seen = self._seen[worker] = _Seen(at, now)
        elif at is None or at != seen.at:
            seen.at, seen.since = at, now
        why = self._hangs(worker, seen, now)
        if not why:
            seen.told = False
        elif not seen.told:
            seen.told = True
            log.error(f"{worker} hangs: {why}")
            worker.ask_for_stacks()
            self._later(_STACKS, lambda: _tell_stacks(worker))
        if why and now - seen.replaced_at >= _AGAIN and self._replace(worker, StopReason("recycle", why)):
            seen.replaced_at = now

    def _hangs(self, worker: Handle, seen: _Seen, now: float) -> str:
        """Why a worker counts as hanging, in words; empty if it does not."""
        silent = now - max(worker.board.last_turn, worker.ready_at, self._well_since)
        if silent >= _SILENT:
            return f"its loop has not turned for {silent:.0f}s"
        after, hung = self._config().pool.stuck_after, now - max(seen.since, self._well_since)
        if after is not None and seen.at is not None and hung >= after:
            return f"all of its threads have been in the same requests for {hung:.0f}s (pool.stuck_after is {after:g}s)"
        return ""


def _tell_stacks(worker: Handle) -> None:
    if worker.alive:
        stacks = worker.stacks().rstrip()
        log.error(f"the stacks of {worker}:\n{stacks}" if stacks else f"{worker} did not write its stacks")
