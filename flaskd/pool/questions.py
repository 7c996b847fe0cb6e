"""A question to several workers at once, whose answers come when they come; one that does not answer is named."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from flaskd.errors import FlaskdError
from flaskd.pool.handle import Handle

Answered = Callable[[Any, FlaskdError | None], None]


class Reply(NamedTuple):
    """What one worker has answered."""

    worker: Handle
    value: Any
    error: FlaskdError | None


class Round:
    """One question; `over` is called once, with the answers of all, in the thread that brings the last (any thread)."""

    def __init__(
        self,
        workers: Sequence[Handle],
        question: Callable[[Handle, Answered], None],
        over: Callable[[list[Reply]], None] = lambda _: None,
    ) -> None:
        self._replies: dict[Handle, Reply] = {}
        self._workers = list(workers)
        self._over: Callable[[list[Reply]], None] | None = over
        self._lock = threading.Lock()
        self._done = threading.Event()
        for each in self._workers:
            question(each, lambda value, error, each=each: self._answered(Reply(each, value, error)))  # type: ignore[misc]
        if not self._workers:
            self.give_up()

    def _answered(self, reply: Reply) -> None:
        with self._lock:
            self._replies.setdefault(reply.worker, reply)
            whole = len(self._replies) == len(self._workers)
        if whole:
            self.give_up()

    def give_up(self) -> None:
        """Wait no more; who has not answered has an error for that."""
        with self._lock:
            over, self._over = self._over, None
        if over is not None:
            over(self.replies)
            self._done.set()

    @property
    def replies(self) -> list[Reply]:
        """Those that there are, and an error for each one that is missing."""
        return [
            self._replies.get(each) or Reply(each, None, FlaskdError(f"{each} does not answer"))
            for each in self._workers
        ]

    def wait(self, timeout: float) -> list[Reply]:
        """Wait for the answers, at most `timeout` seconds."""
        self._done.wait(timeout)
        return self.replies
