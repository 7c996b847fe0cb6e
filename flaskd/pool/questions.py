"""A question to several workers at once; a worker that does not answer gets an error in the place of its answer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from flaskd.errors import FlaskdError
from flaskd.pool.handle import Handle

Answered = Callable[[Any, FlaskdError | None], None]


class Reply(NamedTuple):
    """The answer of one worker: a value or an error."""

    worker: Handle
    value: Any
    error: FlaskdError | None


class Round:
    """One question to all `workers`; the thread that brings the last answer calls `over` with all (any thread)."""

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
        """Stop waiting, and call `over`; workers that have not answered count as errors."""
        with self._lock:
            over, self._over = self._over, None
        if over is not None:
            over(self.replies)
            self._done.set()

    @property
    def replies(self) -> list[Reply]:
        """The answers so far, and an error for each missing one."""
        return [
            self._replies.get(each) or Reply(each, None, FlaskdError(f"{each} does not answer"))
            for each in self._workers
        ]

    def wait(self, timeout: float) -> list[Reply]:
        """Wait at most `timeout` seconds for all answers."""
        self._done.wait(timeout)
        return self.replies
