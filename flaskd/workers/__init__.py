"""An app in a process of its own: what its owner sees, and what runs inside it. The two share nothing but two pipes."""

from flaskd.workers.process import ServerProcess

__all__ = ["ServerProcess"]
