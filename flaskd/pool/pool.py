"""The app served by worker processes: the port `flaskd.serving.api.Serving` in the supervisor.

What is decided here happens in the thread of the daemon's events. What workers say is brought there by `Work`; nothing
waits for a worker.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from flaskd.cleanup import Plan, build_plan
from flaskd.config import Config, Configuration
from flaskd.errors import FlaskdError
from flaskd.ledger import Cut, DrainReport
from flaskd.lifecycle import StopReason
from flaskd.pool import messages as say
from flaskd.pool.beginning import Beginning
from flaskd.pool.crew import Crew
from flaskd.pool.gathering import AllWorkers, Gathering
from flaskd.pool.handle import Handle, Phase
from flaskd.pool.idleness import Idleness
from flaskd.pool.service_stop import ServiceStop
from flaskd.pool.sums import Sums
from flaskd.pool.view import View
from flaskd.process.exit import Unfinished
from flaskd.server import Drain
from flaskd.serving.api import Account, Drained, Outcome, ServingEvent
from flaskd.serving.pipeline import Pipeline
from flaskd.sockets import Address, Listener, bound_anew

log = logging.getLogger("flaskd.pool")

_DRAINED_AFTER = 1.5
"""Seconds past its time after which a worker is killed that has not ended its drain."""
_DRAIN_GUARD = 2.5
"""Seconds past its time after which a drain is over without a word of all workers."""


class Pool(View):
    """Serves with workers; see `flaskd.serving.api.Serving` for what its methods do, `Crew` for what it is given.

    `idle_over` is called when nothing was asked for as long as `shutdown.idle.after` says.
    """

    renews = True

    def __init__(
        self,
        post: Callable[[ServingEvent], None],
        post_at: Callable[[float, ServingEvent], None],
        *,
        name: str,
        stop: Callable[[StopReason], None],
        open_endpoint: Callable[[Address, bytes, Sequence[str]], Address],
        idle_over: Callable[[], None],
        make: Callable[[int, int], Handle] = Handle,
    ) -> None:
        super().__init__(self._make_pipeline)
        self._post = post
        self._crew = Crew(self, self.sums, post, post_at, name=name, stop=stop, open_endpoint=open_endpoint, make=make)
        self._slots = self._crew.slots
        self.wanted, self.templates = lambda: self._slots.wanted, self._crew.templates.shown
        self._service_stop = ServiceStop(self._pipeline, self._crew, self.sums, post)
        self.stopped = lambda: self._service_stop.workers
        self._over: Callable[[DrainReport], object] = lambda _: None
        """Is told of the drain that was begun last."""
        self._gathering: Gathering | None = None
        self._closing = False  # whether workers have been told to close the listeners, for a resume
        self._beginning = Beginning(self._crew, post)
        self.idleness = Idleness(
            self.sums, self._crew.later, over=idle_over, wanted=lambda: self._pipeline.drain is None
        )

    def _make_pipeline(self, sums: Sums) -> Pipeline:
        server = AllWorkers(sums, self._begin_drain)
        return Pipeline(server, drained=lambda drain: self._post(Drained(drain)), guard=_DRAIN_GUARD)

    # --- start ---

    def make_threads(self) -> None:
        """Start the thread of the stop while one can be had; raises RuntimeError."""
        self._service_stop.make_threads()

    def load(self, config: Config, state: Path | None) -> Pool:
        """Prepare the service's part of the cleanup; the workers load the app."""
        self._crew.state = state
        self._policies = build_plan(config.cleanup, scope="service")
        self._policies.prepare()
        return self

    def tell(self) -> None:
        """Nothing is loaded here."""

    def make_server(self, config: Config, listeners: Sequence[Listener]) -> None:
        """Take the listeners, which outlive every worker."""
        self._crew.listeners = listeners
        for each in listeners:
            each.listen(config.server.backlog)

    def start(self, configuration: Configuration) -> None:
        """Start the first generation; posts Ready or Failed."""
        self._crew.renewals.configuration = configuration
        self._crew.do(self._beginning.begin)

    def started(self, configuration: Configuration) -> None:
        """The start has succeeded."""
        self._crew.starting = False
        self._crew.watch.begin()
        self._crew.recycling.begin()
        self.sums.used()
        self.idleness.watch(configuration.values.shutdown.idle.after)

    # --- what the crew tells ---

    def ready(self) -> None:
        """A worker is ready."""
        self._beginning.look()

    def not_filled(self, error: FlaskdError) -> None:
        """An empty slot could not be filled."""
        self._beginning.not_filled(error)

    def closed(self, worker: Handle) -> None:
        """A worker has closed its copies of the listeners."""
        if self._gathering is not None:
            self._gathering.closed(worker)

    def reported(self, worker: Handle, report: DrainReport) -> None:
        """The drain of a worker is over."""
        if self._gathering is not None:
            self._gathering.reported(worker, report)

    def ended(self, worker: Handle) -> None:
        """The stop of a worker is over."""
        self._service_stop.ended(worker)

    def gone(self, worker: Handle, cut: tuple[Cut, ...]) -> None:
        """The process of a worker has ended."""
        if self._gathering is not None:
            self._gathering.gone(worker, cut)
        self._service_stop.gone(worker)
        self._beginning.look()

    def abandon(self) -> None:
        """End without a drain what has not ended."""
        self.end_processes()
        for each in self.sums.alive:
            each.hang_up()
        self._service_stop.dismiss()

    def end_processes(self) -> None:
        """Kill all workers (any thread)."""
        self._slots.ending = True
        self._crew.templates.end()
        for each in self.sums.alive:
            each.kill("flaskd ends")

    # --- drain and resume ---

    def begin_drain(self, timeout: float, *, announce: float) -> Drain:
        """Begin a drain."""
        return self._pipeline.begin_drain(timeout, announce=announce)

    def _begin_drain(
        self, timeout: float, over: Callable[[DrainReport], object], counted_from: tuple[int, int]
    ) -> None:
        """Begin the drain of all workers, soon (any thread)."""
        self._over = over
        self._crew.do(lambda: self._gather(timeout, over, counted_from))

    def _gather(self, timeout: float, over: Callable[[DrainReport], object], counted_from: tuple[int, int]) -> None:
        """Have all workers drain; in a stop they are told to stop instead, which drains them, too."""
        if over != self._over or (self._pipeline.drain is None and self._pipeline.stop is None):
            return  # resume was faster, and another drain may have begun since
        self.break_off_renewal("a drain was asked for")
        self._slots.break_off("flaskd drains")
        self._slots.hold(on=True)
        workers = self._slots.workers
        self._gathering = Gathering(
            [*workers, *self._slots.leaving],
            counted_from=counted_from,
            counted=lambda: self.sums.counted,
            closed=self._close_listeners,
            over=over,
        )
        for worker in workers if self._pipeline.stop is None else ():
            self._crew.drain(worker)
        if self._pipeline.stop is None:  # else each has the deadline of its stop
            self._crew.later(timeout + _DRAINED_AFTER, self._gathering.end_the_late)
        self._gathering.look()

    def _close_listeners(self) -> int:
        """Close the listeners that are ours alone; how many connections that resets."""
        left = 0
        for each in self._crew.listeners:
            if not each.shared:
                left += each.waiting()
                each.close()
        if left:
            log.warning(f"{left} connections in the backlog are reset")
        return left

    def give_up(self, why: str) -> None:
        """Nothing of this process serves; see `dead`."""

    def refuse(self) -> None:
        """The workers do so by themselves."""

    @property
    def may_resume(self) -> bool:
        """Whether all workers have closed their copies of the listeners, which are bound anew then."""
        if self._gathering is None or self._gathering.is_closed:
            return True
        if not self._closing:
            self._closing = True
            for each in self._slots.workers:
                each.send(say.CloseListeners())
        return False

    def resume(self) -> Sequence[Listener]:
        """Bind anew what was closed, and have all workers serve again."""
        if self._gathering is not None:  # else the drain was undone before it was told, and they are open
            backlog = self._crew.configuration.values.server.backlog
            self._crew.listeners = bound_anew(self._crew.listeners, backlog)
            self._gathering.is_over = True
        again = self._crew.listeners
        self._gathering, self._closing = None, False
        self.sums.used()
        self._pipeline.undo_drain()
        for worker in self._slots.workers:
            if not worker.serves:  # else it was not told, either
                self._crew.resume(worker)
                self._crew.renewals.keep_up(worker)  # the drain may have broken off what brought it a configuration
        self._slots.hold(on=False)
        return again

    # --- reload, scale, restart ---

    def prepare(self, configuration: Configuration) -> Plan:
        """Make the plan of the service's own steps, and import what it needs; the workers' is checked, too."""
        build_plan(configuration.values.cleanup, scope="worker")
        plan = build_plan(configuration.values.cleanup, scope="service")
        plan.prepare()
        return plan

    def apply(self, configuration: Configuration, plan: Plan) -> None:
        """Take it as the one in force here; workers have it already."""
        self._crew.log_level = ""
        self._crew.renewals.take(configuration)
        self._policies = plan
        self.idleness.watch(configuration.values.shutdown.idle.after)

    def renew(self, configuration: Configuration, *, only_configuration: bool) -> None:
        """Bring a configuration to the workers."""
        self._crew.renewals.renew(configuration, only_configuration=only_configuration)

    def break_off_renewal(self, why: str) -> None:
        """End the reload or restart under way."""
        self._crew.renewals.break_off(why)

    def set_log_level(self, level: str) -> None:
        """Let the workers log from this level on, also those to come, until a configuration says otherwise."""
        self._crew.log_level = level  # first: one that loads is told when it has
        for worker in self.sums.alive:
            if worker.phase is not Phase.LOADING:
                worker.send(say.LogLevel(level))

    def scale(self, count: int, told: Outcome) -> None:
        """Have so many workers."""
        self._crew.renewals.scale(count, told)

    def restart(self, number: int | None, told: Outcome) -> None:
        """Replace workers."""
        self._crew.renewals.restart(number, told)

    # --- stop ---

    def begin_stop(self, reason: StopReason, configuration: Configuration, state: Path | None) -> str:
        """Make the stop."""
        plan = self._service_stop.begin(reason, configuration, self._policies, state)
        self._crew.end()
        self.break_off_renewal("a stop was asked for")
        return plan

    def announce_stop(self) -> None:
        """Have workers be ready no more; the service's first steps may take a while."""
        for worker in self._slots.workers:
            worker.send(say.Announce())

    def run_stop(self) -> None:
        """Carry it out in the thread that was made in time."""
        self._service_stop.run()

    def hurry(self) -> None:
        """Cut it short."""
        self._service_stop.hurry()

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self._service_stop.stop.left

    def left_for_the_exit(self) -> Callable[[], float]:
        """What gives, from now on, the seconds for the end of this process, where no app is."""
        return self._service_stop.stop.left_for_the_exit()

    @property
    def step_left(self) -> float:
        """Seconds that the drain and the steps that run now may still take."""
        return self._service_stop.step_left

    def end(self, unfinished: tuple[Unfinished, ...]) -> Account:
        """Give the account."""
        return self._service_stop.account(unfinished)
