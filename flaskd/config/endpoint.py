"""Checks the shutdown endpoint against the rest of the configuration.

It works on the tree, not on the model, so that the fault has its own place and is reported together with all others.
"""

from __future__ import annotations

from flaskd.config.faults import Faults
from flaskd.config.nodes import Items, Node, Scalar, Table, child, shown


def check_endpoint(tree: Table, faults: Faults) -> None:
    """Note an endpoint under ``profile: production``, and one on an address of the app."""
    endpoint = _at(tree, "shutdown", "endpoint")
    listen = child(endpoint, "listen") if endpoint else None
    if endpoint is None or not isinstance(listen, Scalar) or listen.value is None or listen.broken:
        return
    profile = child(tree, "profile")
    if isinstance(profile, Scalar) and profile.text == "production":
        faults.add(
            endpoint.key,
            "shutdown.endpoint",
            "expected none under profile: production, got one; there, use signals or the control socket",
        )
    app = _at(tree, "server", "listen")
    theirs = app.items if isinstance(app, Items) else (app,)
    # Each listener on port 0 gets another port from the kernel.
    if not listen.text.endswith(":0") and any(isinstance(each, Scalar) and each.text == listen.text for each in theirs):
        faults.add(
            listen.place, "shutdown.endpoint.listen", f"expected an address of its own, got {shown(listen)}, the app's"
        )


def _at(tree: Table, *keys: str) -> Node | None:
    found: Node | None = tree
    for key in keys:
        found = child(found, key) if found else None
    return found
