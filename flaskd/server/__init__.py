"""Waitress made drainable. Every internal of waitress that flaskd relies on is touched in this package alone."""

from flaskd.server.development import WerkzeugThread
from flaskd.server.settings import adjustments
from flaskd.server.thread import WaitressThread

__all__ = ["WaitressThread", "WerkzeugThread", "adjustments"]
