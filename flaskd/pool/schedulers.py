"""Pausing the schedulers (such as APScheduler's) of an old worker before a new one of its slot imports the app."""

from __future__ import annotations

import logging
import threading
from typing import Any

from flaskd.errors import FlaskdError
from flaskd.pool.handle import Handle, Phase
from flaskd.pool.messages import PauseSchedulers, ResumeSchedulers

log = logging.getLogger("flaskd.pool")

_PAUSE = 2.0
"""Seconds that a worker has to pause its app's schedulers; after that the new one imports the app all the same."""


class Schedulers:
    """Knows which workers' schedulers are paused, and for which new workers."""

    def __init__(self) -> None:
        self._paused_for: dict[Handle, Handle] = {}
        self._lock = threading.Lock()
        """Held while a message is sent, so that messages to a worker keep their order."""

    def pause(self, old: Handle, new: Handle) -> None:
        """Have the old worker pause its schedulers, and wait for at most `_PAUSE` seconds (the new worker's thread)."""
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
        """A worker is gone: schedulers that were paused for it go on, if the old worker keeps its place."""
        with self._lock:
            self._paused_for.pop(worker, None)
            for old in [old for old, new in self._paused_for.items() if new is worker]:
                del self._paused_for[old]
                if old.phase is not Phase.LEAVING:
                    old.send(ResumeSchedulers())
