"""Questions that may take a while: a thread of its own answers each kind, so that no other question waits for it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from flaskd.errors import FlaskdError, described, shortage
from flaskd.process.forks import AppCode
from flaskd.protocol import Reply

log = logging.getLogger("flaskd.slow_query")

T = TypeVar("T")

ASKED = "flaskd-asked-"
"""How the names of the answering threads begin."""
LIMIT = 10.0
"""How many seconds a client waits for an answer: a file or an object of the app may hang."""


@dataclass(eq=False)
class _Asked(Generic[T]):
    reply: Reply
    tell: Callable[[Reply, T], None]
    until: float = field(default_factory=lambda: time.monotonic() + LIMIT)


class SlowQuery(Generic[T]):
    """One kind of question; `find` gives the answer, and may take long or raise.

    A question that comes while an answer is being found waits for the next answer, together with all others that come
    meanwhile. So no answer is older than its question, and there is at most one thread. `look` answers clients that
    have waited too long.
    """

    def __init__(self, name: str, find: Callable[[], T]) -> None:
        self._name = name
        self._find = find
        self._lock = threading.Lock()
        self._waiting: list[_Asked[T]] = []
        """The clients that wait for the next answer."""
        self._next: list[_Asked[T]] = []
        """The clients that wait for the answer that is being found."""
        self._busy = False

    def ask(self, reply: Reply, tell: Callable[[Reply, T], None]) -> None:
        """Have `tell` pass the answer to `reply`, or reply with the error; returns at once, any thread may call it.

        Raises FlaskdError if no thread can be had.
        """
        with self._lock:
            if not self._busy:
                thread = threading.Thread(target=self._answer, name=f"{ASKED}{self._name}", daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:
                    raise FlaskdError(f"cannot {self._name}: {shortage(error) or error}") from error
                self._busy = True
            self._waiting.append(_Asked(reply, tell))

    def look(self) -> None:
        """Send an error to clients that have waited too long; to be called regularly, in any thread."""
        now = time.monotonic()
        with self._lock:
            late = [each for each in (*self._next, *self._waiting) if each.until <= now]
            self._next = [each for each in self._next if each not in late]
            self._waiting = [each for each in self._waiting if each not in late]
        for each in late:
            each.reply.error(FlaskdError.code, f"cannot {self._name}: no answer was found within {LIMIT:g}s")

    def _take(self) -> _Asked[T] | None:
        """Take one of the clients that wait for the answer just found; each is answered once."""
        with self._lock:
            return self._next.pop(0) if self._next else None

    def _answer(self) -> None:
        while True:
            with self._lock:
                self._waiting, self._next = [], self._waiting
                if not self._next:
                    self._busy = False
                    return
            asked: _Asked[T] | None = None
            try:
                with AppCode():
                    found = self._find()
                while (asked := self._take()) is not None:
                    asked.tell(asked.reply, found)
            except FlaskdError as error:
                self._refuse(asked, error.code, error.whole, error.for_programs)
            except BaseException as error:  # flaskd's or the app's; the client is told
                log.exception(f"cannot {self._name}")
                self._refuse(asked, FlaskdError.code, f"cannot {self._name}: {described(error)}; the log says more")

    def _refuse(
        self, asked: _Asked[T] | None, code: str, message: str, detail: Mapping[str, Any] | None = None
    ) -> None:
        """Send the error to the client that was being answered and to all that still wait."""
        while (asked := asked or self._take()) is not None:
            asked.reply.error(code, message, detail=detail)
            asked = None
