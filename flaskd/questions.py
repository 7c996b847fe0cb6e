"""Questions to a daemon that may take a while, because a file, an object of the app or a worker is asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flaskd.config import Configuration
from flaskd.ledger import InFlight
from flaskd.serving.api import Serving
from flaskd.slow_query import SlowQuery


class Questions:
    """One `SlowQuery` for each kind of question; `read` gives the configuration that a reload would bring."""

    def __init__(
        self, read: Callable[[], Configuration], serving: Callable[[], Serving], present: Callable[[], Configuration]
    ) -> None:
        self.check: SlowQuery[Configuration] = SlowQuery("check", read)
        self.plan: SlowQuery[dict[str, Any]] = SlowQuery("plan", lambda: serving().plan(present()))
        self.stacks: SlowQuery[list[InFlight]] = SlowQuery("requests", lambda: serving().requests(stacks=True))
        self.threads: SlowQuery[list[dict[str, Any]]] = SlowQuery("threads", lambda: serving().threads())
        self.thread_stacks: SlowQuery[list[dict[str, Any]]] = SlowQuery(
            "threads", lambda: serving().threads(stacks=True)
        )
        self.workers: SlowQuery[list[dict[str, Any]]] = SlowQuery("workers", lambda: serving().workers())

    def look(self) -> None:
        """Answer clients that have waited too long; called in the control thread."""
        for each in (self.check, self.plan, self.stacks, self.threads, self.thread_stacks, self.workers):
            each.look()
