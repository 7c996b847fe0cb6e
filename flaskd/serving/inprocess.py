"""The app served in the daemon's own process: the main thread loads it, the threads of one server run it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flaskd.cleanup import Plan
from flaskd.config import Config, Configuration
from flaskd.lifecycle import StopReason
from flaskd.process.exit import Unfinished
from flaskd.server import Board, Drain, limits
from flaskd.serving import launch, loading
from flaskd.serving.api import Account, CleanupOver, Died, Drained, Failed, Ready, ServingEvent, StepBegan, StepEnded
from flaskd.serving.forecast import Forecast
from flaskd.serving.loading import LoadedApp
from flaskd.serving.pipeline import Pipeline
from flaskd.serving.shown import Shown
from flaskd.serving.stop import CleanupThread, Stop
from flaskd.sockets import Listener
from flaskd.values import value

log = logging.getLogger("flaskd.daemon")

_LAST_END = 0.2
"""Seconds that the threads of the server have to end after the stop."""


@value
class AsWorker:
    """What is different if this process is a worker: its supervisor owns the listeners.

    The supervisor reads `board`; `listeners` returns the listeners to serve on after a drain; `closed` is called when
    this worker has closed its copies of the listeners that are not shared outside of the service. With `first`, what
    the last stop kept is restored.
    """

    board: Board
    listeners: Callable[[], Sequence[Listener]]
    closed: Callable[[], None]
    first: bool


class InProcess(Shown):
    """Serves the app in this process; `flaskd.serving.api.Serving` describes its methods.

    `post` takes the events. The app is `app`, or what `make_app` returns when it is called at the start, or else the
    one that the configuration names. `readiness` gives the answer on `health.path`, `answered` is called with the
    access log's fields of each request, `idle_over` when no request that counts has come for `shutdown.idle.after`.
    With `leaves` the process ends after the stop.
    """

    def __init__(
        self,
        post: Callable[[ServingEvent], None],
        *,
        app: Callable[..., Any] | LoadedApp | None,
        make_app: Callable[[], Callable[..., Any]] | None,
        environ: Mapping[str, str],
        readiness: Callable[[], tuple[str, str]],
        answered: Callable[[dict[str, Any]], None],
        idle_over: Callable[[], None],
        leaves: bool,
        worker: AsWorker | None = None,
    ) -> None:
        super().__init__(Forecast(leaves=leaves), scope="worker" if worker is not None else None)
        self._post = post
        self._worker = worker
        self._given, self._make_app = app, make_app
        self._environ = environ
        self._readiness, self._answered, self._idle_over = readiness, answered, idle_over
        self._cleanup_thread = CleanupThread()
        self._app: LoadedApp | None = None
        self._use_up: Callable[[], None] = lambda: None

    # --- start ---

    def make_threads(self) -> None:
        """Start the thread of the stop now, because later no thread may be available; raises RuntimeError."""
        self._cleanup_thread.start()

    def load(self, config: Config, state: Path | None) -> LoadedApp:
        """Import the app, prepare the cleanup, and restore what the last stop kept in `state` (main thread)."""
        given = loading.make_app(self._make_app) if self._make_app is not None else self._given
        app = self._app = launch.find_app(config.app, given, self._environ)
        plan = self._plan(config)
        plan.prepare()
        self._forecast.set(plan, config.cleanup, app)
        if self._worker is None or self._worker.first:
            self._use_up = launch.restore(plan, app, state)
        return app

    def make_server(self, config: Config, listeners: Sequence[Listener]) -> None:
        """Make the server, without starting it; from now on it can be drained."""
        assert self._app is not None
        server = self._server = launch.make_server(
            config.server,
            self._app,
            list(listeners),
            on_death=lambda error: self._post(Died(error)),
            board=self._worker.board if self._worker is not None else None,
        )
        if self._worker is not None:
            server.on_closed = self._worker.closed
        self._pipeline = Pipeline(server, drained=lambda drain: self._post(Drained(drain)), waits_again=True)

    def start(self, configuration: Configuration) -> None:
        """Serve, and ask for `health.probe`; posts Ready or Failed."""
        server, health = self._running, configuration.values.health

        def probe() -> None:
            error = launch.probe(server, health)
            self._post(Ready() if error is None else Failed(error))

        server.start(first=lambda: self._set_server(configuration.values), accepting=self._worker is None)
        # In a thread of its own, so that the daemon can handle a stop while the app answers the probe.
        threading.Thread(target=probe, name="flaskd-probe", daemon=True).start()

    def started(self, configuration: Configuration) -> None:
        """After a successful start, mark what was restored as used, watch for idleness, search the app's objects."""
        self._use_up()
        if self._worker is not None:
            self._running.accept()
        self._watch_idle(configuration.values)
        self._forecast.look_around()

    def abandon(self) -> None:
        """End the server without a drain, if it has not ended."""
        if self._server is not None:
            self._server.abandon()
        self._cleanup_thread.dismiss()

    exit_waits_for = ""

    def end_processes(self) -> None:
        """Do nothing: there are no other processes."""

    # --- drain, resume, reload ---

    @property
    def target(self) -> str | None:
        """The app's name; None before it is loaded."""
        return self._app.target if self._app is not None else None

    @property
    def drain(self) -> Drain | None:
        """The drain under way, or the last one that was not undone."""
        return self._pipeline.drain if self._pipeline is not None else None

    def begin_drain(self, timeout: float, *, announce: float) -> Drain:
        """Begin a drain, which is announced for `announce` seconds first."""
        return self._pipe.begin_drain(timeout, announce=announce)

    def give_up(self, why: str) -> None:
        """End a drain, because the serving thread is dead: all requests in flight count as cut."""
        self._pipe.give_up(why)

    def refuse(self) -> None:
        """Answer 503 on listeners that other processes share."""
        self._running.refuse(on=True)

    def resume(self) -> Sequence[Listener]:
        """Serve again; returns the listeners."""
        self._running.resume(self._worker.listeners() if self._worker is not None else None)
        self._pipe.undo_drain()
        return self._running.listeners

    def prepare(self, configuration: Configuration) -> Plan:
        """Make the cleanup plan, and import what it needs."""
        plan = self._plan(configuration.values)
        plan.prepare()
        return plan

    def close_listeners(self) -> None:
        """End the announce of the drain under way; then the listeners are closed."""
        self._running.close_listeners()

    def pause_schedulers(self, *, on: bool) -> None:
        """Pause the app's schedulers, because another worker runs them from now on, or let them go on; may wait."""
        if on:
            self._forecast.pause_schedulers()
        else:
            self._forecast.resume_schedulers()

    @property
    def policies(self) -> Plan:
        """The plan of the configuration in force."""
        return self._forecast.policies

    def apply(self, configuration: Configuration, plan: Plan) -> None:
        """Put a configuration and its plan into force."""
        assert self._app is not None
        self._set_server(configuration.values)  # first, because it may fail for lack of threads
        self._forecast.set(plan, configuration.values.cleanup, self._app)
        self._forecast.look_around()
        self._watch_idle(configuration.values)

    def _set_server(self, config: Config) -> None:
        server, drain = self._running, config.shutdown.drain
        server.set_threads(config.server.threads)
        server.limit(limits(config.server))
        server.set_graces(drain.keepalive_grace, drain.stream_grace)
        server.answer_health(config.health.path or "", self._readiness)
        server.tell_answers(self._answered if config.log.access != "off" else None)
        server.give_ids(on=config.log.request_id)
        server.name_itself(config.served_by)

    def _watch_idle(self, config: Config) -> None:
        idle = config.shutdown.idle
        self._running.watch_idle(idle.after, idle.ignore, self._idle_over if self._worker is None else None)

    # --- stop ---

    @property
    def _stopping(self) -> Stop:
        stop = self._pipe.stop
        assert stop is not None
        return stop

    def begin_stop(self, reason: StopReason, configuration: Configuration, state: Path | None) -> str:
        """Begin the stop; returns the id of its plan."""
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
        stop.arm()  # at once: the app may take the GIL and never release it
        return stop.plan.id

    def announce_stop(self) -> None:
        """Close each connection after its next response, and leave a shared backlog to its next owner."""
        self._running.refuse(on=False)
        self._running.announce()

    def run_stop(self) -> None:
        """Carry out the stop, in the thread that `make_threads` has started."""
        stop = self._stopping

        def run() -> None:
            try:
                stop.run()
            finally:
                self._post(CleanupOver())

        self._cleanup_thread.run(run)

    def hurry(self) -> None:
        """Cut the stop short."""
        self._pipe.hurry()

    @property
    def left(self) -> float:
        """Seconds until the deadline of the stop."""
        return self._stopping.left

    def left_for_the_exit(self) -> Callable[[], float]:
        """A function that returns how many seconds are left for what the app has left to the process' end."""
        return self._stopping.left_for_the_exit()

    @property
    def step_left(self) -> float:
        """Seconds that the drain and the present steps may still take."""
        drain = self.drain
        return max(drain.left if drain is not None else 0.0, self._stopping.step_left)

    def end(self, unfinished: tuple[Unfinished, ...]) -> Account:
        """End the threads; returns the account of the stop."""
        stop = self._stopping
        self._running.end(timeout=min(_LAST_END, stop.left))
        report = stop.account(stop.cut_work() + unfinished)
        late = report.with_unfinished((Unfinished("finalizers"),))
        return Account(report, stop.record(report), stop.record(late), stop.policies)

    def close_gates(self) -> None:
        """During or after a drain, close the gates of listeners that other processes have stopped sharing."""
        self._running.close_gates()
