"""A start that can be broken off: the main thread may be anywhere in the app's import, and cannot be waited for."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

from flaskd.errors import EX_OK

log = logging.getLogger("flaskd.daemon")

_BREAK_OFF = 0.8
"""Seconds in which a start that is broken off ends, whatever the app's import holds."""


class Start:
    """Whether a stop ends the process at once, and how; `asked` is called when a stop was asked for meanwhile."""

    def __init__(self, asked: Callable[[], None]) -> None:
        self.asked = asked
        self.breakable = False
        """Whether a stop ends the process now; False before there is something to take away, and with a server."""
        self.making = threading.Lock()
        """Held while the main thread makes what has to be taken away."""

    def end(self) -> None:
        """From here on a stop finds a server to drain, or the start is over."""
        with self.making:
            self.breakable = False

    def break_off(self, take_away: Callable[[], None]) -> bool:
        """End the process, with all taken away; returns False when the main thread was faster.

        Should `take_away` be held up by the import, the process ends all the same.
        """
        timer = threading.Timer(_BREAK_OFF, os._exit, [EX_OK])
        timer.daemon = True
        try:
            timer.start()
            self.making.acquire(timeout=_BREAK_OFF)  # kept: the main thread makes nothing more
            if not self.breakable:
                timer.cancel()
                self.making.release()
                return False
            take_away()
            os._exit(EX_OK)
        except Exception:  # whatever it was, the start is over
            log.exception("cannot break off the start in good order")
            os._exit(EX_OK)
