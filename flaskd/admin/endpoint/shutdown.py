"""`ShutdownEndpoint`: the endpoint opened in an app's own code, for development."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

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
"""Seconds that a client which asks a second time gets to read the answer."""

Opener = Callable[[Address, bytes, Sequence[str]], EndpointServer]
"""Opens an endpoint that stops the daemon of this process."""

_openers: list[Opener] = []
_open: list[ShutdownEndpoint] = []
"""Those that have opened themselves."""


@contextlib.contextmanager
def opened_by(opener: Opener) -> Iterator[None]:
    """While open, endpoints of this process stop the daemon that `opener` belongs to; those that are open already, too.

    Raises what `opener` raises for those.
    """
    for endpoint in _open.copy():
        endpoint.hand_over(opener)
    _openers.append(opener)
    try:
        yield
    finally:
        _openers.remove(opener)


class ShutdownEndpoint:
    """Stops the process when it is asked to by ``POST /shutdown`` with the token, for development and scripts.

    ::

        flaskd.ShutdownEndpoint(app, listen="127.0.0.1:9090", token_file="shutdown.token").start()

    The 202 tells the id and the steps of the plan; then the stop begins. Under flaskd it is the daemon's, as if
    ``shutdown.endpoint`` had been configured, and refused under ``profile: production`` likewise. Where the app is
    served by a `ServerThread` or `ServerProcess` it is that server's, and then the process gets SIGINT. Under ``flask
    run`` new requests get a 503, those in flight are answered, streams end at their next part, the functions of
    `flaskd.on_stop` run, and the process gets SIGINT; `timeout` is how many seconds all of that may take.

    `listen` is an address of its own, as ``HOST:PORT`` or ``unix:/path``. The token is in a `token_file` of mode 0600
    (see `make_token`), or in the systemd `credential` of that name. `allowed_hosts` are the exact Host headers that are
    accepted; by default the address itself, and localhost if it is one. Raises ValueError for an address that is none,
    ConfigError for a time that is none.
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
        """Where to POST to; None while it is not open."""
        return self._server.url if self._server is not None else None

    def start(self) -> Self:
        """Open the endpoint, where there is something to stop.

        It stays closed in Flask's other commands, and in the parent of Werkzeug's reloader, which ends with its child.
        (For ``app.run(use_reloader=True)``, which cannot be told from here, call it only in the child: see
        ``werkzeug.serving.is_running_from_reloader``.) Raises ConfigError when there is no good token, and
        CannotCreateError when the address cannot be had.
        """
        if self._server is not None:
            raise FlaskdError("cannot start: this shutdown endpoint is open")
        if not _openers and not _serves_here():
            return self
        self._begun, self._stop = False, None
        token = configured_token(self._token_file, self._credential, os.environ)
        if _openers:
            self._server = _openers[-1](self._address, token, self._allowed_hosts)
            return self
        self._server = EndpointServer(
            self._address, token, allowed_hosts=self._allowed_hosts, plan=self._describe, stop=self._asked
        ).open()
        self._token = token
        self._around = self._app.wsgi_app
        self._requests = Requests(self._around)
        self._app.wsgi_app = self._requests  # type: ignore[method-assign]  # Flask's own way to put something around an app
        _open.append(self)
        return self

    def close(self) -> None:
        """Close the endpoint without a stop."""
        if self in _open:
            _open.remove(self)
        if self._server is not None:
            self._server.close(_CLOSING)
            self._server = None

    def hand_over(self, opener: Opener) -> None:
        """Be the daemon's that is about to serve this process, on the same address."""
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
        """Begin the stop, once, in a thread that it may take its time in."""
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
    """Whether this process serves requests, as far as Flask's command line tells."""
    from click import get_current_context  # noqa: PLC0415 - an app brings Flask, and Flask brings click
    from flask.cli import ScriptInfo  # noqa: PLC0415
    from flask.helpers import get_debug_flag  # noqa: PLC0415
    from werkzeug.serving import is_running_from_reloader  # noqa: PLC0415

    context = get_current_context(silent=True)
    if context is None or context.find_object(ScriptInfo) is None:
        return True
    if context.info_name != "run":
        return False
    reload = context.params.get("reload")  # None: as the debug flag says (flask.cli.run_command)
    return is_running_from_reloader() or not (get_debug_flag() if reload is None else reload)
