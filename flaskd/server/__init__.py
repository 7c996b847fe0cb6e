"""Serving with Waitress, so that it can be drained. Only this package uses internals of waitress."""

from flaskd.server.board import Board
from flaskd.server.drain import DRAIN_GUARD, Drain, Drainable, in_thread_of_its_own
from flaskd.server.limits import Limits
from flaskd.server.proxies import BehindProxies, missed_by_proxy_fix
from flaskd.server.pushed import Pushed
from flaskd.server.server import WaitressThread
from flaskd.server.settings import adjustments, limits
from flaskd.server.streams import STREAM_GRACE, EndingStreams
from flaskd.server.tally import BOUNDS, Histogram, Tally

__all__ = [
    "BOUNDS",
    "DRAIN_GUARD",
    "STREAM_GRACE",
    "BehindProxies",
    "Board",
    "Drain",
    "Drainable",
    "EndingStreams",
    "Histogram",
    "Limits",
    "Pushed",
    "Tally",
    "WaitressThread",
    "adjustments",
    "in_thread_of_its_own",
    "limits",
    "missed_by_proxy_fix",
]
