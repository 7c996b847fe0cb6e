"""The port behind which the app is served, in this process or elsewhere, and what the daemon hears from there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
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

Outcome = Callable[[FlaskdError | None], None]
"""Is told of something that was asked for: None where it was done."""


@dataclass(frozen=True)
class Ready:
    """The app is loaded, the loop turns, and the probe was answered, if there is one."""


@dataclass(frozen=True)
class Failed:
    """It does not become ready."""

    error: FlaskdError


@dataclass(frozen=True)
class Drained:
    """A drain is over."""

    drain: Drain


@dataclass(frozen=True)
class StepBegan:
    """A step of the cleanup began, or the drain of the stop."""


@dataclass(frozen=True)
class StepEnded:
    """A step of the cleanup is over."""

    result: StepResult


@dataclass(frozen=True)
class CleanupOver:
    """The last step of the stop is over."""


@dataclass(frozen=True)
class Died:
    """What serves died: what was in hand is lost."""

    error: BaseException | None


@dataclass(frozen=True)
class Renewed:
    """The workers have that configuration, and where it was asked for new code; or the old one, and why.

    `replaced` workers are new all the same where there is an error, and the configuration is theirs.
    """

    configuration: Configuration
    error: FlaskdError | None
    replaced: int = 0


@dataclass(frozen=True)
class WorkersStart:
    """So many workers are being started, the first of them for `age` seconds; told every few seconds meanwhile.

    Each of them is ready within `left` seconds, or given up.
    """

    count: int
    age: float
    left: float


@dataclass(frozen=True)
class TroubleChanged:
    """What `ServingSnapshot.trouble` says has changed."""


@dataclass(frozen=True)
class Work:
    """Something of what serves is to be done in the thread of the events."""

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


@dataclass(frozen=True)
class ServingSnapshot:
    """What there is to know of what serves, at one moment."""

    in_flight: tuple[InFlight, ...] = ()
    background: tuple[Background, ...] = ()
    queued: int = 0
    connections: int = 0
    busy: int = 0
    tally: Tally = field(default_factory=Tally)
    idle: tuple[float, float] | None = None
    """Seconds without a request that counts, and until the idle stop; None while that is not watched."""
    cleanup: tuple[str, ...] = ()
    """The cleanup steps that run now."""
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Each cleanup step's fate so far."""
    workers: tuple[dict[str, Any], ...] = ()
    """Each worker, with stable keys for programs."""
    wanted: int = 0
    """How many workers there are to be; 0 where the app runs in the daemon itself."""
    deaths: int = 0
    """How many workers died that were not told to."""
    cut_by_deaths: int = 0
    """How many requests, read whole, died with them."""
    recycled: dict[str, int] = field(default_factory=dict)
    """How many workers were replaced because they had reached a limit, by its key in `pool`."""
    trouble: str = ""
    """What is not as it should be while it serves, for people."""

    @property
    def requests(self) -> list[InFlight]:
        """What is in flight, oldest first."""
        return sorted(self.in_flight, key=lambda each: -each.age)

    @property
    def oldest(self) -> InFlight | None:
        """The request that has been in flight for the longest time."""
        return max(self.in_flight, key=lambda each: each.age, default=None)


@dataclass(frozen=True)
class Account:
    """What a stop comes to: the report of its drain, with all that was cut and what the stop took, and the record."""

    report: DrainReport
    record: dict[str, Any]
    late_record: dict[str, Any]
    """The record that is true where even finalizers are cut."""
    steps: dict[str, dict[str, Any]]
    """Each cleanup step's fate."""


class Serving(Protocol):
    """What serves the app. It posts a `ServingEvent` to its owner, in whose thread the methods are called.

    Those that say "any thread" may be called from any.
    """

    @property
    def target(self) -> str | None:
        """What the app is called; None before it is loaded (any thread)."""

    @property
    def in_flight(self) -> int:
        """How many requests are in flight (any thread)."""

    @property
    def drain(self) -> Drain | None:
        """The drain under way, or the last one that was not undone (any thread)."""

    def begin_drain(self, timeout: float, *, announce: float) -> Drain:
        """Begin a drain within `timeout` seconds, announced for `announce` seconds before."""

    def give_up(self, why: str) -> None:
        """What serves is dead: all that is in flight counts as cut, and a drain is over."""

    def refuse(self) -> None:
        """Answer 503 on listeners that others share: it is drained."""

    @property
    def may_resume(self) -> bool:
        """Whether `resume` can be called now; where it cannot, what it waits for is begun."""

    def resume(self) -> Sequence[Listener]:
        """Serve again, and give the listeners, some of which may be new. Raises CannotCreateError."""

    def prepare(self, configuration: Configuration) -> Plan:
        """Make what a configuration needs, in a thread that may take its time; raises ConfigError."""

    def apply(self, configuration: Configuration, plan: Plan) -> None:
        """Serve by a configuration that was prepared from now on; where that cannot be, raises and changes nothing."""

    renews: bool
    """Whether a reload brings new code, by new workers: `renew` then goes before `apply`."""

    def renew(self, configuration: Configuration, *, only_configuration: bool) -> None:
        """Bring a configuration that was prepared to the workers; posts `Renewed`."""

    def break_off_renewal(self, why: str) -> None:
        """End the reload or restart under way, if there is one; who waits for it is told why."""

    def scale(self, count: int, told: Outcome) -> None:
        """Have so many workers; `told` hears when the new ones are ready, or why one is not."""

    def restart(self, number: int | None, told: Outcome) -> None:
        """Replace the worker of one slot, or of all."""

    def threads(self, *, stacks: bool = False) -> list[dict[str, Any]]:
        """The threads of the process that serves, or of all workers; may take its time (any thread)."""

    def workers(self) -> list[dict[str, Any]]:
        """Each worker, with what it uses; may take its time (any thread)."""

    def deaths(self) -> list[dict[str, Any]]:
        """The last workers that died and were not told to (any thread)."""

    def source_files(self) -> set[str]:
        """The app's own files that it has imported; may take its time (any thread)."""

    def set_log_level(self, level: str) -> None:
        """Let the workers log from this level on (any thread)."""

    def started(self, configuration: Configuration) -> None:
        """The start has succeeded."""

    def begin_stop(self, reason: StopReason, configuration: Configuration, state: Path | None) -> str:
        """Begin the stop, and give the id of its plan; the deadline counts from now. `state` is the state directory."""

    def announce_stop(self) -> None:
        """From now on each response closes its connection, and a shared backlog is left to its next owner."""

    def run_stop(self) -> None:
        """Carry out the stop that was begun; returns at once."""

    def hurry(self) -> None:
        """End the drain now, and give all remaining cleanup a second in total."""

    @property
    def policies(self) -> Plan:
        """The plan of the configuration in force."""

    @property
    def left(self) -> float:
        """Seconds until the deadline of the stop."""

    def left_for_the_exit(self) -> Callable[[], float]:
        """What gives, from now on, the seconds for what the app has left to the end of its process."""

    @property
    def step_left(self) -> float:
        """Seconds that the drain, and the steps that run now, may still take at most."""

    @property
    def exit_waits_for(self) -> str:
        """What the ends of other processes wait for, for people; empty where none is at its end."""

    def end(self, unfinished: tuple[Unfinished, ...]) -> Account:
        """End all threads after the stop; `unfinished` is what was cut at the end of the process."""

    def end_processes(self) -> None:
        """End at once what runs in other processes: this one leaves without waiting (any thread)."""

    @property
    def unready(self) -> str:
        """Why no request can be answered now, though it was ready; empty while one can (any thread)."""

    @property
    def silent_for(self) -> float:
        """Seconds since the serving thread last turned; it turns once a second at least (any thread)."""

    def snapshot(self) -> ServingSnapshot:
        """What there is to know now (any thread)."""

    def requests(self, *, stacks: bool = False) -> list[InFlight]:
        """What is in flight, oldest first (any thread)."""

    def left_behind(self) -> dict[threading.Thread, InFlight]:
        """The threads that go on with a request that is over (any thread)."""

    def plan(self, configuration: Configuration) -> dict[str, Any]:
        """The cleanup plan as it stands now; may take its time (any thread)."""

    def describe_stop(self) -> dict[str, Any]:
        """What a shutdown endpoint tells of the stop to come, or under way (any thread)."""

    def turns(self, timeout: float) -> bool:
        """Whether the serving thread turns within `timeout` seconds (any thread)."""

    def answers(self, timeout: float) -> bool:
        """Whether it answers a request within `timeout` seconds (any thread)."""

    def all_are_at(self) -> Hashable | None:
        """What all threads are at; None while one is free (any thread)."""

    def moved(self) -> Hashable:
        """Something that is not the same when a request has begun, ended or moved a byte (any thread)."""

    def close_gates(self) -> None:
        """Deal with listeners that are not shared any more."""
