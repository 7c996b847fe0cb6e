"""Readings of a configuration, each in a thread of its own and with a time limit: a file or an import may hang."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from flaskd.errors import FlaskdError, shortage
from flaskd.values import value

T = TypeVar("T")

LIMIT = 10.0
"""How many seconds a reload waits for a reading."""
_MOST_HUNG = 8
"""How many readings may hang at the same time; each keeps a thread that cannot be ended."""


class Reading(Generic[T]):
    """One reading: `read` is called in a thread, then `over` with this object, which has `found` or `error`."""

    def __init__(self, read: Callable[[], T], over: Callable[[Reading[T]], None]) -> None:
        self._read, self._over = read, over
        self.found: T | None = None
        self.error: Exception | None = None
        self.until = time.monotonic() + LIMIT
        """The time.monotonic() moment after which nothing waits for it."""
        self.thread = threading.Thread(target=self._run, name="flaskd-reload", daemon=True)

    def _run(self) -> None:
        try:
            self.found = self._read()
        except Exception as error:  # noqa: BLE001 - the client is told; the daemon keeps its configuration
            self.error = error
        except BaseException as error:  # noqa: BLE001 - a policy's module may call sys.exit when imported
            self.error = FlaskdError(f"{type(error).__name__} was raised")
        self._over(self)


class Readings(Generic[T]):
    """The readings of one daemon: at most one is waited for; earlier ones may hang. See `Reading`."""

    def __init__(self, read: Callable[[], T], over: Callable[[Reading[T]], None]) -> None:
        self._read, self._over = read, over
        self._hung: list[Reading[T]] = []
        self.present: Reading[T] | None = None
        """The reading that is waited for."""

    def begin(self) -> float:
        """Begin a reading, and give the time.monotonic() moment until which it is waited for.

        Raises FlaskdError if no thread can be had, or if too many readings hang.
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
        """Whether `reading` was waited for; after this call it is not."""
        if reading is not self.present:
            return False
        self.present = None
        return True

    @property
    def late(self) -> bool:
        """Whether the time of the present reading is over."""
        return self.present is not None and time.monotonic() >= self.present.until

    def give_up(self) -> None:
        """Stop waiting for the present reading."""
        if self.present is not None:
            self._hung.append(self.present)
            self.present = None


@value
class ReadingOver:
    """A reading is over, in time or not."""

    reading: Reading[Any]
