"""The configuration's keys, their kinds and defaults. A key is spelled here and nowhere else."""

import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializeAsAny,
    SkipValidation,
    ValidationInfo,
    WithJsonSchema,
    create_model,
    field_validator,
    model_validator,
)

from flaskd.config.fields import (
    CredentialName,
    Duration,
    HeaderText,
    HostName,
    Listen,
    LowerCase,
    Member,
    Mode,
    OneOrMany,
    OwnAddress,
    PathPattern,
    PolicyName,
    Size,
    SomeText,
    TrustedProxy,
    UrlPath,
    UrlPrefix,
    VerbName,
)


class Section(BaseModel):
    """Base of every part of the configuration: unknown keys are refused, values never change.

    The fields of a cleanup action derive from it too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")


class Phase(StrEnum):
    """The phases of a stop, in the order in which they run."""

    ANNOUNCE = "announce"
    DRAIN = "drain"
    QUIESCE = "quiesce"
    PERSIST = "persist"
    CLOSE = "close"
    FLUSH = "flush"
    FINAL = "final"

    @property
    def position(self) -> int:
        """Position in the order, from 0."""
        return list(Phase).index(self)


@dataclass(frozen=True)
class ActionSpec:
    """What the configuration needs to know of a cleanup action: its fields, and the phase it belongs in.

    `fault` is why it cannot be used, empty when it can. `needs` are the modules of which one must be installed, each
    with its name at the package index. `keeps` is the field that names its file under the state directory,
    empty when it has none.
    """

    fields: type[BaseModel]
    default_phase: Phase
    fault: str = ""
    needs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    keeps: str = ""

    def missing(self) -> str:
        """What would have to be installed; empty when the action can do its work. Imports none of it."""
        return "" if not self.needs or any(map(_installed, self.needs)) else " or ".join(self.needs.values())

    @property
    def strict_fields(self) -> type[BaseModel]:
        """The fields, refusing unknown keys also where their author did not say whether to."""
        return _closed(self.fields)


def _installed(module: str) -> bool:
    try:
        return module in sys.modules or importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # its parent is not there, or is no package
        return False


@functools.lru_cache(maxsize=256)
def _closed(fields: type[BaseModel]) -> type[BaseModel]:
    if "extra" in fields.model_config:
        return fields
    return create_model(fields.__name__, __base__=fields, __cls_kwargs__={"extra": "forbid"})


Actions = Mapping[str, ActionSpec]


def _restart(default: Any, description: str, **more: Any) -> Any:
    """Make a field that a reload cannot change."""
    return Field(default, description=description, json_schema_extra={"restart": True}, **more)


def _no_default(schema: dict[str, Any]) -> None:
    schema.pop("default", None)


def _section(section: type[Section]) -> Any:
    """Make a field that holds a section; what is not written there has its defaults."""
    return Field(default_factory=section, description=section.__doc__)


def _filled_in(description: str, **more: Any) -> Any:
    """Make a field that may be left out and is filled in from elsewhere once the whole file is read."""
    return Field(default=None, description=description, json_schema_extra=_no_default, **more)


class AppConfig(Section):
    """The app to serve."""

    target: SomeText | None = _restart(None, "The app, as MODULE:NAME or MODULE:FACTORY(); none: Flask's own search.")
    chdir: Path | None = _restart(None, "Directory to work in and import from; relative to this file.")


ProxyHeader = Literal[
    "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-forwarded-port", "x-forwarded-by", "forwarded"
]


class ServerConfig(Section):
    """How requests are accepted and served; names and meanings are waitress' own (waitress.adjustments)."""

    listen: OneOrMany[Listen] = _restart([], "Addresses to listen on; none: sockets passed in, else 127.0.0.1:8000.")
    threads: int = Field(4, ge=1, le=1024, description="Worker threads; each runs one request at a time.")
    workers: int = _restart(0, "Worker processes; only 0 (none) in this version.")
    connection_limit: int | None = _restart(None, "Connections at once; none: as many as open files allow.", ge=1)
    trusted_proxy: OneOrMany[TrustedProxy] = _restart(
        [], "Addresses or networks of the proxies whose headers are believed; localhost, Unix sockets too; or *."
    )
    trusted_proxy_count: int | None = _restart(None, "How many proxies stand in a row.", ge=1)
    trusted_proxy_headers: OneOrMany[Annotated[ProxyHeader, LowerCase]] = _restart([], "Proxy headers to believe.")
    url_scheme: Literal["http", "https"] = _restart("http", "URL scheme that the app sees.")
    url_prefix: UrlPrefix = _restart("", "SCRIPT_NAME that the app sees; starts with /.")
    max_request_body_size: Size = _restart(1024**3, "Largest request body accepted.", ge=1)
    max_request_header_size: Size = _restart(256 * 1024, "Largest request head accepted.", ge=1)
    channel_timeout: Duration = _restart(120.0, "An idle connection is closed after this.", gt=0)
    backlog: int = _restart(1024, "Connections that the kernel holds until they are accepted.", ge=1, le=2**31 - 1)
    ident: HeaderText = _restart("flaskd", "Value of the Server header; empty: no such header.")

    @field_validator("workers")
    @classmethod
    def _no_workers_yet(cls, workers: int) -> int:
        if workers:
            raise ValueError("expected 0 (worker processes are not in this version)")
        return workers

    # What waitress would refuse at start, refused here with a place. `trusted_proxy` stands before both in
    # this class, so its value is in hand; it is missing from `info.data` only when it has its own fault.
    @field_validator("trusted_proxy_count", "trusted_proxy_headers")
    @classmethod
    def _proxy_is_named(cls, value: Any, info: ValidationInfo) -> Any:
        if value and info.data.get("trusted_proxy") == []:
            raise ValueError("expected server.trusted_proxy to be set along with this")
        return value

    @field_validator("trusted_proxy_headers")
    @classmethod
    def _one_kind_of_header(cls, headers: list[ProxyHeader]) -> list[ProxyHeader]:
        if "forwarded" in headers and set(headers) != {"forwarded"}:
            raise ValueError("expected either forwarded or x-forwarded-* headers, not both")
        return headers


class LogConfig(Section):
    """flaskd's own log; the app's logging is left alone."""

    level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severity that is logged.")
    format: Literal["auto", "text", "json", "journal"] = Field(
        "auto", description="auto: fields in the journal, colour on a terminal, plain text otherwise."
    )
    access: Literal["off", "common", "combined", "json"] = Field("combined", description="Access log format.")


class HealthConfig(Section):
    """How flaskd makes sure that the app answers."""

    probe: UrlPath | None = Field(None, description="Path of the app asked for before READY; below 500 passes.")
    probe_timeout: Duration = Field(5.0, gt=0, description="How long the probe may take.")
    path: UrlPath | None = Field(
        None, description="Path answered by flaskd itself: 200 while new requests are welcome."
    )
    unready_status: int = Field(503, ge=400, le=599, description="Status of that answer while they are not.")


class RolesConfig(Section):
    """Who may do what over the control socket: users by name or number, groups with an @ before; each in quotes."""

    viewer: OneOrMany[Member] = Field([], description="May look.")
    operator: OneOrMany[Member] = Field([], description="May drain, resume, reload and change the log level, too.")
    admin: OneOrMany[Member] = Field([], description="May stop, too. Root and the daemon's own user always may.")

    def members(self) -> dict[str, list[str]]:
        """Who has which role; empty when nobody is named: then whoever may open the socket is admin."""
        return {role: members for role in type(self).model_fields if (members := getattr(self, role))}


class ControlConfig(Section):
    """The control socket and FIFO in the runtime directory."""

    mode: Mode = _restart("0660", "File mode of both nodes, octal.")
    group: SomeText | None = _restart(None, "Group of both nodes; none: that of the process.")
    required: bool = _restart(False, "Refuse to start when neither node can be made.")
    roles: RolesConfig = _section(RolesConfig)
    fifo: OneOrMany[VerbName] | None = Field(
        None, description="Verbs that the FIFO takes, for it tells nothing of who writes; none: all without roles."
    )

    @property
    def mode_bits(self) -> int:
        """The mode as a number, for chmod(2)."""
        return int(self.mode, 8)


class AdminConfig(Section):
    """Health, metrics and status over HTTP, on addresses of their own: /livez /readyz /metrics /status.json."""

    listen: OneOrMany[Listen] = _restart([], "Addresses; none: a socket passed in as admin, else there is no listener.")
    allowed_hosts: OneOrMany[SomeText] = _restart(
        [], "Host names, beside addresses and localhost, by which metrics and status may be asked for; *: any."
    )


class DrainConfig(Section):
    """How work in hand is finished."""

    timeout: Duration = Field(15.0, description="How long requests in flight may take to finish.")
    keepalive_grace: Duration = Field(
        1.0, description="How long after its last answer a connection may send one more request."
    )
    stream_grace: Duration = Field(
        5.0, description="How long an event stream may go on; then it ends between two events."
    )
    while_drained: Literal["auto", "wait"] = Field(
        "auto", description="auto: inherited listeners answer 503 while drained; wait: their clients wait."
    )


class IdleConfig(Section):
    """Stopping by itself when nobody asks for anything."""

    after: Duration | None = Field(
        None, gt=0, description="Stop when nothing that counts was asked for so long; none: never."
    )
    ignore: OneOrMany[PathPattern] = Field(
        [], description="Paths that do not count, exact or with * at the end; health.path never does."
    )


class EndpointConfig(Section):
    """The shutdown endpoint, for development and scripts: `POST /shutdown` on an address of its own."""

    listen: OwnAddress | None = _restart(None, "Address of its own to listen on; none: there is no endpoint.")
    token_file: Path | None = _restart(
        None, "File with the bearer token, mode 0600 or narrower; relative to this file."
    )
    credential: CredentialName | None = _restart(None, "Name of the systemd credential with the token instead.")
    allowed_hosts: OneOrMany[HostName] = _restart(
        [], "Host headers that are accepted, exactly; none: the address itself, and localhost where it is one."
    )

    @model_validator(mode="after")
    def _no_token_no_route(self) -> Self:
        if self.listen is not None and (self.token_file is None) == (self.credential is None):
            raise ValueError("expected either token_file or credential along with listen")
        if self.listen is None and (self.token_file or self.credential or self.allowed_hosts):
            raise ValueError("expected listen along with the other keys")
        return self


class ExitCodes(Section):
    """Exit codes that can be chosen."""

    degraded: int = Field(0, ge=0, le=255, description="Exit code of a stop that had to cut work off.")


class ShutdownConfig(Section):
    """The stop: one budget for everything in it."""

    deadline: Duration = Field(25.0, gt=0, description="The whole stop takes no longer than this.")
    reserve: Duration = Field(
        3.0, description="Part of the deadline kept for flush, final and `always`; shorter if the deadline is."
    )
    exit_wait: Duration = Field(
        5.0, description="How long the app's exit callbacks, threads and children may take, within the deadline."
    )
    announce: Duration = Field(
        0.0, description="How long readiness says no while requests are still accepted, before a drain."
    )
    drain: DrainConfig = _section(DrainConfig)
    idle: IdleConfig = _section(IdleConfig)
    endpoint: EndpointConfig = _section(EndpointConfig)
    record: SomeText | None = _restart(
        "last-stop.json",
        "Where the last stop is recorded, under the state directory; none: nowhere; a crash is still noticed.",
    )
    exit_codes: ExitCodes = _section(ExitCodes)

    @field_validator("reserve")
    @classmethod
    def _less_than_the_deadline(cls, reserve: float, info: ValidationInfo) -> float:
        if reserve >= info.data.get("deadline", float("inf")):
            raise ValueError("expected less than shutdown.deadline")
        return reserve

    @model_validator(mode="after")
    def _shrink_the_default(self) -> Self:
        if "reserve" not in self.model_fields_set and self.reserve >= self.deadline:
            # Nobody wrote a reserve, so nobody is at fault. (Frozen means: once this is done.)
            self.__dict__["reserve"] = self.deadline / 5
        return self


class SystemdConfig(Section):
    """What flaskd does for systemd beyond telling it how things are."""

    fdstore: bool = _restart(False, "Keep the listeners in systemd's store, so that they survive a restart or crash.")
    stuck_after: Duration | None = Field(
        None, gt=0, description="With WatchdogSec=: be restarted when all threads hang for so long; none: never."
    )


OnFailure = Literal["continue", "skip_dependents", "abort"]


class PolicyDefaults(Section):
    """What a policy gets where it says nothing itself."""

    timeout: Duration = Field(5.0, gt=0, description="How long a policy may take.")
    on_failure: OnFailure = Field("continue", description="What a failed policy means for the others.")
    retries: int = Field(0, ge=0, le=10, description="How often a failed policy is tried again.")


class When(Section):
    """On which stops a policy runs; what is left out does not matter."""

    reason: OneOrMany[Literal["signal", "control", "endpoint", "idle", "failure"]] = Field(
        [], description="Only on stops for one of these reasons."
    )
    outcome: Literal["clean", "degraded"] | None = Field(None, description="Only after a drain that ended so.")


class Policy(Section):
    """When and how one cleanup action runs."""

    use: str = Field(description="The action.")
    phase: Phase = _filled_in("The phase it runs in; default: the action's own.")
    # Validated apart, against the action's fields: a union of all actions would report each one's faults.
    with_: SerializeAsAny[Annotated[BaseModel, SkipValidation, WithJsonSchema({"type": "object"})]] = _filled_in(
        "The action's own fields.", alias="with"
    )
    timeout: Duration = _filled_in("How long it may take; default: cleanup.defaults.timeout.", gt=0)
    retries: int = _filled_in("How often it is tried again; default: cleanup.defaults.retries.", ge=0, le=10)
    on_failure: OnFailure = _filled_in("What its failure means for others; default: as in cleanup.defaults.")
    after: OneOrMany[str] = Field([], description="Policies that must have ended before; same phase or earlier.")
    when: When = _section(When)
    always: bool = Field(False, description="Runs even after an abort, in a share of the reserve that is its own.")
    enabled: bool = Field(
        True, description="false: as if it were not written; what it would end is still found, and closed by discovery."
    )

    @property
    def hidden(self) -> tuple[str, ...]:
        """What was interpolated into the action's fields: no message of it may show that."""
        return self._hidden

    def hiding(self, texts: Iterable[str]) -> Self:
        """Note what was interpolated."""
        self._hidden = tuple(texts)
        return self

    _hidden: tuple[str, ...] = PrivateAttr(())


class DiscoveryConfig(Section):
    """What is done with what the app holds open, where no policy says it; the mode may stand alone, as one word."""

    mode: Literal["auto", "report", "off"] = Field(
        "auto", description="auto: find it and close it; report: find it and say so; off: do not look."
    )
    exclude: OneOrMany[SomeText] = Field(
        [], description="Names of what is left alone, as `flaskd plan` shows them; or actions, for all of their kind."
    )

    @model_validator(mode="before")
    @classmethod
    def _one_word(cls, value: Any) -> Any:
        return {"mode": value} if isinstance(value, str) else value


class CleanupConfig(Section):
    """What is done after the drain."""

    discovery: DiscoveryConfig = _section(DiscoveryConfig)
    max_parallel: int = Field(8, ge=1, le=64, description="Policies of one phase that run at the same time.")
    defaults: PolicyDefaults = _section(PolicyDefaults)
    policies: dict[PolicyName, Policy] = Field({}, description="Cleanup policies by name, kept in this order.")


class Config(Section):
    """The whole configuration. Durations are seconds, sizes are bytes."""

    version: Literal[1] = Field(1, description="Version of this file's format.")
    watch: bool = Field(False, description="Whether an edit of this file is picked up by itself, as by a reload.")
    app: AppConfig = _section(AppConfig)
    profile: Literal["development", "production"] = _restart("development", "How strict flaskd is.")
    server: ServerConfig = _section(ServerConfig)
    log: LogConfig = _section(LogConfig)
    health: HealthConfig = _section(HealthConfig)
    control: ControlConfig = _section(ControlConfig)
    admin: AdminConfig = _section(AdminConfig)
    shutdown: ShutdownConfig = _section(ShutdownConfig)
    systemd: SystemdConfig = _section(SystemdConfig)
    cleanup: CleanupConfig = _section(CleanupConfig)
