"""Readings of a configuration: each in a thread of its own and for a bounded time, for a file or an import may hang."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from flaskd.errors import FlaskdError, shortage

T = TypeVar("T")

LIMIT = 10.0
"""Seconds that a reload waits for what it reads."""
_MOST_HUNG = 8
"""Readings that may hang at a time; each keeps a thread, and none can be ended."""


class Reading(Generic[T]):
    """One reading: `read` is called in a thread of its own, then `over` with this, which has `found` or `error`."""

    def __init__(self, read: Callable[[], T], over: Callable[[Reading[T]], None]) -> None:
        self._read, self._over = read, over
        self.found: T | None = None
        self.error: Exception | None = None
        self.until = time.monotonic() + LIMIT
        """The time.monotonic() moment from which on nobody waits for it."""
        self.thread = threading.Thread(target=self._run, name="flaskd-reload", daemon=True)

    def _run(self) -> None:
        try:
            self.found = self._read()
        except Exception as error:  # noqa: BLE001 - told to who asked; the daemon goes on with what it has
            self.error = error
        except BaseException as error:  # noqa: BLE001 - a module of a policy that exits while it is imported
            self.error = FlaskdError(f"{type(error).__name__} was raised")
        self._over(self)


class Readings(Generic[T]):
    """The readings of one daemon: one is wanted at most, and those before it may hang; see `Reading`."""

    def __init__(self, read: Callable[[], T], over: Callable[[Reading[T]], None]) -> None:
        self._read, self._over = read, over
        self._hung: list[Reading[T]] = []
        self.present: Reading[T] | None = None
        """The one that is waited for."""

    def begin(self) -> float:
        """Begin one, and give the time.monotonic() moment up to which it is waited for.

        Raises FlaskdError where no thread can be had, or too many readings hang.
        """
        self._hung = [each for each in self._hung if each.thread.is_alive()]
        if len(self._hung) >= _MOST_HUNG:
            raise FlaskdError(f"{len(self._hung)} earlier readings of the configuration still hang")
        reading = Reading(self._read, self._over)
        try:
            reading.thread.start()
        except RuntimeError as error:
            raise shortage(error) or error from error
        self.present = reading
        return reading.until

    def ended(self, reading: Reading[T]) -> bool:
        """Whether that is the one that is waited for; it is not any more."""
        if reading is not self.present:
            return False
        self.present = None
        return True

    @property
    def late(self) -> bool:
        """Whether the present one has had its time."""
        return self.present is not None and time.monotonic() >= self.present.until

    def give_up(self) -> None:
        """Wait no more for the present one."""
        if self.present is not None:
            self._hung.append(self.present)
            self.present = None


@dataclass(frozen=True)
class ReadingOver:
    """A reading is over, in time or not."""

    reading: Reading[Any]
