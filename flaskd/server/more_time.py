"""More time for one request, for an app that knows that it will take long."""

from __future__ import annotations

import math
import threading
import time

from flaskd.server.account import accounts


def more_time(seconds: float) -> bool:
    """Let the request that this thread runs take at least `seconds` more from now on, whatever its limit says.

    This extends ``server.request_timeout`` and ``server.request_timeouts`` alone, not the deadline of a drain, for
    example. Several calls do not add up: the latest moment counts. Returns False where there is nothing to extend:
    outside a request, in a thread that the request started, and under another server. Raises ValueError if `seconds`
    is not a number of seconds.
    """
    given: object = seconds
    if isinstance(given, bool) or not isinstance(given, int | float) or not (0 <= given < math.inf):
        raise ValueError(f"cannot give a request more time: expected a number of seconds, got {seconds!r}")
    thread = threading.current_thread()
    for found in accounts.copy():
        account = found()
        for request in list(account.in_hand.values()) if account is not None else ():
            if request.thread is thread and not request.answered:
                request.more_until = max(request.more_until, time.monotonic() + seconds)
                return True
    return False
