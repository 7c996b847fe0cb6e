"""Notices: what the daemon tells of its life to the log, the service manager and the counters."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from flaskd.cleanup import StepResult
from flaskd.ledger import DrainReport
from flaskd.lifecycle import State, StopReason
from flaskd.log.setup import bounded_by
from flaskd.serving.api import Account
from flaskd.sockets import Address
from flaskd.values import value

log = logging.getLogger("flaskd.daemon")

_REFUSED = bounded_by("drains, resumes and reloads that the state refused")


@value
class Starting:
    """The configuration is read; the app is not loaded yet."""


@value
class Loaded:
    """The app is loaded, and has `probe_timeout` seconds to answer the probe; 0 if there is no probe."""

    probe_timeout: float


@value
class BecameReady:
    """flaskd serves `app` on these addresses."""

    app: str
    addresses: Sequence[Address]

    @property
    def status(self) -> str:
        """The notice as one line for people."""
        return f"ready: {self.app} on {', '.join(map(str, self.addresses))}"


@value
class BrokenOff:
    """The start was broken off; `why` is the reason."""

    why: str


@value
class FailedFor:
    """Why flaskd ends with a failure: the first line of the error, secrets masked, and an errno."""

    why: str
    number: int


@value
class Refused:
    """A request to the daemon that its present state does not allow."""

    why: str


@value
class DrainBegan:
    """A drain began, with `in_flight` requests and at most `timeout` seconds; `by` says who asked, for people."""

    in_flight: int
    timeout: float
    by: str = ""


@value
class DrainEnded:
    """A drain is over; `state` is the state now."""

    report: DrainReport
    state: State


@value
class Resumed:
    """flaskd serves again, or still, as `status` says; `before` is the state before."""

    status: str
    before: State


@value
class ReloadBegan:
    """A reload began, or began again; it was asked for at the time.monotonic() moment `since`."""

    since: float


@value
class SignalRefused:
    """A reload by SIGHUP is refused in this state; a service manager may wait for it."""

    since: float
    state: State
    why: str


@value
class ReloadEnded:
    """A reload is over; if there is a `fault`, the old configuration stays in force.

    `error` is set if its traceback is to be logged; `trace` is a traceback that comes from a worker.
    """

    what: str
    status: str
    fault: str = ""
    error: BaseException | None = None
    trace: str = ""


@value
class WorkersStart:
    """Workers start while flaskd is in this state; sent every few seconds until they are ready or fail."""

    state: State


@value
class StatusChanged:
    """flaskd serves as before, but its status line has changed."""

    status: str


@value
class StopBegan:
    """A stop began; it has `left` of `deadline` seconds. `drains` is false if a drain came before it."""

    reason: StopReason
    in_flight: int
    deadline: float
    left: float
    plan: str
    drains: bool

    @property
    def status(self) -> str:
        """The notice as one line for people."""
        return f"stopping ({self.reason}): {self.in_flight} in flight"


@value
class StepsTake:
    """The running steps of the stop take at most `seconds`; `left` is the seconds to its deadline."""

    seconds: float
    left: float


@value
class StepDone:
    """A cleanup step is over."""

    result: StepResult


@value
class Progress:
    """The progress of a drain or stop, in words; `left` is the seconds to the deadline of a stop."""

    text: str
    left: float | None


@value
class Stopped:
    """The stop is over; `failed` if flaskd ends because of a failure, which people must see."""

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
    """Passes each notice to all listeners in their order; if one raises, the others still get it."""

    def __init__(self, *listeners: Callable[[Notice], None]) -> None:
        self._listeners = listeners

    def tell(self, notice: Notice) -> None:
        """Pass a notice to all listeners."""
        for listener in self._listeners:
            try:
                listener(notice)
            except BaseException:  # for example the app's log handler; the daemon goes on
                log.exception(f"cannot tell of {type(notice).__name__}")


def log_it(notice: Notice) -> None:  # noqa: C901 - one case for each
    """Write a notice to the log."""
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
