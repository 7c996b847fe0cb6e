"""What went beyond a limit of the configuration, said in the log with the key to set."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

from flaskd.config.fields import write_size

if TYPE_CHECKING:
    from flaskd.server.channel import Request

log = logging.getLogger("flaskd.server")

_PAUSE = 1.0
"""Seconds between two lines, because clients decide how many there would be."""


class ExcessLog:
    """Says which requests were refused for their size; those of the same second are counted in the next line."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next = 0.0
        self._unsaid = 0

    def tell(self, request: Request) -> None:
        """Say that a request was refused (any thread)."""
        with self._lock:
            now = time.monotonic()
            if now < self._next:
                self._unsaid += 1
                return
            self._next, unsaid, self._unsaid = now + _PAUSE, self._unsaid, 0
        key = request.exceeded
        more = f" ({unsaid} more since the last such line)" if unsaid else ""
        what = request.snapshot(gone=False)
        allowed = f"more than server.{key} ({write_size(getattr(request.adj, key))}) allows"
        log.warning(f"refused {what.method} {what.path} of {what.client} with {request.error.code}: {allowed}{more}")
