"""What the daemon tells the world of its life; the log, the service manager and the counts hear it from here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flaskd.cleanup import StepResult
from flaskd.ledger import DrainReport
from flaskd.lifecycle import State, StopReason
from flaskd.log.setup import bounded_by
from flaskd.serving.api import Account
from flaskd.sockets import Address

log = logging.getLogger("flaskd.daemon")

_REFUSED = bounded_by("drains, resumes and reloads that the state refused")


@dataclass(frozen=True)
class Starting:
    """The configuration is read; the app is not loaded yet."""


@dataclass(frozen=True)
class Loaded:
    """The app is loaded, and has `probe_timeout` seconds to answer a probe; 0 when there is none."""

    probe_timeout: float


@dataclass(frozen=True)
class BecameReady:
    """It serves `app` on these addresses."""

    app: str
    addresses: Sequence[Address]

    @property
    def status(self) -> str:
        """A line for people."""
        return f"ready: {self.app} on {', '.join(map(str, self.addresses))}"


@dataclass(frozen=True)
class BrokenOff:
    """The start was broken off, and `why`."""

    why: str


@dataclass(frozen=True)
class FailedFor:
    """Why flaskd ends with a failure: the first line, secrets masked, and an errno."""

    why: str
    number: int


@dataclass(frozen=True)
class Refused:
    """What was asked for and the present state does not allow."""

    why: str


@dataclass(frozen=True)
class DrainBegan:
    """A drain of so many requests began, for at most `timeout` seconds; `by` is who asked for it, for people."""

    in_flight: int
    timeout: float
    by: str = ""


@dataclass(frozen=True)
class DrainEnded:
    """A drain is over; in `state` now."""

    report: DrainReport
    state: State


@dataclass(frozen=True)
class Resumed:
    """It serves again, or still, as `status` says; `before` is the state before."""

    status: str
    before: State


@dataclass(frozen=True)
class ReloadBegan:
    """A reload that was asked for at the time.monotonic() moment `since` began, or began anew."""

    since: float


@dataclass(frozen=True)
class SignalRefused:
    """A reload by SIGHUP, which a service manager waits for, is refused in this state."""

    since: float
    state: State
    why: str


@dataclass(frozen=True)
class ReloadEnded:
    """A reload is over; with a `fault` the old configuration is in force.

    `error` has a traceback worth telling; `trace` is one that comes from a worker.
    """

    what: str
    status: str
    fault: str = ""
    error: BaseException | None = None
    trace: str = ""


@dataclass(frozen=True)
class WorkersStart:
    """Workers are being started in this state; told every few seconds until they are ready, or fail."""

    state: State


@dataclass(frozen=True)
class StatusChanged:
    """It serves as before, and there is something else to say of it."""

    status: str


@dataclass(frozen=True)
class StopBegan:
    """A stop began, with `left` of the `deadline` in seconds; `drains` when nothing was drained before."""

    reason: StopReason
    in_flight: int
    deadline: float
    left: float
    plan: str
    drains: bool

    @property
    def status(self) -> str:
        """A line for people."""
        return f"stopping ({self.reason}): {self.in_flight} in flight"


@dataclass(frozen=True)
class StepsTake:
    """The steps of the stop that run now take `seconds` at most, of `left` to the deadline."""

    seconds: float
    left: float


@dataclass(frozen=True)
class StepDone:
    """A step of the cleanup is over."""

    result: StepResult


@dataclass(frozen=True)
class Progress:
    """How far a drain or stop is, in words; `left` are the seconds to the deadline of a stop."""

    text: str
    left: float | None


@dataclass(frozen=True)
class Stopped:
    """The stop is over; `failed` when it was for a failure, which people need to see."""

    account: Account
    failed: bool


Notice = (
    Starting
    | Loaded
    | BecameReady
    | BrokenOff
    | FailedFor
    | Refused
    | DrainBegan
    | DrainEnded
    | Resumed
    | ReloadBegan
    | SignalRefused
    | ReloadEnded
    | WorkersStart
    | StatusChanged
    | StopBegan
    | StepsTake
    | StepDone
    | Progress
    | Stopped
)


class Notices:
    """Tells each notice to all who listen, in their order; one that fails keeps it from no other."""

    def __init__(self, *listeners: Callable[[Notice], None]) -> None:
        self._listeners = listeners

    def tell(self, notice: Notice) -> None:
        """Tell it."""
        for listener in self._listeners:
            try:
                listener(notice)
            except BaseException:  # an app's sys.stderr or log handler, say; the daemon goes on
                log.exception(f"cannot tell of {type(notice).__name__}")


def log_it(notice: Notice) -> None:  # noqa: C901 - one case for each
    """Write it to the log."""
    match notice:
        case BecameReady():
            urls = ", ".join(each.announced for each in notice.addresses)
            log.info(f"ready: {notice.app} on {urls}")
        case BrokenOff():
            log.info(f"stopped while starting: {notice.why}")
        case Refused():
            log.warning(notice.why, extra=_REFUSED)
        case DrainBegan():
            log.info(f"draining: {notice.in_flight} in flight, for at most {notice.timeout:g}s")
        case DrainEnded(report):
            log.info(f"drained: {report}", extra={"fields": report.as_json()})
        case Resumed() if notice.before is not State.READY:
            log.info("resumed")
        case ReloadEnded(fault=""):
            log.info(f"reloaded {notice.what}")
        case ReloadEnded():
            log.error(f"reload failed: {notice.fault}{notice.trace}", exc_info=notice.error)
        case StopBegan():
            log.info(f"{notice.status}, at most {notice.deadline:g}s for everything; plan {notice.plan}")
        case Stopped(account):
            fates = [entry["fate"] for entry in account.steps.values()]
            cleanup = ", ".join(f"{fates.count(fate)} {fate}" for fate in dict.fromkeys(fates)) or "none"
            report = account.report
            log.info(f"stopped: {report}; cleanup: {cleanup}", extra={"fields": report.as_json()})
