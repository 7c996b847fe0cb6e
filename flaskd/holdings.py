"""What the daemon has apart from the app: control nodes, listeners, admin server, agent, state directory, endpoints."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

from flaskd.admin import AdminServer, Agent, Source
from flaskd.config import Config
from flaskd.errors import ConfigError
from flaskd.lifecycle import StopReason
from flaskd.places.state import StateDirectory
from flaskd.serving import launch
from flaskd.snapshot import Held
from flaskd.sockets import Address, Listener
from flaskd.systemd.store import Store

if TYPE_CHECKING:
    from flaskd.admin.endpoint.server import EndpointServer


log = logging.getLogger("flaskd.daemon")

_ENDPOINT_CLOSING = 0.3
"""Seconds that a client of the shutdown endpoint has to read its answer, at the end of the stop."""


class Plane(Protocol):
    """What the daemon needs of a control plane."""

    @property
    def nodes(self) -> list[str]:
        """The paths of its nodes."""

    def open(self, config: Config, passed: Sequence[Listener]) -> None:
        """Make the nodes and start to answer, also on the `passed` listeners."""

    def close(self) -> None:
        """Send the answers and remove the nodes."""

    def remove_nodes(self) -> None:
        """Remove the nodes, and do nothing else."""

    def forget(self) -> None:
        """Close all descriptors, and do nothing else."""


class Holdings:
    """What the daemon has apart from the app; see the module."""

    def __init__(
        self,
        plane: Plane,
        source: Source,
        name: str,
        environ: Mapping[str, str],
        *,
        describe_stop: Callable[[], dict[str, Any]],
        stop: Callable[[StopReason], None],
    ) -> None:
        self.plane = plane
        self._describe_stop, self._stop = describe_stop, stop
        self._production = False
        self.admin, self.agent = AdminServer(source), Agent(source)
        self.state = StateDirectory(name, environ)
        self.listeners: list[Listener] = []
        self.endpoints: list[EndpointServer] = []
        self._endpoints_of_workers: dict[str, EndpointServer] = {}
        self.last_stop: dict[str, Any] | None = None
        """The record of the stop before this run."""
        self._beside: dict[str, list[Listener]] = {"admin": [], "agent": []}
        self._environ = environ

    def open(self, config: Config, store: Store, stack: ExitStack) -> None:
        """Open all of it; `stack` closes what was opened, also if opening the rest fails."""
        passed = launch.take_passed(self._environ, config)
        stack.callback(put_away, self.plane.close)
        self.plane.open(config, launch.for_control(config, passed))
        stack.callback(put_away, self.close_listeners)
        launch.change_directory(config.app)
        launch.bind_all(config, self.listeners, self._beside, passed, store)
        stack.callback(put_away, self.admin.close)
        self.admin.open(self._beside["admin"], config.admin.allowed_hosts, details=config.admin.details)
        stack.callback(put_away, self.agent.close)
        self.agent.open(self._beside["agent"])
        self.state.open(record=config.shutdown.record)
        self.last_stop = self.state.last_stop()  # read once, because it does not change and a disk may hang
        stack.callback(put_away, self.state.close)
        stack.callback(put_away, self.close_endpoints, _ENDPOINT_CLOSING)
        self._production = config.profile == "production"
        if (endpoint := config.shutdown.endpoint).listen is not None:
            from flaskd.admin.endpoint.token import configured_token  # noqa: PLC0415 - few have an endpoint

            token = configured_token(endpoint.token_file, endpoint.credential, self._environ)
            self.open_endpoint(Address.parse(endpoint.listen), token, endpoint.allowed_hosts)

    def snapshot(self) -> Held:
        """The present facts about it; any thread may call this."""
        return Held(
            listen=tuple(str(each.address) for each in self.listeners),
            url=self.listeners[0].address.url if self.listeners else None,
            admin=tuple(map(str, self.admin.addresses)),
            agent=tuple(map(str, self.agent.addresses)),
            shutdown_endpoints=tuple(each.url for each in self.endpoints),
            previous=self.state.previous,
            last_stop=self.last_stop,
        )

    def tell(self) -> None:
        """Log where flaskd can be reached, and put it into the environment of the app's children."""
        where = ", ".join(listener.address.announced for listener in self.listeners)
        nodes = self.plane.nodes
        more = {"admin": [each.announced for each in self.admin.addresses], "agent": map(str, self.agent.addresses)}
        beside = "".join(f"; {name}: {there}" for name, each in more.items() if (there := ", ".join(each)))
        log.info(f"flaskd (pid {os.getpid()}) will serve on {where}; control: {', '.join(nodes) or 'none'}{beside}")
        if nodes:
            os.environ["FLASKD_CONTROL"] = nodes[0]

    def open_endpoint(self, address: Address, token: bytes, allowed_hosts: Sequence[str]) -> EndpointServer:
        """Open a shutdown endpoint: that of the configuration, or one that the app's code asks for.

        Raises ConfigError under ``profile: production``, and CannotCreateError if the address cannot be bound.
        """
        if self._production:
            raise ConfigError("cannot open a shutdown endpoint: flaskd runs with profile: production")
        from flaskd.admin.endpoint.server import EndpointServer  # noqa: PLC0415 - few have an endpoint

        endpoint = EndpointServer(
            address,
            token,
            allowed_hosts=allowed_hosts,
            plan=self._describe_stop,
            stop=lambda peer: self._stop(StopReason("endpoint", peer)),
        ).open()
        self.endpoints.append(endpoint)
        return endpoint

    def endpoint_for(self, address: Address, token: bytes, allowed_hosts: Sequence[str]) -> EndpointServer:
        """The endpoint that a worker's app asks for; each worker asks, and it is opened once."""
        wanted = self._endpoints_of_workers.get(str(address))
        if wanted is None:
            wanted = self._endpoints_of_workers[str(address)] = self.open_endpoint(address, token, allowed_hosts)
        return wanted

    def close_endpoints(self, timeout: float) -> None:
        """Close the endpoints; a client has `timeout` seconds to read its answer."""
        for endpoint in self.endpoints:
            endpoint.close(min(timeout, _ENDPOINT_CLOSING))

    @property
    def undone_by(self) -> str:
        """What would undo the stop, as a hint to the client that asked for it; empty if nothing would."""
        passed = any(listener.shared and not listener.stored for listener in self.listeners)
        return "the next connection starts it again, unless the .socket unit is stopped too" if passed else ""

    def tell_who_waits(self) -> None:
        """Log how many connections wait on listeners that other programs share."""
        for each in self.listeners:
            if each.shared and (waiting := each.waiting()):
                log.info(
                    f"{waiting} connections wait on {each.address} for the next process that listens, or are reset"
                )

    def close_listeners(self) -> None:
        """Close all listeners."""
        for listener in (*self.listeners, *chain(*self._beside.values())):
            listener.close()

    def remove_nodes(self) -> None:
        """Remove the nodes to which clients could connect."""
        self.plane.remove_nodes()
        for endpoint in self.endpoints:
            endpoint.withdraw()
        self.close_listeners()

    def leave_nothing(self) -> None:
        """Remove everything at once, because the process ends from a thread other than the main one."""
        self.remove_nodes()
        self.state.close()
        self.plane.close()

    def forget(self) -> None:
        """To be called in a child that the app forked: close all descriptors; the files belong to the parent."""
        self.plane.forget()
        self.state.forget()
        self.agent.forget()
        for listener in (*self.listeners, *chain(*self._beside.values())):
            listener.socket.close()  # for listeners that no server has yet


def put_away(end: Callable[..., object], *args: object) -> None:
    """Close a part of the daemon at the end; if that fails, the other parts and the exit code stay as they are."""
    try:
        end(*args)
    except BaseException:  # see above
        log.exception("cannot put everything away")
