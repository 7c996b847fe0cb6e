"""`ShutdownEndpoint`: the shutdown endpoint that an app opens in its own code, for development."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from flaskd.admin.endpoint.opening import Opener, endpoints, openers
from flaskd.admin.endpoint.requests import Requests
from flaskd.admin.endpoint.server import EndpointServer
from flaskd.admin.endpoint.token import configured_token, make_token
from flaskd.cleanup import Plan, with_callbacks
from flaskd.config import load_mapping, write_duration
from flaskd.errors import ConfigError, FlaskdError
from flaskd.lifecycle import StopReason
from flaskd.process.signals import interrupt
from flaskd.serving.pipeline import Pipeline
from flaskd.serving.stop import Stop, who_serves
from flaskd.sockets import Address

if TYPE_CHECKING:
    from flask import Flask

log = logging.getLogger("flaskd.endpoint")

_CLOSING = 0.5
"""How many seconds a client that asks a second time has to read the answer."""


class ShutdownEndpoint:
    """Stops the process at a ``POST /shutdown`` with the token, for development and scripts.

    ::

        flaskd.ShutdownEndpoint(app, listen="127.0.0.1:9090", token_file="shutdown.token").start()

    The 202 answer has the id and the steps of the plan; then the stop begins. What stops depends on the server:

    Under flaskd the daemon stops, as with ``shutdown.endpoint``, and the endpoint is refused under ``profile:
    production`` as well. If a `ServerThread` or `ServerProcess` serves the app, that server stops, and then the process
    gets SIGINT. Under ``flask run`` new requests get a 503, running requests are answered, streams end at their next
    part, the functions of `flaskd.on_stop` run, and the process gets SIGINT; all of that may take `timeout` seconds.

    `listen` is an address that nothing else listens on, as ``HOST:PORT`` or ``unix:/path``. The token is in a
    `token_file` of mode 0600 (see `make_token`), or in the systemd `credential` of that name. `allowed_hosts` are the
    exact Host headers that are accepted; by default the address itself, and localhost if the address is this machine.
    Raises ValueError for a malformed address and ConfigError for a malformed `timeout`.
    """

    make_token = staticmethod(make_token)

    def __init__(
        self,
        app: Flask,
        *,
        listen: str,
        token_file: str | os.PathLike[str] | None = None,
        credential: str | None = None,
        allowed_hosts: Iterable[str] = (),
        timeout: float = 25.0,
    ) -> None:
        self._app = app
        self._address = Address.parse(listen)
        self._token_file = Path(token_file) if token_file is not None else None
        self._credential = credential
        self._allowed_hosts = list(allowed_hosts)
        if not math.isfinite(timeout):
            raise ConfigError(f"cannot stop within timeout={timeout}: expected a finite number of seconds")
        most = write_duration(timeout)
        shutdown = {"deadline": most, "drain": {"timeout": most}}
        self._config = load_mapping({"shutdown": shutdown}, actions={}, environ={}).values
        self._server: EndpointServer | None = None
        self._requests: Requests
        self._begun = False
        self._stop: Stop | None = None
        self._told: set[str] = set()
        self._lock = threading.Lock()

    @property
    def url(self) -> str | None:
        """The URL to POST to; None if the endpoint is not open."""
        return self._server.url if self._server is not None else None

    def start(self) -> Self:
        """Open the endpoint if this process serves the app.

        It stays closed in Flask's other commands, and in the parent process of Werkzeug's reloader, which ends with its
        child. (With ``app.run(use_reloader=True)`` flaskd cannot tell parent and child apart: call this in the child
        only, see ``werkzeug.serving.is_running_from_reloader``.) Raises ConfigError if there is no acceptable token,
        and CannotCreateError if the address cannot be bound.
        """
        if self._server is not None:
            raise FlaskdError("cannot start: this shutdown endpoint is open")
        if not openers and not _serves_here():
            return self
        self._begun, self._stop = False, None
        token = configured_token(self._token_file, self._credential, os.environ)
        if openers:
            self._server = openers[-1](self._address, token, self._allowed_hosts)
            return self
        self._server = EndpointServer(
            self._address, token, allowed_hosts=self._allowed_hosts, plan=self._describe, stop=self._asked
        ).open()
        self._token = token
        self._around = self._app.wsgi_app
        self._requests = Requests(self._around)
        self._app.wsgi_app = self._requests  # type: ignore[method-assign]  # Flask's documented way to wrap an app
        endpoints.append(self)
        return self

    def close(self) -> None:
        """Close the endpoint without a stop."""
        if self in endpoints:
            endpoints.remove(self)
        if self._server is not None:
            self._server.close(_CLOSING)
            self._server = None

    def hand_over(self, opener: Opener) -> None:
        """Close this endpoint, and let the daemon that is about to serve this process open it on the same address."""
        assert self._server is not None
        address = self._server.address
        self.close()
        if self._app.wsgi_app is self._requests:
            self._app.wsgi_app = self._around  # type: ignore[method-assign]
        self._server = opener(address, self._token, self._allowed_hosts)

    # --- the stop of a process that is not flaskd's -------------------------------------------------------------

    def _plan(self) -> Plan:
        if self._stop is not None:
            return self._stop.plan
        timeout = self._config.cleanup.defaults.timeout
        return with_callbacks(Plan(), self._app, timeout=timeout, told=self._told)

    def _describe(self) -> dict[str, Any]:
        if (server := who_serves(self._app)) is not None:
            return server.describe_stop()
        plan = self._plan()
        return {"plan": plan.id, "steps": plan.describe(), "in_flight": self._requests.in_flight}

    def _asked(self, peer: str) -> None:
        """Begin the stop in a thread of its own; a second call does nothing."""
        reason = StopReason("endpoint", peer)
        with self._lock:
            if self._begun:
                return
            self._begun = True
            if (server := who_serves(self._app)) is not None:
                if not server.stop_for(reason, self._end):
                    threading.Thread(target=self._end, name="flaskd-endpoint-stop", daemon=True).start()
                return
            plan = self._plan()
            self._stop = Pipeline(self._requests).begin_stop(
                reason, plan=plan, app=self._app, shutdown=self._config.shutdown, cleanup=self._config.cleanup
            )
        threading.Thread(target=self._run_stop, args=(self._stop,), name="flaskd-endpoint-stop", daemon=True).start()

    def _run_stop(self, stop: Stop) -> None:
        try:
            log.info(f"stopping ({stop.reason}), plan {stop.plan.id}: {self._requests.in_flight} in flight")
            stop.run()
            log.info(f"stopped: {stop.report}")
        finally:
            self._end()

    def _end(self) -> None:
        try:
            self.close()
        finally:
            interrupt()


def _serves_here() -> bool:
    """Whether this process serves requests, as far as Flask's command line shows that."""
    from click import get_current_context  # noqa: PLC0415 - Flask has imported click
    from flask.cli import ScriptInfo  # noqa: PLC0415
    from flask.helpers import get_debug_flag  # noqa: PLC0415
    from werkzeug.serving import is_running_from_reloader  # noqa: PLC0415

    context = get_current_context(silent=True)
    if context is None or context.find_object(ScriptInfo) is None:
        return True
    if context.info_name != "run":
        return False
    reload = context.params.get("reload")  # None: the debug flag decides (flask.cli.run_command)
    return is_running_from_reloader() or not (get_debug_flag() if reload is None else reload)
