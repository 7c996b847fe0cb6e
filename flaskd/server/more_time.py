"""More time for a request: the app knows at times that one takes long, and that it is well all the same."""

from __future__ import annotations

import math
import threading
import time

from flaskd.server.account import accounts


def more_time(seconds: float) -> bool:
    """Let the request that this thread runs go on for at least so many seconds from now, whatever its limit says.

    It is about ``server.request_timeout`` and no other limit: a drain, say, has its own. Several calls do not add up:
    the one that reaches farthest counts. False where there is nothing to extend: outside a request, in a thread that
    the request started, and under another server. Raises ValueError for what is no number of seconds.
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
