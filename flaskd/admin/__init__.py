"""What answers over HTTP beside the app, on listeners of its own: the shutdown endpoint."""

from flaskd.admin.endpoint import ShutdownEndpoint, opened_by
from flaskd.admin.server import EndpointServer
from flaskd.admin.token import configured_token, make_token

__all__ = ["EndpointServer", "ShutdownEndpoint", "configured_token", "make_token", "opened_by"]
