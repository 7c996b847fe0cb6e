"""The places of the workers: which worker has which one, who comes in its stead, and how an empty one is filled again.

To replace is the one thing that is done to a place: a new worker is started, the old one leaves when that is ready. A
replacement that does not become ready leaves the old worker where it is.
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
"""Seconds until an empty slot is tried again; each failure doubles them."""
_LEAVES = 1.0
"""Seconds that a worker which is replaced has to close its copies of the listeners; then it is done all the same."""
_GOOD_LIFE = 30.0
"""Seconds after which a worker that dies is no failure of its slot: the next one is started at once."""

CRASHED = StopReason("recycle", "its slot has another worker")


@dataclass
class Slot:
    """One place. `worker` serves in it, `coming` is started for it."""

    number: int
    worker: Handle | None = None
    coming: Handle | None = None
    failures: int = 0
    """How often in a row a worker of it has failed."""
    again_at: float = 0.0
    """The time.monotonic() moment before which it stays empty."""
    reason: StopReason = CRASHED
    """What its worker will be told when the one that comes is ready."""
    canary: float = 0.0
    """Seconds that the one that comes has to live beside the old one, once it is ready."""
    outcomes: list[Outcome] = field(default_factory=list, repr=False)
    """Wait for the one that comes."""
    late_at: float = 0.0
    """The time.monotonic() moment at which the one that comes has to be ready."""

    def not_now(self, why: str) -> NotNowError:
        """Why no worker is started for it."""
        return NotNowError(f"cannot {'start' if self.worker is None else 'replace'} worker {self.number}: {why}")

    def tell(self, error: FlaskdError | None) -> None:
        """Tell who waits for the replacement."""
        outcomes, self.outcomes = self.outcomes, []
        for each in outcomes:
            each(error)


class Slots:
    """All places; in the thread of the daemon's events alone.

    `launch` starts a worker for a slot and a generation (FlaskdError where that cannot be), `serve` gives one its
    listeners, `leave` tells one to stop, `later` calls a function after so many seconds, `failed` is told why an empty
    slot could not be filled.
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
        """Who waits until a worker that is replaced accepts no connection any more."""
        self.leaving: dict[Handle, None] = {}
        """Workers that stop, and have no place any more."""
        self.generation = 1
        """Of the workers that are started to fill an empty slot."""
        self.proven = False
        """Whether any worker was ready so far; before that one that fails is not started again, for the start fails."""
        self.held = False
        """Whether workers get no listeners: it is drained."""
        self.ending = False
        """Whether no worker is started any more."""

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
        """Those that serve, or have served, and stop with the service."""
        tried = [each.coming for each in self if each.coming is not None and each.coming.ready_at]
        return [*(each.worker for each in self if each.worker is not None), *tried]

    @property
    def everybody(self) -> list[Handle]:
        """All processes that are not gone."""
        coming = [each.coming for each in self if each.coming is not None and not each.coming.ready_at]
        return [*self.workers, *coming, *self.leaving]

    def not_of(self, generation: int) -> list[int]:
        """The slots that have no worker of a generation, and none of it coming."""
        present = ((each.number, each.coming or each.worker) for each in self)
        return [number for number, worker in present if worker is None or worker.generation != generation]

    # --- what is done to them -----------------------------------------------------------------------------------------

    def resize(self, count: int) -> list[Slot]:
        """Have so many slots, and give the new ones, which are empty; workers of those that are too many leave."""
        for number in [each for each in self.slots if each >= count]:
            slot = self.slots.pop(number)
            self._drop_coming(slot, "there are fewer workers now")
            if slot.worker is not None:
                self._let_go(slot.worker, StopReason("recycle", f"scale {count}"))
        added = [Slot(number) for number in range(count) if number not in self.slots]
        self.slots.update({each.number: each for each in added})
        return added

    def scale(self, count: int, told: Outcome = lambda _: None) -> None:
        """Have so many slots, and fill the new ones; `told` hears once all of them are, or why one is not."""
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
        """Start a worker for an empty slot, unless one is being started."""
        if slot.worker is None and slot.coming is None and not self.ending and slot in self:
            self.replace(slot, self.generation, CRASHED)

    def replace(
        self, slot: Slot, generation: int, reason: StopReason, outcome: Outcome | None = None, *, canary: float = 0.0
    ) -> None:
        """Start a worker of a generation for a slot; when it is ready, the old one is told to leave for that reason.

        With `canary` both serve for so many seconds; should the new one die meanwhile, the old one stays. One that is
        being started there is ended first, and who waits for it is told; for an empty slot, when that is filled.
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
        """Let the one that comes have the time of a start, from now on."""
        seconds = self._start_timeout(coming)
        why = f"it was not ready after {seconds:g}s (pool.start_timeout)"
        slot.late_at = time.monotonic() + seconds

        def late() -> None:
            if waits() and (left := slot.late_at - time.monotonic()) > 0:  # it has more time by now
                self._later(left, late)
            elif waits():
                # The signal ends one that is not yet so far that it could answer: it was late all the same.
                coming.error = coming.error or AppError(f"cannot start {coming}: {why}")
                coming.ask_for_stacks()
                self._later(STACKS_WITHIN, end)

        def end() -> None:
            if waits():
                if isinstance(coming.error, AppError) and not coming.error.traceback_text:
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
                coming.kill(why)  # it serves no client yet
            slot.tell(slot.not_now(why))

    def _let_go(self, worker: Handle, reason: StopReason) -> None:
        worker.phase = Phase.LEAVING
        self.leaving[worker] = None
        self._leave(worker, reason)

    def break_off(self, why: str) -> None:
        """End all that is being started in the place of a worker that serves; who waits for it is told.

        So does what is being started of a generation that has not proven itself. Slots that are empty then, and those
        whose turn was still to come, are filled otherwise.
        """
        for slot in self:
            coming = slot.coming
            if coming is not None and (slot.worker is not None or coming.generation != self.generation):
                self._drop_coming(slot, why)
            if slot.again_at <= time.monotonic():
                self.fill(slot)

    def hold(self, *, on: bool) -> None:
        """Give no more listeners to workers, or give them to those that wait.

        One that has listeners, and is not ready, is ended, and another one started that has none.
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
        """Start no worker any more, and end those that do not serve yet."""
        self.ending = True
        for slot in self:
            self._drop_coming(slot, "flaskd stops")

    # --- what they do -------------------------------------------------------------------------------------------------

    def made(self, worker: Handle) -> None:
        """Its process exists, and its time begins; before, it waited for its template, which has a time of its own."""
        slot = self.slots.get(worker.slot)
        if slot is not None and slot.coming is worker:
            self._give_time(slot, worker)

    def loaded(self, worker: Handle) -> None:
        """Its app is loaded."""
        if worker.phase is Phase.LOADING:
            worker.phase = Phase.LOADED
            if not self.held:
                self._let_serve(worker)
            elif (slot := self.slots.get(worker.slot)) is not None and slot.coming is worker:
                slot.tell(None)  # it serves when flaskd does, and who waits need not wait for that

    def _let_serve(self, worker: Handle) -> None:
        worker.phase = Phase.STARTING
        self._serve(worker)

    def ready(self, worker: Handle) -> bool:
        """It has answered its probe; whether it has its place now."""
        slot = self.slots.get(worker.slot)
        if slot is None or slot.coming is not worker:
            return False  # it was given up in this moment
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
        """It accepts no connection any more: who waits for its replacement is answered by the new one alone."""
        for each in self._until_left.pop(worker, ()):
            each(None)

    def lost(self, worker: Handle, why: str) -> None:
        """It leaves its place, and was not told to."""
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
        """Its process has ended."""
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
            slot.failures += slot.failures == 0  # the first pause is that of a failure
            self._try_again(slot)

    def _try_again(self, slot: Slot) -> None:
        """Fill an empty slot: at once, and after a pause that grows where it has failed before."""
        if not self.proven:
            return
        pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** min(slot.failures - 1, 10)) if slot.failures else 0.0
        slot.failures += 1
        slot.again_at = time.monotonic() + pause
        if not self.ending:
            if pause:
                log.warning(f"worker {slot.number} is started again in {pause:g}s")
            self._later(pause, lambda: self.fill(slot))
