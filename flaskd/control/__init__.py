"""The control plane: a Unix socket and a FIFO in the runtime directory, and what each verb does.

A thread of its own reads, parses and answers. What changes the daemon is posted to the events thread.
"""

from flaskd.control.plane import ControlPlane

__all__ = ["ControlPlane"]
