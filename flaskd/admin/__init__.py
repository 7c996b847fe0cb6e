"""What answers on listeners other than the app's: health, metrics, status, agent checks, the shutdown endpoint."""

from flaskd.admin.agent import Agent
from flaskd.admin.endpoint.opening import opened_by
from flaskd.admin.health import AdminServer, Source

__all__ = ["AdminServer", "Agent", "Source", "opened_by"]
