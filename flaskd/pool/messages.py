"""The messages between the supervisor and its workers and templates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

from flaskd.cleanup import StepResult
from flaskd.config import Configuration
from flaskd.errors import FlaskdError
from flaskd.ledger import DrainReport
from flaskd.lifecycle import StopReason
from flaskd.serving.api import Account
from flaskd.sockets import Address, Listener
from flaskd.values import value

# --- from the supervisor --------------------------------------------------------------------------------------------


@value
class Begin:
    """Load the app: the first message to a worker. `path` is the supervisor's sys.path, `state` the state directory."""

    configuration: Configuration
    slot: int
    generation: int
    name: str
    path: Sequence[str]
    state: Path | None
    first: bool
    """Whether the worker is of the service's first generation, which restores what the last stop kept."""


@value
class Preload:
    """Import the app: the first message to the template of a generation. `path` is the supervisor's sys.path."""

    configuration: Configuration
    generation: int
    path: Sequence[str]


@value
class Fork:
    """Fork a worker (to a template); the descriptors of its wire, board and stacks come with the message."""

    slot: int


@value
class Passed:
    """A listener, whose descriptor comes with the message.

    `kept`: the socket is also held outside of flaskd, so clients in its backlog can wait for the next process that
    listens there. `stored` is its name in the service manager's store.
    """

    address: Address
    kept: bool
    stored: str

    @classmethod
    def of(cls, listener: Listener) -> Passed:
        """Describe a listener for a worker."""
        return cls(listener.address, listener.shared, listener.stored)


@value
class Serve:
    """Serve on these listeners."""

    listeners: tuple[Passed, ...]


@value
class DrainNow:
    """Drain, within the times of the configuration."""


@value
class CloseListeners:
    """Close the listeners once their backlog is empty, because the drain under way is to be undone."""


@value
class Resume:
    """Serve again, on these listeners."""

    listeners: tuple[Passed, ...]


@value
class Announce:
    """The service is about to stop: show that it is not ready, but go on serving."""


@value
class StopNow:
    """Stop. `within` has three lengths of time in seconds: the deadline, the reserve in it, and the announce.

    `leave`: other workers go on accepting from the listeners.
    """

    reason: StopReason
    within: tuple[float, float, float]
    leave: bool


@value
class Hurry:
    """Cut the stop short."""

    reason: StopReason


@value
class Renew:
    """Put this configuration into force; the worker sends an `Answer`."""

    number: int
    configuration: Configuration


@value
class PauseSchedulers:
    """Let the app's schedulers begin no more jobs, because another worker of the slot is about to import the app.

    The worker sends an `Answer` when that is done.
    """

    number: int


@value
class ResumeSchedulers:
    """Let the app's schedulers go on, because that other worker is gone."""


@value
class LogLevel:
    """Log at this level from now on."""

    level: str


@value
class Ask:
    """Send an `Answer` with `what`: requests, threads, files, plan or stop; `stacks`: with those of the threads."""

    number: int
    what: str
    stacks: bool = False


# --- from a template ------------------------------------------------------------------------------------------------


@value
class Preloaded:
    """The app is imported. For the log, `told` says which app, and why; `doubt` says what else may have been meant.

    `keeps` lists what the app did on import that a fork cannot take along; if there is any, no worker is forked.
    """

    told: str
    doubt: str
    keeps: tuple[str, ...] = ()


@value
class Forked:
    """A worker was forked, and is the supervisor's child; if `pid` is 0, `why` says why it was not."""

    pid: int
    why: str = ""


# --- from a worker ---------------------------------------------------------------------------------------------------


@value
class Loaded:
    """The worker has loaded the app, and waits for `Serve`."""

    target: str


@value
class IsReady:
    """The worker can serve, and has answered its probe."""


@value
class NotReady:
    """The worker does not become ready, and ends."""

    error: FlaskdError


@value
class Closed:
    """The worker has emptied the backlog of the listeners that are not `kept`, and closed its copies of them."""


@value
class DrainOver:
    """The drain of the worker is over."""

    report: DrainReport


@value
class StepBegins:
    """A step of the worker's cleanup began or ended; `running` names those that run now, for at most `left` seconds."""

    left: float
    running: tuple[str, ...] = ()


@value
class StepOver:
    """A step of the worker's cleanup is over."""

    result: StepResult


@value
class ExitWaits:
    """What the end of the worker's process waits for, in words."""

    what: str


@value
class Wants:
    """The worker's app, or a signal, asks for `what`: ``stop`` (the service) or ``replace`` (this worker)."""

    what: str
    reason: StopReason


@value
class Leaves:
    """The worker stops without being told to; for example, its serving thread died, or its app raised SystemExit."""

    reason: StopReason


@value
class OpenEndpoint:
    """The worker's app wants a shutdown endpoint; here the supervisor sends the `Answer`."""

    number: int
    address: Address
    token: bytes = field(repr=False)
    allowed_hosts: tuple[str, ...] = ()


@value
class Answer:
    """The answer to the message with this number: a value or an error."""

    number: int
    value: Any = None
    error: FlaskdError | None = None


@value
class Ended:
    """The worker's stop is over; only the end of its process remains."""

    account: Account
