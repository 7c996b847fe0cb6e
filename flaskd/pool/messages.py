"""What the supervisor and a worker tell each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flaskd.cleanup import StepResult
from flaskd.config import Configuration
from flaskd.errors import FlaskdError
from flaskd.ledger import DrainReport
from flaskd.lifecycle import StopReason
from flaskd.serving.api import Account
from flaskd.sockets import Address, Listener

# --- from the supervisor --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Begin:
    """Load the app; the first message. `path` is the supervisor's sys.path, `state` the state directory."""

    configuration: Configuration
    slot: int
    generation: int
    name: str
    path: Sequence[str]
    state: Path | None
    first: bool
    """Whether it is of the generation that the service began with, which brings back what the last stop kept."""


@dataclass(frozen=True)
class Preload:
    """Import the app, and be the template of a generation; the first message to one. `path` is the supervisor's."""

    configuration: Configuration
    generation: int
    path: Sequence[str]


@dataclass(frozen=True)
class Fork:
    """Fork a worker (to a template), whose wire, board and stacks come along."""

    slot: int


@dataclass(frozen=True)
class Passed:
    """A listener whose descriptor comes along.

    `kept`: clients that wait in its backlog are for who listens there next, outside of flaskd; `stored` is its name in
    the service manager's store.
    """

    address: Address
    kept: bool
    stored: str

    @classmethod
    def of(cls, listener: Listener) -> Passed:
        """What a worker has to know of it."""
        return cls(listener.address, listener.shared, listener.stored)


@dataclass(frozen=True)
class Serve:
    """Serve on these listeners."""

    listeners: tuple[Passed, ...]


@dataclass(frozen=True)
class DrainNow:
    """Drain, by the times of the configuration."""


@dataclass(frozen=True)
class CloseListeners:
    """Close the listeners as soon as their backlog is empty; the drain under way is to be undone."""


@dataclass(frozen=True)
class Resume:
    """Serve again, on these listeners."""

    listeners: tuple[Passed, ...]


@dataclass(frozen=True)
class Announce:
    """The service stops, though this worker does not yet: it is not ready any more."""


@dataclass(frozen=True)
class StopNow:
    """Stop within so many seconds, so many of them in reserve, and announced for so many.

    `leave`: other workers go on with the listeners.
    """

    reason: StopReason
    within: tuple[float, float, float]
    leave: bool


@dataclass(frozen=True)
class Hurry:
    """Cut the stop short."""

    reason: StopReason


@dataclass(frozen=True)
class Renew:
    """Serve by this configuration from now on; `Answer` says what came of it."""

    number: int
    configuration: Configuration


@dataclass(frozen=True)
class PauseSchedulers:
    """Let the app's schedulers begin no more jobs: another worker of the slot is about to import the app.

    `Answer` says that it is done.
    """

    number: int


@dataclass(frozen=True)
class ResumeSchedulers:
    """Let the app's schedulers go on: that other worker is gone."""


@dataclass(frozen=True)
class LogLevel:
    """Log from this level on."""

    level: str


@dataclass(frozen=True)
class Ask:
    """Tell `what` (requests, threads, files, plan or stop); `Answer` has it."""

    number: int
    what: str
    stacks: bool = False


# --- from a template ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preloaded:
    """The app is imported. `told` says which one, and why, for the log; `doubt` what else may have been meant.

    `keeps` has what the app did on import that no fork can take along; where there is any, none is forked.
    """

    told: str
    doubt: str
    keeps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Forked:
    """A worker was forked, and is the supervisor's child; or, without a pid, why not."""

    pid: int
    why: str = ""


# --- from a worker ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loaded:
    """The app is loaded; it waits for `Serve`."""

    target: str


@dataclass(frozen=True)
class IsReady:
    """It serves, and its probe was answered."""


@dataclass(frozen=True)
class NotReady:
    """It does not become ready, and ends."""

    error: FlaskdError


@dataclass(frozen=True)
class Closed:
    """It has emptied the backlog of the listeners that are the service's alone, and closed its copies of them."""


@dataclass(frozen=True)
class DrainOver:
    """Its drain is over."""

    report: DrainReport


@dataclass(frozen=True)
class StepBegins:
    """A step of its cleanup began, or is over; `running` are the names of those that run now, for `left` seconds."""

    left: float
    running: tuple[str, ...] = ()


@dataclass(frozen=True)
class StepOver:
    """A step of its cleanup is over."""

    result: StepResult


@dataclass(frozen=True)
class ExitWaits:
    """What the end of its process waits for, for people."""

    what: str


@dataclass(frozen=True)
class Wants:
    """Its app, or a signal that it got, asks the supervisor for something: ``stop`` or ``replace``."""

    what: str
    reason: StopReason


@dataclass(frozen=True)
class Leaves:
    """It stops though it was not told to: its serving thread died, say, or its app raised SystemExit."""

    reason: StopReason


@dataclass(frozen=True)
class OpenEndpoint:
    """Its app opens a shutdown endpoint; `Answer` goes the other way here."""

    number: int
    address: Address
    token: bytes = field(repr=False)
    allowed_hosts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What came of a message with a number: a value, or an error."""

    number: int
    value: Any = None
    error: FlaskdError | None = None


@dataclass(frozen=True)
class Ended:
    """Its stop is over; what is left is the end of its process."""

    account: Account
