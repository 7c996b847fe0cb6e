"""The slots: the places of the workers, the workers that are being started for them, and how empty ones are filled.

There is one operation on a slot, `replace`: a new worker is started, and the old one stops when the new one is ready.
If the new one does not become ready, the old one stays.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

from flaskd.errors import AppError, FlaskdError, NotNowError
from flaskd.lifecycle import StopReason
from flaskd.pool.handle import Handle, Phase
from flaskd.pool.spawn import STACKS_WITHIN
from flaskd.serving.api import Outcome

log = logging.getLogger("flaskd.pool")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
"""Seconds until another worker is started for an empty slot; each failure doubles them."""
_LEAVES = 1.0
"""Seconds that a replaced worker has to close its copies of the listeners; then the replacement counts as done."""
_GOOD_LIFE = 30.0
"""A worker that dies after this many seconds is not a failure of its slot: the next one is started at once."""

CRASHED = StopReason("recycle", "its slot has another worker")


@dataclass
class Slot:
    """One place: `worker` serves in it, `coming` is being started for it."""

    number: int
    worker: Handle | None = None
    coming: Handle | None = None
    failures: int = 0
    """How many workers of this slot have failed in a row."""
    again_at: float = 0.0
    """The time.monotonic() moment before which no other worker is started for it."""
    reason: StopReason = CRASHED
    """The reason of the old worker's stop, once the new one is ready."""
    canary: float = 0.0
    """Seconds that the new worker has to live beside the old one after it is ready."""
    outcomes: list[Outcome] = field(default_factory=list, repr=False)
    """The functions to call with the outcome of the replacement."""
    late_at: float = 0.0
    """The time.monotonic() moment by which the new worker has to be ready."""

    def not_now(self, why: str) -> NotNowError:
        """Make the error that says why no worker is started for this slot now."""
        return NotNowError(f"cannot {'start' if self.worker is None else 'replace'} worker {self.number}: {why}")

    def tell(self, error: FlaskdError | None) -> None:
        """Call all functions that wait for the replacement; None: it is done."""
        outcomes, self.outcomes = self.outcomes, []
        for each in outcomes:
            each(error)


class Slots:
    """All slots, in the thread of the daemon's events alone.

    `launch` starts a worker for a slot and a generation (or raises FlaskdError), `serve` gives a worker its listeners,
    `leave` tells a worker to stop, `later` calls a function after a time in seconds, `failed` is called with the reason
    if an empty slot could not be filled.
    """

    def __init__(
        self,
        *,
        launch: Callable[[int, int], Handle],
        serve: Callable[[Handle], None],
        leave: Callable[[Handle, StopReason], None],
        later: Callable[[float, Callable[[], None]], None],
        start_timeout: Callable[[Handle], float],
        failed: Callable[[FlaskdError], None],
    ) -> None:
        self._launch, self._serve, self._leave, self._later = launch, serve, leave, later
        self._tell_failure = failed
        self._start_timeout = start_timeout
        self.slots: dict[int, Slot] = {}
        self._until_left: dict[Handle, list[Outcome]] = {}
        """The functions to call once a replaced worker accepts no more connections."""
        self.leaving: dict[Handle, None] = {}
        """Workers that are stopping and have no slot any more."""
        self.generation = 1
        """The generation of workers that fill empty slots."""
        self.proven = False
        """Whether any worker has been ready; before that a failed worker is not started again: the start fails."""
        self.held = False
        """Whether new workers get no listeners, because the service is drained."""
        self.ending = False
        """Whether no more workers are started."""

    def __iter__(self) -> Iterator[Slot]:
        return iter(list(self.slots.values()))

    def __contains__(self, slot: Slot) -> bool:
        return self.slots.get(slot.number) is slot

    @property
    def wanted(self) -> int:
        """How many slots there are."""
        return len(self.slots)

    @property
    def workers(self) -> list[Handle]:
        """The workers that serve or have served, and that stop with the service."""
        tried = [each.coming for each in self if each.coming is not None and each.coming.ready_at]
        return [*(each.worker for each in self if each.worker is not None), *tried]

    @property
    def all_workers(self) -> list[Handle]:
        """All workers whose processes have not ended."""
        coming = [each.coming for each in self if each.coming is not None and not each.coming.ready_at]
        return [*self.workers, *coming, *self.leaving]

    def not_of(self, generation: int) -> list[int]:
        """The slots that have no worker of a generation, and for which none is being started."""
        present = ((each.number, each.coming or each.worker) for each in self)
        return [number for number, worker in present if worker is None or worker.generation != generation]

    # --- changes ------------------------------------------------------------------------------------------------------

    def resize(self, count: int) -> list[Slot]:
        """Change the number of slots; workers of removed slots stop. Returns the new slots, which are empty."""
        for number in [each for each in self.slots if each >= count]:
            slot = self.slots.pop(number)
            self._drop_coming(slot, "there are fewer workers now")
            if slot.worker is not None:
                self._let_go(slot.worker, StopReason("recycle", f"scale {count}"))
        added = [Slot(number) for number in range(count) if number not in self.slots]
        self.slots.update({each.number: each for each in added})
        return added

    def scale(self, count: int, told: Outcome = lambda _: None) -> None:
        """Change the number of slots, and fill the new ones; `told` is called when all are filled, or one failed."""
        added = self.resize(count)
        left = set(map(id, added))

        def one(slot: Slot, error: FlaskdError | None) -> None:
            if id(slot) in left:
                left.discard(id(slot))
                if error is not None or not left:
                    left.clear()
                    told(error)

        for slot in added:
            self.replace(slot, self.generation, CRASHED, partial(one, slot))
        if not added:
            told(None)

    def fill(self, slot: Slot) -> None:
        """Start a worker for a slot, if it is empty and none is being started."""
        if slot.worker is None and slot.coming is None and not self.ending and slot in self:
            self.replace(slot, self.generation, CRASHED)

    def replace(
        self, slot: Slot, generation: int, reason: StopReason, outcome: Outcome | None = None, *, canary: float = 0.0
    ) -> None:
        """Start a worker of a generation for a slot; when it is ready, tell the old one to stop for this reason.

        First both serve for `canary` seconds; if the new one dies in that time, the old one stays. A worker that is
        being started for the slot already is ended first, and its outcomes get an error; if the slot is empty, they
        wait for the new worker instead.
        """
        if self.ending:
            if outcome is not None:
                outcome(slot.not_now("flaskd stops"))
            return
        waiting: list[Outcome] = []
        if slot.worker is None:
            waiting, slot.outcomes = slot.outcomes, []
        self._drop_coming(slot, "another replacement came first")
        slot.reason, slot.canary = reason, canary
        slot.outcomes = [*waiting, *([outcome] if outcome is not None else [])]
        try:
            slot.coming = self._launch(slot.number, generation)
        except FlaskdError as error:
            self._failed(slot, error)

    def _give_time(self, slot: Slot, coming: Handle) -> None:
        """Give a worker that is being started its start timeout, counted from now."""
        seconds = self._start_timeout(coming)
        why = f"it was not ready after {seconds:g}s (pool.start_timeout)"
        slot.late_at = time.monotonic() + seconds

        def late() -> None:
            if waits() and (left := slot.late_at - time.monotonic()) > 0:  # the time was extended
                self._later(left, late)
            elif waits():
                # The signal kills a worker that has no handler for it yet, so the error is set before.
                coming.error = coming.error or AppError(f"cannot start {coming}: {why}")
                coming.ask_for_stacks()
                self._later(STACKS_WITHIN, end)

        def end() -> None:
            if waits():
                if isinstance(coming.error, AppError) and not coming.error.details:
                    coming.error = AppError(str(coming.error), coming.stacks())
                coming.kill(why)

        def waits() -> bool:
            return slot.coming is coming and coming.phase in {Phase.LOADING, Phase.STARTING}

        self._later(seconds, late)

    def _drop_coming(self, slot: Slot, why: str) -> None:
        coming, slot.coming = slot.coming, None
        if coming is not None:
            if coming.ready_at:
                self._let_go(coming, slot.reason)
            else:
                coming.phase = Phase.LEAVING
                self.leaving[coming] = None
                coming.kill(why)  # it does not serve yet
            slot.tell(slot.not_now(why))

    def _let_go(self, worker: Handle, reason: StopReason) -> None:
        worker.phase = Phase.LEAVING
        self.leaving[worker] = None
        self._leave(worker, reason)

    def break_off(self, why: str) -> None:
        """End all workers that are being started to replace a serving one, and call their outcomes with an error.

        Also end workers that are being started of a generation other than `generation`. Then fill the empty slots.
        """
        for slot in self:
            coming = slot.coming
            if coming is not None and (slot.worker is not None or coming.generation != self.generation):
                self._drop_coming(slot, why)
            if slot.again_at <= time.monotonic():
                self.fill(slot)

    def hold(self, *, on: bool) -> None:
        """Stop giving listeners to new workers (`on`), or give them to those that wait for them.

        With `on`, a worker that has listeners but is not ready is ended, and another one is started without listeners.
        """
        self.held = on
        for slot in self:
            coming = slot.coming
            if coming is not None and not on and coming.phase is Phase.LOADED:
                self._let_serve(coming)
                self._give_time(slot, coming)
            elif coming is not None and on and coming.phase is Phase.STARTING and slot.worker is None:
                self.replace(slot, self.generation, slot.reason)

    def end(self) -> None:
        """Start no more workers, and end those that do not serve yet."""
        self.ending = True
        for slot in self:
            self._drop_coming(slot, "flaskd stops")

    # --- what workers report ------------------------------------------------------------------------------------------

    def made(self, worker: Handle) -> None:
        """Begin a worker's start timeout, because its process exists. Its template has had a timeout of its own."""
        slot = self.slots.get(worker.slot)
        if slot is not None and slot.coming is worker:
            self._give_time(slot, worker)

    def loaded(self, worker: Handle) -> None:
        """Note that a worker has loaded the app, and give it its listeners."""
        if worker.phase is Phase.LOADING:
            worker.phase = Phase.LOADED
            if not self.held:
                self._let_serve(worker)
            elif (slot := self.slots.get(worker.slot)) is not None and slot.coming is worker:
                slot.tell(None)  # it serves once flaskd resumes; the outcomes do not wait for that

    def _let_serve(self, worker: Handle) -> None:
        worker.phase = Phase.STARTING
        self._serve(worker)

    def ready(self, worker: Handle) -> bool:
        """Note that a worker has answered its probe; False if it was given up before."""
        slot = self.slots.get(worker.slot)
        if slot is None or slot.coming is not worker:
            return False  # it was given up just before
        worker.phase, worker.ready_at = Phase.READY, time.monotonic()
        if slot.canary and slot.worker is not None:
            self._later(slot.canary, lambda: self._take_place(slot, worker))
        else:
            self._take_place(slot, worker)
        if not self.proven:
            self.proven = True
            for each in self:
                if each.worker is None and each.coming is None:
                    self._try_again(each)
        return True

    def _take_place(self, slot: Slot, worker: Handle) -> None:
        if slot.coming is worker:
            before, slot.worker, slot.coming = slot.worker, worker, None
            if before is None:
                slot.tell(None)
            else:
                self._until_left[before], slot.outcomes = slot.outcomes, []
                self._let_go(before, slot.reason)
                self._later(_LEAVES, lambda: self.left(before))

    def left(self, worker: Handle) -> None:
        """A replaced worker accepts no more connections: its replacement is complete, so call the outcomes."""
        for each in self._until_left.pop(worker, ()):
            each(None)

    def lost(self, worker: Handle, why: str) -> None:
        """Take a worker out of its slot that stops without being told to."""
        slot = self.slots.get(worker.slot)
        if slot is None or worker not in {slot.worker, slot.coming}:
            return
        worker.phase = Phase.LEAVING
        self.leaving[worker] = None
        if slot.worker is worker:
            slot.worker = None
            self._vacated(slot, worker)
        else:
            slot.coming = None
            self._failed(slot, AppError(f"{worker} was ready, and stopped within pool.canary: {why}"))

    def gone(self, worker: Handle) -> None:
        """Take a worker out of its slot whose process has ended."""
        self.left(worker)
        worker.phase = Phase.GONE
        slot = self.slots.get(worker.slot)
        if worker in self.leaving:
            del self.leaving[worker]
        elif slot is not None and slot.coming is worker:
            slot.coming = None
            self._failed(slot, worker.why_gone())
        elif slot is not None and slot.worker is worker:
            slot.worker = None
            self._vacated(slot, worker)

    def _vacated(self, slot: Slot, worker: Handle) -> None:
        if time.monotonic() - worker.ready_at >= _GOOD_LIFE:
            slot.failures = 0
        self._try_again(slot)

    def _failed(self, slot: Slot, error: FlaskdError) -> None:
        slot.tell(error)
        if slot.worker is None and not self.ending:
            self._tell_failure(error)
            slot.failures += slot.failures == 0  # not 0, so that there is a pause
            self._try_again(slot)

    def _try_again(self, slot: Slot) -> None:
        """Fill an empty slot: at once, or after failures, after a pause that grows with their number."""
        if not self.proven:
            return
        pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(slot.failures - 1, 10)) if slot.failures else 0.0
        slot.failures += 1
        slot.again_at = time.monotonic() + pause
        if not self.ending:
            if pause:
                log.warning(f"worker {slot.number} is started again in {pause:g}s")
            self._later(pause, lambda: self.fill(slot))
