"""The configuration's keys with their kinds, defaults and descriptions. Each key is spelled only here."""

import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from flaskd.config.cleanup_model import CleanupConfig
from flaskd.config.fields import (
    AUTO,
    CredentialName,
    Duration,
    HeaderText,
    HostName,
    InstanceName,
    LevelName,
    Listen,
    Member,
    Mode,
    OneOrMany,
    OwnAddress,
    PathPattern,
    Size,
    SomeText,
    TrustedProxy,
    UrlPath,
    UrlPrefix,
    VerbName,
    Workers,
)
from flaskd.config.kind import LowerCase, exampled
from flaskd.config.settings import Settings, field, section
from flaskd.process.cpus import usable


def _restart(default: Any, description: str, **more: Any) -> Any:
    """Make a field that a reload cannot change."""
    return field(default, description=description, restart=True, **more)


def _renewal(default: Any, description: str, **more: Any) -> Any:
    """Make a field about serving the app: a reload changes it in new workers, but not in a daemon without workers."""
    return field(default, description=description, restart=True, renewal=True, **more)


def _host_name() -> str:
    """The host's name, if a header may contain it."""
    return re.sub(r"[^!-~]", "?", socket.gethostname())[:128] or "localhost"


class AppConfig(Settings):
    """The app to serve."""

    target: Annotated[SomeText, exampled("shop.wsgi:app", "shop:create_app()")] | None = _renewal(
        None, "The app, as MODULE:NAME or MODULE:FACTORY(); none: Flask's own search."
    )
    chdir: Path | None = _restart(None, "Directory to work in and import from; relative to this file.")


ProxyHeader = Literal[
    "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-forwarded-port", "x-forwarded-by", "forwarded"
]


# Waitress would refuse these values at start; here the fault has its place. `before` has the earlier fields of the
# section, so `trusted_proxy` is missing only if it has a fault itself.
def _proxy_is_named(value: Any, before: Mapping[str, Any]) -> Any:
    if value and before.get("trusted_proxy") == []:
        raise ValueError("expected server.trusted_proxy to be set along with this")
    return value


def _one_kind_of_header(headers: list[str], before: Mapping[str, Any]) -> list[str]:
    _proxy_is_named(headers, before)
    if "forwarded" in headers and set(headers) != {"forwarded"}:
        raise ValueError("expected either forwarded or x-forwarded-* headers, not both")
    return headers


class ServerConfig(Settings):
    """How requests are accepted and served; most names and meanings are those of waitress (waitress.adjustments)."""

    listen: OneOrMany[Listen] = _restart([], "Addresses to listen on; none: sockets passed in, else 127.0.0.1:8000.")
    threads: int = field(4, ge=1, le=1024, description="Threads per worker; each runs one request at a time.")
    workers: Workers = _restart(
        0, "Worker processes; 0: none, the app runs in the daemon itself; auto: one for each CPU that may be used."
    )
    connection_limit: int | None = _renewal(
        None, "Connections at once, per worker; none: as many as open files allow.", ge=1
    )
    request_timeout: Duration | None = field(
        None, gt=0, description="How long the app may work on a request before it is given up; none: no limit."
    )
    request_timeouts: dict[PathPattern, Duration | None] = field(
        {}, description="The same for single paths, exact or with * at the end; null: no limit."
    )
    queue_timeout: Duration | None = field(
        None, gt=0, description="A request that has waited this long for a thread is refused with 503; none: never."
    )
    max_queue: int | None = field(
        None, ge=0, description="How many requests may wait for a thread, per worker; others get 503; none: no limit."
    )
    trusted_proxy: OneOrMany[TrustedProxy] = _renewal(
        [], "Addresses or networks of the proxies whose headers are believed; localhost, Unix sockets too; or *."
    )
    trusted_proxy_count: int | None = _renewal(None, "How many proxies stand in a row.", ge=1, check=_proxy_is_named)
    trusted_proxy_headers: OneOrMany[Annotated[ProxyHeader, LowerCase]] = _renewal(
        [], "Proxy headers to believe.", check=_one_kind_of_header
    )
    url_scheme: Literal["http", "https"] = _renewal("http", "URL scheme that the app sees.")
    url_prefix: UrlPrefix = _renewal("", "SCRIPT_NAME that the app sees; starts with /.")
    max_request_body_size: Size = _renewal(1024**3, "Largest request body accepted.", ge=1)
    max_request_header_size: Size = _renewal(256 * 1024, "Largest request head accepted.", ge=1)
    channel_timeout: Duration = _renewal(120.0, "An idle connection is closed after this.", gt=0)
    head_timeout: Duration = field(10.0, gt=0, description="A request whose head takes longer is refused.")
    min_rate: Size = field(
        240, description="Least bytes per second that a client must send of a body or read of an answer; 0: no limit."
    )
    outbuf_high_watermark: Size = _renewal(
        16 * 1024**2, "How much of an answer is kept for a client that reads slowly.", ge=1
    )
    backlog: int = _restart(1024, "Connections that the kernel holds until they are accepted.", ge=1, le=2**31 - 1)
    ident: HeaderText = _renewal("flaskd", "Value of the Server header; empty: no such header.")
    instance: InstanceName | None = field(
        None, description="The name of this flaskd in logs, status and metrics; none: the host's name."
    )
    served_by: bool = field(False, description="Whether each answer has the header X-Served-By with the instance.")


class PoolConfig(Settings):
    """How worker processes are started and replaced; without effect if server.workers is 0."""

    start_timeout: Duration = field(60.0, gt=0, description="How long a new worker may take until it is ready.")
    surge: int = field(1, ge=1, description="How many workers are replaced at the same time.")
    preload: bool = field(
        False,
        renewal=True,
        description="Import the app once, in a process of its own from which the workers are forked.",
    )
    canary: Duration | None = field(
        None, gt=0, description="How long the first new worker of a reload must live before the others are replaced."
    )
    stuck_after: Duration | None = field(
        None, gt=0, description="Replace a worker when all of its threads have hung for this long; none: never."
    )
    max_requests: int | None = field(None, ge=1, description="Replace a worker after this many requests; none: never.")
    max_age: Duration | None = field(None, gt=0, description="Replace a worker that is this old; none: never.")
    max_memory: Size | None = field(
        None, ge=1, description="Replace a worker that uses this much memory (PSS); none: never."
    )


class LogConfig(Settings):
    """flaskd's own log; the app's logging is left alone."""

    level: Annotated[Literal["debug", "info", "warning", "error"], LevelName] = field(
        "info", description="Lowest level that is logged, in upper or lower case; warn means warning."
    )
    format: Literal["auto", "text", "json", "journal"] = field(
        "auto", description="auto: fields in the journal, colour on a terminal, plain text otherwise."
    )
    access: Literal["off", "common", "combined", "json"] = field("combined", description="Access log format.")
    request_id: bool = field(
        False, description="Whether each request gets an X-Request-ID, for the app and the client."
    )


class HealthConfig(Settings):
    """How flaskd checks that the app answers, and answers health checks itself."""

    probe: UrlPath | None = field(None, description="Path of the app asked for before READY; below 500 passes.")
    probe_timeout: Duration = field(5.0, gt=0, description="How long the probe may take.")
    path: UrlPath | None = field(
        None, description="Path answered by flaskd itself: 200 while new requests are welcome."
    )
    unready_status: int = field(503, ge=400, le=599, description="Status of that answer while they are not.")


class RolesConfig(Settings):
    """Who may do what over the control socket: users by name or number, groups with an @ before; each in quotes."""

    viewer: OneOrMany[Member] = field([], description="May look.")
    operator: OneOrMany[Member] = field(
        [], description="May drain, resume, reload, scale, restart workers and change the log level, too."
    )
    admin: OneOrMany[Member] = field([], description="May stop, too. Root and the daemon's own user always may.")

    def members(self) -> dict[str, list[str]]:
        """The users and groups with each role; empty if there are none, and every client of the socket is admin."""
        return {role: members for role in type(self).model_fields if (members := getattr(self, role))}


class ControlConfig(Settings):
    """The control socket and FIFO in the runtime directory."""

    mode: Mode = _restart("0660", "File mode of both nodes, octal.")
    group: SomeText | None = _restart(None, "Group of both nodes; none: that of the process.")
    required: bool = _restart(False, "Refuse to start when neither node can be made.")
    roles: RolesConfig = section(RolesConfig)
    fifo: OneOrMany[VerbName] | None = field(
        None, description="Verbs that the FIFO accepts, whose writer is not known; none: all if there are no roles."
    )

    @property
    def mode_bits(self) -> int:
        """The mode as a number for chmod(2)."""
        return int(self.mode, 8)


class AdminConfig(Settings):
    """On addresses of its own: / (a page) /livez /readyz /metrics /status.json over HTTP, and the agent."""

    listen: OneOrMany[Listen] = _restart([], "Addresses; none: a socket passed in as admin, else there is no listener.")
    allowed_hosts: OneOrMany[SomeText] = _restart(
        [], "Host names, beside addresses and localhost, by which page, metrics and status may be asked for; *: any."
    )
    details: bool = _restart(False, "Show clients' addresses on the page, also on addresses that other machines reach.")
    agent: OneOrMany[Listen] = _restart(
        [], "Addresses for HAProxy's agent-check; none: a socket passed in as agent, else there is no agent."
    )


class DrainConfig(Settings):
    """How requests in flight are finished."""

    timeout: Duration = field(15.0, description="How long requests in flight may take to finish.")
    keepalive_grace: Duration = field(
        1.0, description="How long after its last answer a connection may send one more request."
    )
    stream_grace: Duration = field(
        5.0, description="How long an event stream may go on; then it ends between two events."
    )
    while_drained: Literal["auto", "wait"] = field(
        "auto", description="auto: inherited listeners answer 503 while drained; wait: their clients wait."
    )


class IdleConfig(Settings):
    """Whether flaskd stops by itself when it is not used."""

    after: Duration | None = field(
        None, gt=0, description="Stop after this long without a request that counts; none: never."
    )
    ignore: OneOrMany[PathPattern] = field(
        [], description="Paths that do not count, exact or with * at the end; health.path never does."
    )


class EndpointConfig(Settings):
    """The shutdown endpoint, for development and scripts: `POST /shutdown` on an address of its own."""

    listen: OwnAddress | None = _restart(None, "Address of its own to listen on; none: there is no endpoint.")
    token_file: Path | None = _restart(
        None, "File with the bearer token, mode 0600 or narrower; relative to this file."
    )
    credential: CredentialName | None = _restart(None, "Name of the systemd credential with the token instead.")
    allowed_hosts: OneOrMany[HostName] = _restart(
        [], "Host headers that are accepted, exactly; none: the address itself, and localhost where it is one."
    )

    def check_whole(self) -> None:
        """Raise ValueError unless the token has one source, and the other keys are set only together with `listen`."""
        if self.listen is not None and (self.token_file is None) == (self.credential is None):
            raise ValueError("expected either token_file or credential along with listen")
        if self.listen is None and (self.token_file or self.credential or self.allowed_hosts):
            raise ValueError("expected listen along with the other keys")


class ExitCodes(Settings):
    """Exit codes that can be chosen."""

    degraded: int = field(0, ge=0, le=255, description="Exit code of a stop that had to cut work off.")


def _less_than_the_deadline(reserve: float, before: Mapping[str, Any]) -> float:
    if reserve >= before.get("deadline", float("inf")):
        raise ValueError("expected less than shutdown.deadline")
    return reserve


class ShutdownConfig(Settings):
    """The stop; everything in it shares one time limit."""

    deadline: Duration = field(25.0, gt=0, description="The whole stop takes no longer than this.")
    reserve: Duration = field(
        3.0,
        description="Part of the deadline kept for flush, final and `always`; shorter if the deadline is.",
        check=_less_than_the_deadline,
    )
    exit_wait: Duration = field(
        5.0, description="How long the app's exit callbacks, threads and children may take, within the deadline."
    )
    announce: Duration = field(
        0.0, description="How long flaskd says that it is not ready, and still accepts requests, before a drain."
    )
    drain: DrainConfig = section(DrainConfig)
    idle: IdleConfig = section(IdleConfig)
    endpoint: EndpointConfig = section(EndpointConfig)
    record: SomeText | None = _restart(
        "last-stop.json",
        "Where the last stop is recorded, under the state directory; none: nowhere; a crash is still noticed.",
    )
    exit_codes: ExitCodes = section(ExitCodes)

    def check_whole(self) -> None:
        """Shrink the reserve with the deadline if it was not written in the file."""
        if "reserve" not in self.model_fields_set and self.reserve >= self.deadline:
            self.__dict__["reserve"] = self.deadline / 5


class SystemdConfig(Settings):
    """What flaskd does for systemd apart from reporting its state."""

    fdstore: bool = _restart(False, "Keep the listeners in systemd's store, so that they survive a restart or crash.")
    stuck_after: Duration | None = field(
        None, gt=0, description="With WatchdogSec=: be restarted when all threads have hung for this long; none: never."
    )


class Config(Settings):
    """The whole configuration. Durations are seconds, sizes are bytes."""

    version: Literal[1] = field(1, description="Version of this file's format.")
    watch: bool = field(False, description="Whether flaskd reloads by itself when this file has changed.")
    app: AppConfig = section(AppConfig)
    profile: Literal["development", "production"] = _restart("development", "How strict flaskd is.")
    server: ServerConfig = section(ServerConfig)
    pool: PoolConfig = section(PoolConfig)
    log: LogConfig = section(LogConfig)
    health: HealthConfig = section(HealthConfig)
    control: ControlConfig = section(ControlConfig)
    admin: AdminConfig = section(AdminConfig)
    shutdown: ShutdownConfig = section(ShutdownConfig)
    systemd: SystemdConfig = section(SystemdConfig)
    cleanup: CleanupConfig = section(CleanupConfig)

    @property
    def instance(self) -> str:
        """The name of this flaskd."""
        return self.server.instance or _host_name()

    @property
    def served_by(self) -> str:
        """The value of X-Served-By in each answer; empty: no such header."""
        return self.instance if self.server.served_by else ""

    def count_workers(self) -> int:
        """The number of workers that there should be; with auto, the CPUs that this process may use now."""
        return usable() if self.server.workers == AUTO else int(self.server.workers)
