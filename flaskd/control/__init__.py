"""The control plane: a Unix socket and a FIFO in the runtime directory, and the table of verbs behind them.

A thread of its own reads, parses and answers; what changes the daemon is posted to its main thread.
"""

from flaskd.control.plane import ControlPlane
from flaskd.control.verbs import VERBS, Verb

__all__ = ["VERBS", "ControlPlane", "Verb"]
