"""What answers on listeners other than the app's: health, metrics, status, agent checks, the shutdown endpoint."""

from flaskd.admin.agent import Agent
from flaskd.admin.endpoint.server import EndpointServer
from flaskd.admin.endpoint.shutdown import ShutdownEndpoint, opened_by
from flaskd.admin.endpoint.token import configured_token, make_token
from flaskd.admin.health import AdminServer, Source

__all__ = [
    "AdminServer",
    "Agent",
    "EndpointServer",
    "ShutdownEndpoint",
    "Source",
    "configured_token",
    "make_token",
    "opened_by",
]
