"""Workers that hang: what each thread was at is logged, another worker comes, and the one that hangs is killed last."""

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
"""Seconds that a look may be late; later ones show that the whole service had stopped, or the machine."""
_SILENT = 10.0
"""Seconds without a turn after which the loop of a worker hangs; it turns once a second at least."""
_STACKS = 1.0
"""Seconds that a worker has to write the stacks of its threads."""
_AGAIN = 30.0
"""Seconds until a replacement is tried again that did not become ready."""


@dataclass
class _Seen:
    """What was seen of a worker; moments of time.monotonic()."""

    at: Hashable | None
    """What all of its threads are at; None while one is free."""
    since: float
    told: bool = False
    """Whether it was told that it hangs; it may come to itself, and hang again."""
    replaced_at: float = 0.0


class Watch:
    """Looks at all workers once a second, in the thread of the events, once it has begun.

    `replace` starts another worker in the place of one, and says whether it does.
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
        """Begin to look."""
        self._well_since = time.monotonic()
        self._look_later()

    def _look_later(self) -> None:
        self._due = time.monotonic() + _LOOK
        self._later(_LOOK, self._look)

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._due > _LATE:  # a beat that is late for everybody is the fault of none
            self._well_since = now
            for slot in self._slots:
                slot.late_at += now - self._due
        try:
            everybody = self._slots.everybody
            self._seen = {each: seen for each, seen in self._seen.items() if each in everybody}
            for each in everybody:
                self._look_at(each, now)
        finally:
            self._look_later()

    def _look_at(self, worker: Handle, now: float) -> None:
        if worker.deaf_since and now - worker.deaf_since > self._config().shutdown.deadline:
            worker.kill("its wire had ended long before")
        if worker.phase is not Phase.READY:  # others have a deadline, or nothing in hand
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
        """Why a worker hangs, in words; empty where it does not."""
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
        log.error(f"what the threads of {worker} are at:\n{stacks}" if stacks else f"{worker} does not tell its stacks")
