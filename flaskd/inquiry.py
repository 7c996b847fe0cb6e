"""Questions that may take a while: each kind is asked in a thread of its own, so that nobody else waits for it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from flaskd.errors import FlaskdError
from flaskd.forks import AppCode
from flaskd.protocol import Reply

log = logging.getLogger("flaskd.inquiry")

T = TypeVar("T")


class Inquiry(Generic[T]):
    """One kind of question; `find` has the answer, and may take its time or raise.

    Who asks while it is being found gets the next answer, together with all who asked meanwhile: an answer is never
    older than its question, and there is never more than one thread.
    """

    def __init__(self, name: str, find: Callable[[], T]) -> None:
        self._name = name
        self._find = find
        self._lock = threading.Lock()
        self._waiting: list[tuple[Reply, Callable[[Reply, T], None]]] = []
        self._busy = False

    def ask(self, reply: Reply, tell: Callable[[Reply, T], None]) -> None:
        """Have `tell` give the answer to `reply`, or the error that there was; returns at once (any thread)."""
        with self._lock:
            if not self._busy:
                threading.Thread(target=self._answer, name=f"flaskd-{self._name}", daemon=True).start()
                self._busy = True
            self._waiting.append((reply, tell))

    def _answer(self) -> None:
        while True:
            with self._lock:
                waiting, self._waiting = self._waiting, []
                if not waiting:
                    self._busy = False
                    return
            try:
                with AppCode():
                    found = self._find()
                while waiting:
                    reply, tell = waiting[0]
                    tell(reply, found)
                    del waiting[0]  # nobody is told twice
            except FlaskdError as error:
                for reply, _ in waiting:
                    reply.error(error.code, str(error))
            except Exception as error:  # of ours, or of the app's objects that were asked: whoever asked is told
                log.exception(f"cannot {self._name}")
                for reply, _ in waiting:
                    reply.error(FlaskdError.code, f"cannot {self._name}: {error!r}; the log says more")
