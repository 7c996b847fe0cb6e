"""Two workers of one slot overlap: the schedulers of the old one are paused before the new one imports the app."""

from __future__ import annotations

import logging
import threading
from typing import Any

from flaskd.errors import FlaskdError
from flaskd.pool.handle import Handle, Phase
from flaskd.pool.messages import PauseSchedulers, ResumeSchedulers

log = logging.getLogger("flaskd.pool")

_PAUSE = 2.0
"""Seconds that a worker has to pause the schedulers of its app; then the new one imports the app all the same."""


class Schedulers:
    """Whose are paused, and for which worker."""

    def __init__(self) -> None:
        self._paused_for: dict[Handle, Handle] = {}
        self._lock = threading.Lock()
        """Held when one is told: what it was told last is what holds."""

    def pause(self, old: Handle, new: Handle) -> None:
        """Pause those of a worker that has a successor now, and wait for that (a thread of the new one's own)."""
        said: list[FlaskdError | None] = []
        over = threading.Event()

        def answered(_: Any, error: FlaskdError | None) -> None:
            said.append(error)
            over.set()

        with self._lock:
            self._paused_for[old] = new
            old.ask(PauseSchedulers, answered)
        error = said[0] if over.wait(_PAUSE) else FlaskdError(f"{old} does not answer")
        if error is not None and old.alive:
            log.warning(f"{new} may run jobs beside {old}, which did not pause its schedulers: {error}")

    def gone(self, worker: Handle) -> None:
        """A worker is gone: those that were paused for it go on, where the old worker keeps its place."""
        with self._lock:
            self._paused_for.pop(worker, None)
            for old in [old for old, new in self._paused_for.items() if new is worker]:
                del self._paused_for[old]
                if old.phase is not Phase.LEAVING:
                    old.send(ResumeSchedulers())
