"""The app served by worker processes: the supervisor's implementation of `flaskd.serving.api.Serving`.

Methods run in the thread of the daemon's events, to which `Work` brings the messages of workers. None of them waits
for a worker.
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
from flaskd.pool.early import Early
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
"""Seconds after its deadline at which a worker that has not ended its drain is killed."""
_DRAIN_GUARD = 2.5
"""Seconds after its deadline at which a drain is given up, even if workers have not reported."""


class Pool(View):
    """Serves with workers; `flaskd.serving.api.Serving` describes its methods, and `Crew` its arguments.

    `idle_over` is called when no request that counts has come for `shutdown.idle.after`.
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
        early: Sequence[Early] = (),
    ) -> None:
        super().__init__(self._make_pipeline)
        self._post = post
        self._crew = Crew(
            self, self.sums, post, post_at, name=name, stop=stop, open_endpoint=open_endpoint, make=make, early=early
        )
        self._slots = self._crew.slots
        self.wanted, self.templates = lambda: self._slots.wanted, self._crew.templates.shown
        self._service_stop = ServiceStop(self._pipeline, self._crew, self.sums, post)
        self.stopped = lambda: self._service_stop.workers
        self._over: Callable[[DrainReport], object] = lambda _: None
        """The function to call at the end of the drain that was begun last."""
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
        """Start the thread of the stop now, because later no thread may be available; raises RuntimeError."""
        self._service_stop.make_threads()

    def load(self, config: Config, state: Path | None) -> Pool:
        """Prepare the service's part of the cleanup; the workers load the app."""
        self._crew.state = state
        self._policies = build_plan(config.cleanup, scope="service")
        self._policies.prepare()
        return self

    def tell(self) -> None:
        """Do nothing: the supervisor loads no app."""

    def make_server(self, config: Config, listeners: Sequence[Listener]) -> None:
        """Take the listeners, which outlive every worker."""
        self._crew.listeners = listeners
        for each in listeners:
            each.listen(config.server.backlog)

    def start(self, configuration: Configuration) -> None:
        """Start the first generation of workers; posts Ready or Failed."""
        self._crew.renewals.configuration = configuration
        self._crew.do(self._beginning.begin)

    def started(self, configuration: Configuration) -> None:
        """Begin to watch the workers, because the start has succeeded."""
        self._crew.starting = False
        self._crew.end_early()
        self._crew.watch.begin()
        self._crew.recycling.begin()
        self.sums.used()
        self.idleness.watch(configuration.values.shutdown.idle.after)

    # --- called by the crew ----

    def ready(self) -> None:
        """Note that a worker has become ready."""
        self._beginning.look()

    def not_filled(self, error: FlaskdError) -> None:
        """Note that an empty slot could not be filled."""
        self._beginning.not_filled(error)

    def closed(self, worker: Handle) -> None:
        """Note that a worker has closed its copies of the listeners."""
        if self._gathering is not None:
            self._gathering.closed(worker)

    def reported(self, worker: Handle, report: DrainReport) -> None:
        """Note that the drain of a worker is over."""
        if self._gathering is not None:
            self._gathering.reported(worker, report)

    def ended(self, worker: Handle) -> None:
        """Note that the stop of a worker is over."""
        self._service_stop.ended(worker)

    def gone(self, worker: Handle, cut: tuple[Cut, ...]) -> None:
        """Note that the process of a worker has ended."""
        if self._gathering is not None:
            self._gathering.gone(worker, cut)
        self._service_stop.gone(worker)
        self._beginning.look()

    def abandon(self) -> None:
        """Kill all workers that have not ended, without a drain."""
        self.end_processes()
        for each in self.sums.alive:
            each.hang_up()
        self._service_stop.dismiss()

    def end_processes(self) -> None:
        """Kill all workers (any thread)."""
        self._slots.ending = True
        self._crew.templates.end()
        self._crew.end_early()
        for each in self.sums.alive:
            each.kill("flaskd ends")

    # --- drain and resume ---

    def begin_drain(self, timeout: float, *, announce: float) -> Drain:
        """Begin a drain of all workers, after `announce` seconds."""
        return self._pipeline.begin_drain(timeout, announce=announce)

    def _begin_drain(
        self, timeout: float, over: Callable[[DrainReport], object], counted_from: tuple[int, int]
    ) -> None:
        """Begin the drain of all workers soon, in the thread of the events (any thread)."""
        self._over = over
        self._crew.do(lambda: self._gather(timeout, over, counted_from))

    def _gather(self, timeout: float, over: Callable[[DrainReport], object], counted_from: tuple[int, int]) -> None:
        """Tell all workers to drain; not in a stop, in which they are told to stop, which also drains them."""
        if over != self._over or (self._pipeline.drain is None and self._pipeline.stop is None):
            return  # resume came first, and another drain may have begun since
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
        if self._pipeline.stop is None:  # in a stop each worker has its own deadline
            self._crew.later(timeout + _DRAINED_AFTER, self._gathering.end_the_late)
        self._gathering.look()

    def _close_listeners(self) -> int:
        """Close the listeners that no other process shares; returns how many connections that resets."""
        left = 0
        for each in self._crew.listeners:
            if not each.shared:
                left += each.waiting()
                each.close()
        if left:
            log.warning(f"{left} connections in the backlog are reset")
        return left

    def give_up(self, why: str) -> None:
        """Do nothing: this process does not serve (`AllWorkers.dead`)."""

    def refuse(self) -> None:
        """Do nothing: the workers answer 503 by themselves."""

    @property
    def may_resume(self) -> bool:
        """Whether all workers have closed their copies of the listeners; if not, tell them to."""
        if self._gathering is None or self._gathering.is_closed:
            return True
        if not self._closing:
            self._closing = True
            for each in self._slots.workers:
                each.send(say.CloseListeners())
        return False

    def resume(self) -> Sequence[Listener]:
        """Bind the closed listeners anew, and have all workers serve again."""
        if self._gathering is not None:  # else no worker was told to drain yet, and the listeners are open
            backlog = self._crew.configuration.values.server.backlog
            self._crew.listeners = bound_anew(self._crew.listeners, backlog)
            self._gathering.is_over = True
        again = self._crew.listeners
        self._gathering, self._closing = None, False
        self.sums.used()
        self._pipeline.undo_drain()
        for worker in self._slots.workers:
            if not worker.serves:  # it was told to drain
                self._crew.resume(worker)
                self._crew.renewals.keep_up(worker)  # the drain may have broken off a reload
        self._slots.hold(on=False)
        return again

    # --- reload, scale, restart ---

    def prepare(self, configuration: Configuration) -> Plan:
        """Make the plan of the service's own steps, and import what it needs; check the plan of the workers, too."""
        build_plan(configuration.values.cleanup, scope="worker")
        plan = build_plan(configuration.values.cleanup, scope="service")
        plan.prepare()
        return plan

    def apply(self, configuration: Configuration, plan: Plan) -> None:
        """Put a configuration into force in the supervisor; the workers have it already."""
        self._crew.log_level = ""
        self._crew.renewals.take(configuration)
        self._policies = plan
        self.idleness.watch(configuration.values.shutdown.idle.after)

    def renew(self, configuration: Configuration, *, only_configuration: bool) -> None:
        """Bring a configuration to the workers; posts Renewed."""
        self._crew.renewals.renew(configuration, only_configuration=only_configuration)

    def break_off_renewal(self, why: str) -> None:
        """End the reload or restart under way, if there is one."""
        self._crew.renewals.break_off(why)

    def set_log_level(self, level: str) -> None:
        """Set the log level of all workers, also of future ones, until a configuration sets another one."""
        self._crew.log_level = level  # set first: a worker that is loading is told later
        for worker in self.sums.alive:
            if worker.phase is not Phase.LOADING:
                worker.send(say.LogLevel(level))

    def scale(self, count: int, told: Outcome) -> None:
        """Change the number of workers; `told` is called when the new ones are ready, or with an error."""
        self._crew.renewals.scale(count, told)

    def restart(self, number: int | None, told: Outcome) -> None:
        """Replace the worker of one slot, or all (None); `told` is called at the end."""
        self._crew.renewals.restart(number, told)

    # --- stop ---

    def begin_stop(self, reason: StopReason, configuration: Configuration, state: Path | None) -> str:
        """Begin the stop; returns the id of its plan."""
        plan = self._service_stop.begin(reason, configuration, self._policies, state)
        self._crew.end()
        self.break_off_renewal("a stop was asked for")
        return plan

    def announce_stop(self) -> None:
        """Have all workers show that they are not ready, because the service's first steps may take a while."""
        for worker in self._slots.workers:
            worker.send(say.Announce())

    def run_stop(self) -> None:
        """Carry out the stop, in the thread that `make_threads` has started."""
        self._service_stop.run()

    def hurry(self) -> None:
        """Cut the stop short."""
        self._service_stop.hurry()

    @property
    def left(self) -> float:
        """Seconds until the deadline of the stop."""
        return self._service_stop.stop.left

    def left_for_the_exit(self) -> Callable[[], float]:
        """A function that returns how many seconds the end of this process still has."""
        return self._service_stop.stop.left_for_the_exit()

    @property
    def step_left(self) -> float:
        """Seconds that the drain and the present steps may still take."""
        return self._service_stop.step_left

    def end(self, unfinished: tuple[Unfinished, ...]) -> Account:
        """The account of the stop; `unfinished` is what was cut at the end of this process."""
        return self._service_stop.account(unfinished)
