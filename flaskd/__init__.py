"""flaskd serves a Flask app and manages its life: it starts, drains, cleans up and stops it.

::

    flaskd.serve(app)                               # like ``flaskd serve``, for an app object; returns an exit code
    with flaskd.ServerThread(app) as server: ...    # the same server in a thread, for tests and scripts
    with flaskd.ServerProcess("shop:app") as it: ...    # in a process of its own
    with flaskd.background("export"): ...           # work outside a request, which a drain waits for
    flaskd.more_time(60)                            # this request may take 60 more seconds
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from flaskd.version import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from flaskd.admin.endpoint.shutdown import ShutdownEndpoint
    from flaskd.background_work import background
    from flaskd.cleanup import on_stop
    from flaskd.client import ControlClient
    from flaskd.errors import FlaskdError
    from flaskd.ledger import DrainReport
    from flaskd.server.more_time import more_time
    from flaskd.serving.embedded import ServerThread
    from flaskd.workers.process import ServerProcess

__all__ = [
    "ControlClient",
    "DrainReport",
    "FlaskdError",
    "ServerProcess",
    "ServerThread",
    "ShutdownEndpoint",
    "__version__",
    "background",
    "more_time",
    "on_stop",
    "serve",
]

_HOME = {
    "ControlClient": "flaskd.client",
    "DrainReport": "flaskd.ledger",
    "FlaskdError": "flaskd.errors",
    "ServerProcess": "flaskd.workers.process",
    "ServerThread": "flaskd.serving.embedded",
    "ShutdownEndpoint": "flaskd.admin.endpoint.shutdown",
    "background": "flaskd.background_work",
    "more_time": "flaskd.server.more_time",
    "on_stop": "flaskd.cleanup",
}


def __getattr__(name: str) -> Any:
    """Import an exported name when it is first used: a client verb needs nothing of the server."""
    if name not in _HOME:
        raise AttributeError(f"module 'flaskd' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def serve(
    app: Callable[..., Any],
    config: Mapping[str, object] | str | os.PathLike[str] | None = None,
    *,
    name: str = "flaskd",
) -> int:
    """Serve a WSGI app until it is asked to stop, and return the exit code.

    `config` is a mapping in the shape of the YAML file, or a path to one. It works in the main thread and on Linux
    only; elsewhere it raises FlaskdError, and `ServerThread` is the alternative. Before it returns, it restores the
    signal handlers. The program then ends as usual: it runs exit callbacks and waits for threads itself, so
    ``shutdown.exit_wait`` has no effect here.
    """
    from flaskd.serving.launch import check_system  # noqa: PLC0415 - see __getattr__

    check_system()
    from flaskd.boot import Boot  # noqa: PLC0415
    from flaskd.control import ControlPlane  # noqa: PLC0415
    from flaskd.process.exit import renew_standard_error  # noqa: PLC0415
    from flaskd.serving.configuration import reader  # noqa: PLC0415

    boot = Boot(
        reader(config),
        plane=lambda daemon: ControlPlane(daemon, name, os.environ),
        name=name,
        environ=os.environ,
        app=app,
    )
    code = boot.run()
    renew_standard_error()
    return code
