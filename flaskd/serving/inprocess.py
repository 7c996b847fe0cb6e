"""The app served in the daemon's own process: loaded in the main thread, run by the threads of one server."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flaskd.background_work import background_work
from flaskd.cleanup import Frame, Plan, build_plan, overview
from flaskd.config import Config, Configuration
from flaskd.ledger import InFlight
from flaskd.lifecycle import StopReason
from flaskd.process.exit import Unfinished
from flaskd.server import Drain, WaitressThread
from flaskd.serving import launch, loading
from flaskd.serving.api import (
    Account,
    CleanupOver,
    Died,
    Drained,
    Failed,
    Ready,
    ServingEvent,
    ServingSnapshot,
    StepBegan,
    StepEnded,
)
from flaskd.serving.forecast import Forecast
from flaskd.serving.loading import LoadedApp
from flaskd.serving.pipeline import Pipeline
from flaskd.serving.stop import CleanupThread, Stop
from flaskd.sockets import Listener

log = logging.getLogger("flaskd.daemon")

_LAST_END = 0.2
"""Seconds that the threads of the server have to end when the stop is over."""


class InProcess:
    """Serves the app here; see `flaskd.serving.api.Serving` for what its methods do.

    `post` takes what happens. `given` is the app in hand, or makes it when its time has come; without it the app that
    the configuration names is imported. `readiness` is what `health.path` is answered with, `answered` is given what
    the access log tells of each request, `idle_over` is called when nothing was asked for as long as
    `shutdown.idle.after` says. With `leaves` the process ends with the stop.
    """

    def __init__(
        self,
        post: Callable[[ServingEvent], None],
        *,
        app: Callable[..., Any] | None,
        make_app: Callable[[], Callable[..., Any]] | None,
        environ: Mapping[str, str],
        readiness: Callable[[], tuple[str, str]],
        answered: Callable[[dict[str, Any]], None],
        idle_over: Callable[[], None],
        leaves: bool,
    ) -> None:
        self._post = post
        self._given, self._make_app = app, make_app
        self._environ = environ
        self._readiness, self._answered, self._idle_over = readiness, answered, idle_over
        self._forecast = Forecast(leaves=leaves)
        self._cleanup_thread = CleanupThread()
        self._app: LoadedApp | None = None
        self._use_up: Callable[[], None] = lambda: None
        self._server: WaitressThread | None = None
        self._pipeline: Pipeline | None = None

    # --- start ---

    def make_threads(self) -> None:
        """Start the thread of the stop while one can be had; raises RuntimeError."""
        self._cleanup_thread.start()

    def load(self, config: Config, state: Path | None) -> LoadedApp:
        """Import the app, prepare the cleanup, and bring back what the last stop kept in `state` (main thread)."""
        given = loading.make_app(self._make_app) if self._make_app is not None else self._given
        app = self._app = launch.find_app(config.app, given, self._environ)
        plan = build_plan(config.cleanup)
        plan.prepare()
        self._forecast.set(plan, config.cleanup, app)
        self._use_up = launch.restore(plan, app, state)
        return app

    def make_server(self, config: Config, listeners: Sequence[Listener]) -> None:
        """Make the server, which is not started yet; from here on there is something to drain."""
        assert self._app is not None
        server = self._server = launch.make_server(
            config.server, self._app, list(listeners), on_death=lambda error: self._post(Died(error))
        )
        self._pipeline = Pipeline(server, drained=lambda drain: self._post(Drained(drain)), waits_again=True)

    def start(self, configuration: Configuration) -> None:
        """Serve, and ask for `health.probe`; posts Ready or Failed."""
        server, health = self._running, configuration.values.health

        def probe() -> None:
            error = launch.probe(server, health)
            self._post(Ready() if error is None else Failed(error))

        server.start(first=lambda: self._set_server(configuration.values))
        # In a thread of its own, so that a signal need not wait for the app.
        threading.Thread(target=probe, name="flaskd-probe", daemon=True).start()

    def started(self, configuration: Configuration) -> None:
        """The start has succeeded: what was brought back is used up, and what the app holds is looked for."""
        self._use_up()
        self._watch_idle(configuration.values)
        self._forecast.look_around()

    def abandon(self) -> None:
        """End without a drain what has not ended."""
        if self._server is not None:
            self._server.abandon()
        self._cleanup_thread.dismiss()

    @property
    def _running(self) -> WaitressThread:
        assert self._server is not None
        return self._server

    @property
    def _pipe(self) -> Pipeline:
        assert self._pipeline is not None
        return self._pipeline

    # --- drain, resume, reload ---

    @property
    def target(self) -> str | None:
        """What the app is called."""
        return self._app.target if self._app is not None else None

    @property
    def drain(self) -> Drain | None:
        """The drain under way, or the last one."""
        return self._pipeline.drain if self._pipeline is not None else None

    def begin_drain(self, timeout: float, *, announce: float) -> Drain:
        """Begin a drain."""
        return self._pipe.begin_drain(timeout, announce=announce)

    def give_up(self, why: str) -> None:
        """What serves is dead: all that is in flight counts as cut."""
        self._pipe.give_up(why)

    def refuse(self) -> None:
        """Answer 503 on listeners that others share."""
        self._running.refuse(on=True)

    def resume(self) -> Sequence[Listener]:
        """Serve again."""
        self._running.resume()
        self._pipe.undo_drain()
        return self._running.listeners

    def prepare(self, configuration: Configuration) -> Plan:
        """Make the plan, and import what it needs."""
        plan = build_plan(configuration.values.cleanup)
        plan.prepare()
        return plan

    @property
    def policies(self) -> Plan:
        """The plan of the configuration in force."""
        return self._forecast.policies

    def apply(self, configuration: Configuration, plan: Plan) -> None:
        """Put it into force."""
        assert self._app is not None
        self._set_server(configuration.values)  # first: there may be no threads for it
        self._forecast.set(plan, configuration.values.cleanup, self._app)
        self._forecast.look_around()
        self._watch_idle(configuration.values)

    def _set_server(self, config: Config) -> None:
        server, drain = self._running, config.shutdown.drain
        server.set_threads(config.server.threads)
        server.set_graces(drain.keepalive_grace, drain.stream_grace)
        server.answer_health(config.health.path or "", self._readiness)
        server.tell_answers(self._answered if config.log.access != "off" else None)

    def _watch_idle(self, config: Config) -> None:
        idle = config.shutdown.idle
        self._running.watch_idle(idle.after, idle.ignore, self._idle_over)

    # --- stop ---

    @property
    def _stop(self) -> Stop | None:
        return self._pipeline.stop if self._pipeline is not None else None

    @property
    def _stopping(self) -> Stop:
        stop = self._pipe.stop
        assert stop is not None
        return stop

    def begin_stop(self, reason: StopReason, configuration: Configuration, state: Path | None) -> str:
        """Make the stop."""
        config = configuration.values
        stop = self._pipe.begin_stop(
            reason,
            plan=self._forecast.plan,
            discovery=self._forecast.discovery,
            app=self._app.flask if self._app is not None else None,
            shutdown=config.shutdown,
            cleanup=config.cleanup,
            announce=config.shutdown.announce,
            state=state,
            spare=self._cleanup_thread.spare,
            on_step=lambda result: self._post(StepEnded(result)),
            on_begin=lambda: self._post(StepBegan()),
        )
        stop.arm()  # before another line of Python: the app may take the GIL and never give it back
        return stop.plan.id

    def announce_stop(self) -> None:
        """Tell clients, and leave a shared backlog to its next owner."""
        self._running.refuse(on=False)
        self._running.announce()

    def run_stop(self) -> None:
        """Carry it out in the thread that was made in time."""
        stop = self._stopping

        def run() -> None:
            try:
                stop.run()
            finally:
                self._post(CleanupOver())

        self._cleanup_thread.run(run)

    def hurry(self) -> None:
        """Cut it short."""
        self._pipe.hurry()

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self._stopping.left

    def left_for_the_exit(self) -> Callable[[], float]:
        """What gives, from now on, the seconds for what the app has left to the end of its process."""
        return self._stopping.left_for_the_exit()

    @property
    def step_left(self) -> float:
        """Seconds that the drain and the steps that run now may still take."""
        drain = self.drain
        return max(drain.left if drain is not None else 0.0, self._stopping.step_left)

    def end(self, unfinished: tuple[Unfinished, ...]) -> Account:
        """End the threads, and give the account."""
        stop = self._stopping
        report = stop.report.with_unfinished(stop.cut_work() + unfinished)
        self._running.end(timeout=min(_LAST_END, stop.left))
        late = report.with_unfinished((Unfinished("finalizers"),))
        return Account(report, stop.record(report), stop.record(late), stop.took, stop.policies)

    # --- any thread ---

    @property
    def in_flight(self) -> int:
        """How many requests are in flight."""
        return self._server.in_flight if self._server is not None else 0

    @property
    def silent_for(self) -> float:
        """Seconds since the loop last turned."""
        return self._server.silent_for if self._server is not None else 0.0

    def snapshot(self) -> ServingSnapshot:
        """What there is to know."""
        server, stop = self._server, self._stop
        if server is None:
            return ServingSnapshot(background=background_work())
        in_flight = tuple(server.requests())
        return ServingSnapshot(
            in_flight=in_flight,
            background=background_work(),
            queued=server.queued,
            connections=server.connections,
            busy=len({each.thread for each in in_flight if each.thread}),
            tally=server.tally(),
            idle=server.idle,
            cleanup=stop.running if stop is not None else (),
            steps=stop.policies if stop is not None else {},
        )

    def requests(self, *, stacks: bool = False) -> list[InFlight]:
        """What is in flight."""
        return self._server.requests(stacks=stacks) if self._server is not None else []

    def left_behind(self) -> dict[threading.Thread, InFlight]:
        """The threads that go on with a request that is over."""
        return self._server.left_behind() if self._server is not None else {}

    def plan(self, configuration: Configuration) -> dict[str, Any]:
        """The plan as it stands now, with what the app holds."""
        config = configuration.values
        if self._server is not None:
            return self._forecast.overview(config, fresh=self._stop is None)
        answer = {"discovery": config.cleanup.discovery.mode, **overview(build_plan(config.cleanup), Frame.of(config))}
        answer["text"] += "\nflaskd is starting: a stop would end it at once now, and run none of these"
        return answer

    def describe_stop(self) -> dict[str, Any]:
        """What a shutdown endpoint's answer tells."""
        plan = self._stop.plan if self._stop is not None else self._forecast.plan
        return {"plan": plan.id, "steps": self._forecast.steps(plan), "in_flight": self.in_flight}

    def turns(self, timeout: float) -> bool:
        """Whether the loop turns."""
        return self._running.turns(timeout)

    def answers(self, timeout: float) -> bool:
        """Whether it answers."""
        return self._running.answers(timeout)

    def all_are_at(self) -> Hashable | None:
        """What all threads are at."""
        return self._running.all_are_at()

    def moved(self) -> Hashable:
        """How far the requests are."""
        return self._server.moved() if self._server is not None else None

    def close_gates(self) -> None:
        """Deal with listeners that are not shared any more."""
        self._running.close_gates()
