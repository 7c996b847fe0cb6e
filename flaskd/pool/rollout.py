"""A rollout: replacing the workers of some slots, first one alone, then several at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from flaskd.errors import AppError, FlaskdError
from flaskd.lifecycle import StopReason
from flaskd.pool.slots import Slot, Slots


class Rollout:
    """Replaces the workers of some slots, in the thread of the events; calls `over` once, with how many are new.

    `numbers` returns the slots that are to be replaced; it is called before each step, because slots come and go. The
    first new worker has to become ready, and to live for `canary` seconds, before another one is started; otherwise all
    old workers stay. After that, `surge` slots are replaced at a time, and `proven` was called. If one of these new
    workers does not become ready, the rollout ends, and the workers replaced so far stay.
    """

    def __init__(
        self,
        slots: Slots,
        numbers: Callable[[], Iterable[int]],
        generation: int,
        reason: StopReason,
        *,
        surge: int,
        canary: float,
        proven: Callable[[], None] = lambda: None,
        over: Callable[[FlaskdError | None, int], None],
    ) -> None:
        self._slots, self._numbers, self._generation, self._reason = slots, numbers, generation, reason
        self._surge, self._canary, self._over = surge, canary, over
        self._proven = proven
        self._begun: set[int] = set()
        self._under_way = 0
        self._replaced = 0
        self._ended = False

    def begin(self) -> None:
        """Begin with the first slot."""
        self._next()

    def _next(self) -> None:
        while not self._ended and self._under_way < (self._surge if self._replaced else 1):
            slot = next((each for each in self._slots if each.number in self._left()), None)
            if slot is None:
                break
            self._begun.add(slot.number)
            self._under_way += 1
            canary = 0.0 if self._replaced else self._canary
            self._slots.replace(slot, self._generation, self._reason, partial(self._one, slot), canary=canary)
        if not self._ended and not self._under_way:
            self._end(None)

    def _left(self) -> set[int]:
        return set(self._numbers()) - self._begun

    def _one(self, slot: Slot, error: FlaskdError | None) -> None:
        self._under_way -= 1
        if self._ended:
            return
        if error is None:
            self._replaced += 1
            if self._replaced == 1:
                self._proven()
        elif slot in self._slots:  # it is not, if there are fewer workers now
            self._end(self._told(error))
        self._next()

    def _told(self, error: FlaskdError) -> FlaskdError:
        if not self._replaced:
            return error
        text = f"{error}; {self._replaced} had been replaced before, and the new ones stay"
        return AppError(text, error.details) if isinstance(error, AppError) else type(error)(text)

    def break_off(self, why: FlaskdError) -> None:
        """End the rollout now: new workers that are ready stay, the others are ended."""
        if not self._ended:
            self._end(self._told(why))

    def _end(self, error: FlaskdError | None) -> None:
        self._ended = True
        if error is not None:
            self._slots.break_off(str(error))
        self._over(error, self._replaced)
