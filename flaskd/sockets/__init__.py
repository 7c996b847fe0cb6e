"""Sockets: addresses, listeners, Unix nodes, passed sockets, and what the kernel knows of connections."""

from flaskd.sockets.address import Address, check_serving
from flaskd.sockets.connections import closed_by_peer, each_closed_by_peer, unacknowledged, unread
from flaskd.sockets.listener import Listener, bound_anew
from flaskd.sockets.passed import close_passed, inherited, passed_to_another
from flaskd.sockets.unix import Node, bind_unix, let_in, without_group

__all__ = [
    "Address", "Listener", "Node", "bind_unix", "bound_anew",
    "check_serving", "close_passed", "closed_by_peer", "each_closed_by_peer", "inherited", "let_in",
    "passed_to_another", "unacknowledged", "unread", "without_group",
]  # fmt: skip
