"""A start that a stop can break off, although the main thread may hang in the app's import."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

from flaskd.errors import EX_OK

log = logging.getLogger("flaskd.daemon")

_BREAK_OFF = 0.8
"""How many seconds a start that is broken off takes to end, whatever the app's import does."""


class Start:
    """Whether a stop ends the process at once, and how; `asked` is called if a stop was asked for meanwhile."""

    def __init__(self, asked: Callable[[], None]) -> None:
        self.asked = asked
        self.breakable = False
        """Whether a stop ends the process at once: false until something must be cleaned up, and once a server runs."""
        self.making = threading.Lock()
        """Held while the main thread makes things that must be cleaned up."""

    def end(self) -> None:
        """From now on a stop drains a server, or the start has failed."""
        with self.making:
            self.breakable = False

    def break_off(self, take_away: Callable[[], None]) -> bool:
        """Clean up and end the process; returns False if the main thread has called `end` before.

        The process ends even if the import blocks `take_away`.
        """
        timer = threading.Timer(_BREAK_OFF, os._exit, [EX_OK])
        timer.daemon = True
        try:
            timer.start()
            self.making.acquire(timeout=_BREAK_OFF)  # never released, so that the main thread makes nothing more
            if not self.breakable:
                timer.cancel()
                self.making.release()
                return False
            take_away()
            os._exit(EX_OK)
        except Exception:  # whatever it is, the start is over
            log.exception("cannot break off the start in good order")
            os._exit(EX_OK)
