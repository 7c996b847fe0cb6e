"""The control plane: a Unix socket and a FIFO in the runtime directory, and what stands behind the table of verbs.

A thread of its own reads, parses and answers; what changes the daemon is posted to the thread of its events.
"""

from flaskd.control.plane import ControlPlane

__all__ = ["ControlPlane"]
