"""What answers over HTTP beside the app, on listeners of its own: health, metrics, status; the shutdown endpoint."""

from flaskd.admin.endpoint import ShutdownEndpoint, opened_by
from flaskd.admin.health import AdminServer
from flaskd.admin.metrics import Measures
from flaskd.admin.server import EndpointServer
from flaskd.admin.token import configured_token, make_token

__all__ = [
    "AdminServer",
    "EndpointServer",
    "Measures",
    "ShutdownEndpoint",
    "configured_token",
    "make_token",
    "opened_by",
]
