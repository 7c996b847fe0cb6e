"""The interface of what serves the app, in this process or in workers, and the events that it posts to the daemon."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, Protocol

from flaskd.background_work import Background
from flaskd.cleanup import Plan, StepResult
from flaskd.config import Configuration
from flaskd.errors import FlaskdError
from flaskd.ledger import DrainReport, InFlight
from flaskd.lifecycle import StopReason
from flaskd.process.exit import Unfinished
from flaskd.server import Drain, Tally
from flaskd.sockets import Listener
from flaskd.values import value

Outcome = Callable[[FlaskdError | None], None]
"""A function to be called with the outcome of something that was asked for: None if it was done, else the error."""


@value
class Ready:
    """The app is loaded, the event loop turns, and the probe was answered, if there is one."""


@value
class Failed:
    """The start failed."""

    error: FlaskdError


@value
class Drained:
    """A drain is over."""

    drain: Drain


@value
class StepBegan:
    """A step of the cleanup began, or the drain of the stop."""


@value
class StepEnded:
    """A step of the cleanup is over."""

    result: StepResult


@value
class CleanupOver:
    """The last step of the stop is over."""


@value
class Died:
    """The serving thread died: requests in hand are lost."""

    error: BaseException | None


@value
class Renewed:
    """The workers have a new configuration and, if that was asked for, new code; or they keep the old ones (`error`).

    With an error, `replaced` is the number of workers that are new all the same, and have the new configuration.
    """

    configuration: Configuration
    error: FlaskdError | None
    replaced: int = 0


@value
class WorkersStart:
    """`count` workers are being started, the first of them for `age` seconds; posted every few seconds.

    Each of them is ready within `left` seconds, or is given up.
    """

    count: int
    age: float
    left: float


@value
class TroubleChanged:
    """`ServingSnapshot.trouble` has changed."""


@value
class Work:
    """A function that is to run in the thread of the events."""

    run: Callable[[], None]


ServingEvent = (
    Ready
    | Failed
    | Drained
    | StepBegan
    | StepEnded
    | CleanupOver
    | Died
    | Renewed
    | WorkersStart
    | TroubleChanged
    | Work
)


@value
class ServingSnapshot:
    """The figures of what serves, at one moment."""

    in_flight: tuple[InFlight, ...] = ()
    background: tuple[Background, ...] = ()
    queued: int = 0
    connections: int = 0
    busy: int = 0
    tally: Tally = field(default_factory=Tally)
    idle: tuple[float, float] | None = None
    """Seconds without a request that counts, and seconds until the idle stop; None if idleness is not watched."""
    cleanup: tuple[str, ...] = ()
    """The cleanup steps that run now."""
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The result of each cleanup step so far, by name."""
    workers: tuple[dict[str, Any], ...] = ()
    """A description of each worker, with stable keys for programs."""
    wanted: int = 0
    """How many workers there should be; 0 if the app runs in the daemon itself."""
    deaths: int = 0
    """How many workers died without being told to end."""
    cut_by_deaths: int = 0
    """How many requests that were completely read died with them."""
    recycled: dict[str, int] = field(default_factory=dict)
    """How many workers were replaced because they had reached a limit, by the limit's key in `pool`."""
    trouble: str = ""
    """A problem that does not keep it from serving, in words; empty if there is none."""

    @property
    def requests(self) -> list[InFlight]:
        """The requests in flight, the oldest first."""
        return sorted(self.in_flight, key=lambda each: -each.age)

    @property
    def oldest(self) -> InFlight | None:
        """The request that has been in flight for the longest time."""
        return max(self.in_flight, key=lambda each: each.age, default=None)


@value
class Account:
    """The account of a stop: the drain's report with all that was cut and the stop's length, and the record."""

    report: DrainReport
    record: dict[str, Any]
    late_record: dict[str, Any]
    """The record to write if finalizers are cut, too."""
    steps: dict[str, dict[str, Any]]
    """The result of each cleanup step, by name."""


class Serving(Protocol):
    """What serves the app. It posts each `ServingEvent` to its owner, the daemon.

    The methods are called in the thread of the daemon's events; those that say "any thread", in any thread.
    """

    @property
    def target(self) -> str | None:
        """The app's name; None before it is loaded (any thread)."""

    @property
    def in_flight(self) -> int:
        """How many requests are in flight (any thread)."""

    @property
    def drain(self) -> Drain | None:
        """The drain under way, or the last one that was not undone (any thread)."""

    def begin_drain(self, timeout: float, *, announce: float) -> Drain:
        """Begin a drain: it is announced for `announce` seconds, and then takes at most `timeout` seconds."""

    def give_up(self, why: str) -> None:
        """End a drain, because the serving thread is dead: all requests in flight count as cut."""

    def refuse(self) -> None:
        """After a drain, answer 503 on listeners that other processes share."""

    @property
    def may_resume(self) -> bool:
        """Whether `resume` can be called now; if not, begin what it waits for."""

    def resume(self) -> Sequence[Listener]:
        """Serve again; returns the listeners, some of which may be new. Raises CannotCreateError."""

    def prepare(self, configuration: Configuration) -> Plan:
        """Make what a configuration needs, in a thread that may wait; returns its plan. Raises ConfigError."""

    def apply(self, configuration: Configuration, plan: Plan) -> None:
        """Put a prepared configuration into force; if that fails, raise and change nothing."""

    renews: bool
    """Whether a reload brings new code, by new workers; then `renew` is called before `apply`."""

    def renew(self, configuration: Configuration, *, only_configuration: bool) -> None:
        """Bring a prepared configuration to the workers; posts `Renewed`."""

    def break_off_renewal(self, why: str) -> None:
        """End the reload or restart under way, if there is one; its callers get `why` in an error."""

    def scale(self, count: int, told: Outcome) -> None:
        """Change the number of workers; `told` is called when the new ones are ready, or with an error."""

    def restart(self, number: int | None, told: Outcome) -> None:
        """Replace the worker of one slot, or of all (None); `told` is called at the end."""

    def threads(self, *, stacks: bool = False) -> list[dict[str, Any]]:
        """The threads of the process that serves, or of all workers; may wait (any thread)."""

    def workers(self) -> list[dict[str, Any]]:
        """Each worker, with the memory and processor time that it uses; may wait (any thread)."""

    def deaths(self) -> list[dict[str, Any]]:
        """The last workers that died without being told to end (any thread)."""

    def source_files(self) -> set[str]:
        """The app's own files that were imported; may wait (any thread)."""

    def set_log_level(self, level: str) -> None:
        """Set the log level of the workers (any thread)."""

    def started(self, configuration: Configuration) -> None:
        """Begin what is only done once the start has succeeded."""

    def begin_stop(self, reason: StopReason, configuration: Configuration, state: Path | None) -> str:
        """Begin the stop; returns the id of its plan. The deadline counts from now; `state` is the state directory."""

    def announce_stop(self) -> None:
        """From now on, close each connection after its next response, and leave a shared backlog to its next owner."""

    def run_stop(self) -> None:
        """Carry out the stop that has begun, in another thread; returns at once."""

    def hurry(self) -> None:
        """End the drain now, and give all remaining cleanup one second in total."""

    @property
    def policies(self) -> Plan:
        """The plan of the configuration in force."""

    @property
    def left(self) -> float:
        """Seconds until the deadline of the stop."""

    def left_for_the_exit(self) -> Callable[[], float]:
        """A function that returns how many seconds are left for what the app has left to the process' end."""

    @property
    def step_left(self) -> float:
        """Seconds that the drain and the present steps may still take at most."""

    @property
    def exit_waits_for(self) -> str:
        """What the ends of other processes wait for, in words; empty if none is ending."""

    def end(self, unfinished: tuple[Unfinished, ...]) -> Account:
        """End all threads after the stop; returns its account. `unfinished` was cut at the end of the process."""

    def end_processes(self) -> None:
        """Kill the other processes, because this one ends without waiting (any thread)."""

    @property
    def unready(self) -> str:
        """Why requests cannot be answered now, although it was ready; empty while they can (any thread)."""

    @property
    def silent_for(self) -> float:
        """Seconds since the serving thread last turned; a healthy one turns every second (any thread)."""

    def snapshot(self) -> ServingSnapshot:
        """All figures at this moment (any thread)."""

    def requests(self, *, stacks: bool = False) -> list[InFlight]:
        """The requests in flight, oldest first (any thread)."""

    def left_behind(self) -> dict[threading.Thread, InFlight]:
        """The threads that still run a request that is over, and that request (any thread)."""

    def plan(self, configuration: Configuration) -> dict[str, Any]:
        """The cleanup plan at this moment; may wait (any thread)."""

    def describe_stop(self) -> dict[str, Any]:
        """The answer of a shutdown endpoint: the stop to come or under way (any thread)."""

    def turns(self, timeout: float) -> bool:
        """Whether the serving thread turns within `timeout` seconds (any thread)."""

    def answers(self, timeout: float) -> bool:
        """Whether it answers a request within `timeout` seconds (any thread)."""

    def all_are_at(self) -> Hashable | None:
        """A value that stays the same while all threads are busy and none moves on; else None (any thread)."""

    def moved(self) -> Hashable:
        """A value that changes when a request begins or ends, or a byte is received or sent (any thread)."""

    def close_gates(self) -> None:
        """During or after a drain, close the gates of listeners that other processes have stopped sharing."""
