"""The daemon: puts the parts together, and turns its main loop.

One thread makes every transition. All others (signals, control, serving, cleanup) only post to its inbox; the main
thread waits for its end (`flaskd.process.main_thread`).
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import functools
import http.client
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

from flaskd.admin import AdminServer, EndpointServer, Measures, configured_token, opened_by
from flaskd.background_work import background_work, in_background, left_behind
from flaskd.cleanup import Frame, Plan, StepResult, build_plan, call_in_thread, overview
from flaskd.config import Config, Configuration, FileWatch, HealthConfig, load_again, write_duration
from flaskd.errors import EX_LOST, EX_OK, AppError, ConfigError, FlaskdError, NotNowError, described
from flaskd.ledger import DrainReport
from flaskd.lifecycle import Event, Lifecycle, State, StopReason
from flaskd.log import setup as logs
from flaskd.places.state import StateDirectory
from flaskd.present import account_lines
from flaskd.process.descriptors import open_files
from flaskd.process.exit import Ending, Unfinished, at_exit
from flaskd.process.forks import AppCode, end_child, forgotten_by_children
from flaskd.process.main_thread import MainThread
from flaskd.process.signals import Escalation, SignalWatch
from flaskd.protocol import Discard, Reply, summary
from flaskd.reload import LIMIT, Reading, Readings
from flaskd.server import Tally, WaitressThread
from flaskd.serving import launch, loading
from flaskd.serving.drain import Drain
from flaskd.serving.forecast import Forecast
from flaskd.serving.loading import LoadedApp
from flaskd.serving.patching import patching_refused
from flaskd.serving.stop import CleanupThread, Stop
from flaskd.slow_query import SlowQuery
from flaskd.sockets import Address, Listener
from flaskd.systemd.notify import Notifier
from flaskd.systemd.service import Service

log = logging.getLogger("flaskd.daemon")

_BREAK_OFF = 0.8
"""Seconds in which a start that is broken off ends, whatever the app's import holds."""
_LAST_WORDS = 0.2
"""Seconds for the log of a process that leaves in a hurry."""
_ENDPOINT_CLOSING = 0.3
"""Seconds that a client of the shutdown endpoint gets to read its answer, at the very end."""
_SWITCH = 0.001
"""Seconds after which a thread that computes lets another one run (sys.setswitchinterval; Python's own is 5 ms).

The serving, control and admin threads need the interpreter several times for one answer, and wait each time for every
worker that computes: with four of them a probe took up to 190 ms, and takes up to 40.
"""
_WEDGED = 5.0
"""Seconds without a turn after which the serving thread does not live any more; it turns once a second at least."""
_REFUSED = logs.bounded_by("drains, resumes and reloads that the state refused")
_TICK = 1.0
"""Seconds between two progress reports of a drain or stop."""


class Plane(Protocol):
    """What the daemon needs of a control plane."""

    @property
    def nodes(self) -> list[str]:
        """The paths of its nodes."""

    def open(self, config: Config, passed: Sequence[Listener]) -> None:
        """Make the nodes and start answering, also on what was `passed`."""

    def close(self) -> None:
        """Flush the answers and remove the nodes."""

    def remove_nodes(self) -> None:
        """Remove the nodes, and nothing else."""

    def forget(self) -> None:
        """Close all descriptors, and nothing else."""


class Daemon:
    """One serving daemon, from its start to its exit code; see `run`.

    `load` reads the configuration, at the start and at each reload. `app` is served as it is, or what `make_app` makes
    when the time for it has come; without them the app named by the configuration is imported. `ending` is there where
    the process ends with the stop: what the app has left to that has its time then.
    """

    def __init__(
        self,
        load: Callable[[], Configuration],
        *,
        plane: Callable[[Daemon], Plane],
        name: str,
        environ: Mapping[str, str],
        app: Callable[..., Any] | None = None,
        make_app: Callable[[], Callable[..., Any]] | None = None,
        ending: Ending | None = None,
    ) -> None:
        self._ending = ending
        self._unfinished: tuple[Unfinished, ...] = ()
        self._main_is_lost = False  # in what the app has left to the end of the process, and was cut
        self._load = load
        self._environ = environ
        self._given_app = app
        self._make_app = make_app
        self._plane = plane(self)
        self._admin = AdminServer(self)
        self._admin_listeners: list[Listener] = []
        self._counts = {"drains": 0, "ok": 0, "failed": 0}  # the latter two are reloads
        self._began = time.time()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lifecycle = Lifecycle()
        self._notifier = Notifier(environ)
        self._service = Service(self._notifier, environ, self._post)
        self._logs = logs.Logs()
        self._signals = SignalWatch(self._on_signal, wake=lambda: self._main.call(lambda: None))
        self._main = MainThread(self._serve, self._raised, self._look)
        self._state_directory = StateDirectory(name, environ)
        self._interruptible = False
        self._starting = threading.Lock()
        self._cleanup_thread = CleanupThread()
        self._escalation = Escalation()
        self._listeners: list[Listener] = []
        self._endpoints: list[EndpointServer] = []
        self._server: WaitressThread | None = None
        self._drain: Drain | None = None
        self._stop: Stop | None = None
        self._counted = (0, 0)  # completed and rejected, when the stop began
        self._stop_waiters: list[Reply] = []
        self._reload_waiters: list[Reply] = []
        self._readings: Readings[tuple[Configuration, Plan]] = Readings(self._read_whole, self._read_over)
        self._reload_again = self._reload_when_ready = False
        self._reload_since = 0.0
        self._unsaid, self._say_again = 0, 0.0  # of what the app raises in the main thread
        self._last_tick = 0.0
        self._failure: FlaskdError | None = None
        self._last_reload: dict[str, Any] | None = None
        self._watch: FileWatch | None = None
        self.name = name
        self.configuration: Configuration
        self.app: LoadedApp
        self._outlook = Forecast(leaves=ending is not None)
        self._use_up: Callable[[], None]
        self.last_stop: dict[str, Any] | None = None
        """The record of the stop before this run."""
        self.checking: SlowQuery[Configuration] = SlowQuery("check", self.check)
        self.planning: SlowQuery[dict[str, Any]] = SlowQuery("plan", self.plan)

    # --- any thread: what can be asked ------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """The present state."""
        return self._lifecycle.state

    def drain(self, reply: Reply, *, wait: bool = False) -> None:
        """Ask for a drain; with `wait` the reply comes when it is over."""
        if not self._refuse_early(Event.DRAIN, reply):
            self._post(lambda: self._on_drain(reply, wait), reply, self._fail)

    def resume(self, reply: Reply) -> None:
        """Ask to serve again."""
        if not self._refuse_early(Event.RESUME, reply):
            self._post(lambda: self._on_resume(reply), reply)

    def reload(self, reply: Reply) -> None:
        """Ask for a reload; the reply comes after it."""
        since = time.monotonic()
        if not self._refuse_early(Event.RELOAD, reply):
            self._post(lambda: self._on_reload(reply, since), reply, self._end_reload)

    def _refuse_early(self, event: Event, reply: Reply) -> bool:
        """Refuse what a start refuses: while the app is imported the main thread cannot."""
        if self._interruptible:
            try:
                self._lifecycle.check(event)
            except NotNowError as error:
                log.warning(str(error), extra=_REFUSED)  # that it was asked for has been logged, too
                reply.error(error.code, str(error))
                return True
        return False

    def stop(self, reason: StopReason, reply: Reply, *, wait: bool = False, now: bool = False) -> None:
        """Ask to stop; `now` cuts drain and cleanup short, `wait` delays the reply to the very end."""
        self._post(lambda: self._on_stop(reason, reply, wait=wait, now=now), reply)
        if self._interruptible:
            self._signals.poke()

    def status(self) -> dict[str, Any]:
        """What there is to know; keys are stable."""
        server, life = self._server, self._lifecycle
        in_flight = server.requests() if server else []
        oldest = max(in_flight, key=lambda each: each.age, default=None)
        idle = server.idle if server else None
        return {
            "state": str(life.state),
            "since": logs.timestamp(life.since),
            "for": round(life.age, 3),
            "uptime": round(life.uptime, 3),
            "reason": str(self._stop.reason) if self._stop else None,
            "pid": os.getpid(),
            "name": self.name,
            "app": self.app.target if hasattr(self, "app") else None,
            "listen": [str(listener.address) for listener in self._listeners],
            "url": self._listeners[0].address.url if self._listeners else None,
            "admin": [str(address) for address in self._admin.addresses],
            "in_flight": len(in_flight),
            "oldest": str(oldest) if oldest else None,
            "background": [each.as_json() for each in background_work()],
            "queued": server.queued if server else 0,
            "connections": server.connections if server else 0,
            "threads": self.configuration.values.server.threads,
            "busy": len({each.thread for each in in_flight if each.thread}),
            "completed": server.completed if server else 0,
            "rejected": server.counted[1] if server else 0,
            "tally": (server.tally() if server else Tally()).as_json(),
            "shutdown_endpoint": [endpoint.url for endpoint in self._endpoints],
            "idle_for": round(idle[0], 3) if idle else None,
            "idle_stop_at": logs.timestamp(time.time() + idle[1]) if idle and life.state is State.READY else None,
            "cleanup": list(self._stop.running) if self._stop else [],
            "previous": self._state_directory.previous,
            "last_reload": self._last_reload,
            "last_stop": summary(self.last_stop),
            "log_level": self._logs.level,
            "config": str(self.configuration.path) if self.configuration.path else None,
        }

    @property
    def wedged(self) -> str:
        """Why flaskd does not live any more, as ``health`` and ``/livez`` say it; empty while it does, or starts."""
        silent = self._server.silent_for if self._server is not None else 0.0
        return f"the serving thread has not turned for {silent:.1f}s" if silent > _WEDGED else ""

    def measures(self) -> Measures:
        """What is counted."""
        server, stop = self._server, self._stop
        in_flight = server.requests() if server else []
        return Measures(
            state=str(self.state),
            since=self._lifecycle.since,
            started=self._began,
            tally=server.tally() if server else Tally(),
            in_flight=len(in_flight),
            oldest=max((each.age for each in in_flight), default=0.0),
            queued=server.queued if server else 0,
            connections=server.connections if server else 0,
            threads=self.configuration.values.server.threads,
            drains=self._counts["drains"],
            reloads=self._counts,
            steps=stop.policies if stop else {},
            last_stop=self.last_stop,
        )

    @property
    def server(self) -> WaitressThread | None:
        """The app's server; None while starting."""
        return self._server

    @property
    def previous(self) -> str | None:
        """How the run before this one died; None when it came to its end."""
        return self._state_directory.previous

    @property
    def log_level(self) -> str:
        """The least severity that is logged, until the next reload; can be set."""
        return self._logs.level

    @log_level.setter
    def log_level(self, level: str) -> None:
        self._logs.set_level(level)

    def check(self) -> Configuration:
        """What a reload would read, without doing it; raises ConfigError. A file may hang: ask through `checking`."""
        new, _ = self._read()
        return new

    def plan(self) -> dict[str, Any]:
        """The cleanup plan as it stands now, with what the app holds; see `flaskd.cleanup.overview`.

        The app's objects may be slow to say what they are: ask through `planning`.
        """
        config = self.configuration.values
        if not self._interruptible:
            return self._outlook.overview(config, fresh=self._stop is None)
        answer = {"discovery": config.cleanup.discovery.mode, **overview(build_plan(config.cleanup), Frame.of(config))}
        answer["text"] += "\nflaskd is starting: a stop would end it at once now, and run none of these"
        return answer

    # --- the shutdown endpoint --------------------------------------------------------------------------------------

    def open_endpoint(self, address: Address, token: bytes, allowed_hosts: Sequence[str]) -> EndpointServer:
        """Open a shutdown endpoint of this daemon: the one of the configuration, or one that the app's code asks for.

        Raises ConfigError under ``profile: production``, CannotCreateError when the address cannot be had.
        """
        if self.configuration.values.profile == "production":
            raise ConfigError("cannot open a shutdown endpoint: flaskd runs with profile: production")
        endpoint = EndpointServer(
            address,
            token,
            allowed_hosts=allowed_hosts,
            plan=self._describe_stop,
            stop=lambda peer: self.stop(StopReason("endpoint", peer), Discard()),
        ).open()
        self._endpoints.append(endpoint)
        return endpoint

    def _describe_stop(self) -> dict[str, Any]:
        """What the endpoint's answer tells, before the stop and while it lasts."""
        plan = self._stop.plan if self._stop else self._outlook.plan
        return {"plan": plan.id, "steps": self._outlook.steps(plan), "in_flight": self._in_flight}

    def _close_endpoints(self, timeout: float) -> None:
        for endpoint in self._endpoints:
            endpoint.close(timeout)

    # --- start ------------------------------------------------------------------------------------------------------

    def run(self, *, last: bool = False) -> int:
        """Serve until stopped, and return the exit code; faults of the start are logged, and told by the code.

        `last`: the process ends then, and the app's own signal handlers are not put back.
        """
        if threading.current_thread() is not threading.main_thread():
            raise FlaskdError("cannot serve: flaskd needs the main thread for its signals; elsewhere use ServerThread")
        with ExitStack() as stack:
            if not last:
                stack.callback(self._main.put_handlers_back)
            stack.enter_context(self._logs)
            self._logs.apply(level="info", log_format="auto", access="off")
            stack.callback(_put_away, self._notifier.close)
            stack.enter_context(self._service.attended())
            stack.enter_context(forgotten_by_children(self._forget))
            stack.callback(faulthandler.cancel_dump_traceback_later)
            stack.callback(_put_away, self._end_watch)
            stack.callback(sys.setswitchinterval, sys.getswitchinterval())
            sys.setswitchinterval(_SWITCH)
            with AppCode():  # a child that the app forked in this thread undoes nothing of what the stack holds
                try:
                    if self._ending is not None:
                        self._ending.start()
                    self._start(stack)
                    self._main.begin()
                except BaseException as error:  # noqa: BLE001 - the app's code runs in this thread; told in either case
                    if not self._main.begun:
                        return self._not_started(error)
                    self._raised(error)
                return self._main.wait()
        raise AssertionError  # the stack suppresses nothing

    def _not_started(self, error: BaseException) -> int:
        """Tell why the start failed, and return the exit code."""
        ours = hasattr(self, "configuration")  # before that, Ctrl-C is the caller's
        with self._starting:
            self._interruptible = False
        self._lifecycle.handle(Event.START_FAILED)
        if not (ours or isinstance(error, Exception)):
            raise error
        return self._failed(launch.fault_of(error))

    def _serve(self) -> int:
        """Carry out events until the stop is over, and return the exit code; all else happens in this thread, too."""
        self._turn()
        if not self._main_is_lost:
            return self._finish()
        code = EX_LOST
        try:
            code = self._finish()
            self._leave_nothing()
        finally:
            os._exit(code)

    def _look(self) -> None:
        """Once a second, in the main thread."""
        self._signals.reclaim()  # code in C may take a handler at any time
        open_files.adjust()

    def _start(self, stack: ExitStack) -> None:
        self.configuration = self._load()
        config = self.configuration.values
        self._apply_log(config)
        self._interruptible = True
        stack.enter_context(self._signals)
        self._service.starting()
        with self._starting:  # a start that is broken off waits for this, and then nothing more is made
            passed = launch.take_passed(self._environ, config)
            stack.callback(_put_away, self._plane.close)  # first: what was made is taken away where more cannot be made
            self._plane.open(config, launch.for_control(config, passed))
            stack.callback(_put_away, self._close_listeners)
            launch.change_directory(config.app)
            launch.bind_all(config, self._listeners, self._admin_listeners, passed, self._service.store)
            stack.callback(_put_away, self._admin.close)
            self._admin.open(self._admin_listeners, config.admin.allowed_hosts)
            self._state_directory.open(record=config.shutdown.record)
            self.last_stop = self._state_directory.last_stop()  # once: it does not change, and a disk may hang
            stack.callback(_put_away, self._state_directory.close)
            stack.callback(_put_away, self._cleanup_thread.dismiss)
            self._cleanup_thread.start()
            stack.callback(_put_away, self._close_endpoints, _ENDPOINT_CLOSING)
            if (endpoint := config.shutdown.endpoint).listen is not None:
                token = configured_token(endpoint.token_file, endpoint.credential, self._environ)
                self.open_endpoint(Address.parse(endpoint.listen), token, endpoint.allowed_hosts)
        stack.enter_context(opened_by(self.open_endpoint))
        where = ", ".join(listener.address.announced for listener in self._listeners)
        nodes = ", ".join(self._plane.nodes) or "none"
        admin = (
            f"; admin: {', '.join(each.announced for each in self._admin.addresses)}" if self._admin_listeners else ""
        )
        log.info(f"flaskd (pid {os.getpid()}) will serve on {where}; control: {nodes}{admin}")
        if self._plane.nodes:
            os.environ["FLASKD_CONTROL"] = self._plane.nodes[0]  # what the app starts can talk to this daemon
        stack.enter_context(patching_refused())
        self.app = launch.find_app(config.app, self._given(), self._environ)
        plan = build_plan(config.cleanup)
        plan.prepare()
        self._outlook.set(plan, config.cleanup, self.app)
        self._use_up = launch.restore(plan, self.app, self._state_directory.writable)
        self._signals.reclaim()
        self._logs.reclaim()
        self.app.tell()
        self._server = launch.make_server(
            config.server,
            self.app,
            self._listeners,
            on_death=lambda error: self._post(lambda: self._on_death(error), broken=self._fail),
        )
        stack.enter_context(open_files.reserve())
        with self._starting:
            self._interruptible = False  # from here on a stop finds a server to drain
        stack.callback(_put_away, self._server.abandon)
        self._server.start(first=lambda: self._apply_server(config))
        launch.keep(config, self._listeners, self._service.store)
        self._service.probing(config.health.probe_timeout if config.health.probe else 0.0)
        probe = threading.Thread(
            target=self._probe, args=(self._server, config.health), name="flaskd-probe", daemon=True
        )
        probe.start()

    def _given(self) -> Callable[..., Any] | None:
        return loading.make_app(self._make_app) if self._make_app is not None else self._given_app

    def _probe(self, server: WaitressThread, health: HealthConfig) -> None:
        """Probe in a thread of its own, so that a signal need not wait for the app; then the start is over."""
        error = launch.probe(server, health)
        self._post(lambda: self._on_started(error), broken=self._fail)

    def _on_started(self, error: FlaskdError | None) -> None:
        if self.state is not State.STARTING:
            return  # a stop came first
        if error is not None:
            self._failure = error
            why = self.configuration.veil(str(error))
            self._on_stop(StopReason("failure", why), Discard(), wait=False, now=False)
            return
        assert self._server is not None
        self._use_up()
        self._lifecycle.handle(Event.STARTED)
        self._apply_watch()
        self._apply_idle(self.configuration.values)
        log.info(f"ready: {self.app.target} on {', '.join(each.address.announced for each in self._listeners)}")
        self._outlook.look_around()
        self._service.ready(self._ready_status(), self._server, lambda: self.state)
        if self._reload_when_ready:
            self._on_reload(Discard(), time.monotonic())

    def _ready_status(self) -> str:
        return f"ready: {self.app.target} on {', '.join(str(each.address) for each in self._listeners)}"

    def _failed(self, error: FlaskdError) -> int:
        for line in str(error).split("\n"):  # at nothing else: an app's words may have other line ends
            log.error(line)
        if isinstance(error, AppError) and error.traceback_text:
            log.error(error.traceback_text)
        cause = error.__cause__
        number = cause.errno if isinstance(cause, OSError) and cause.errno else errno.EINVAL
        hide = self.configuration.veil if hasattr(self, "configuration") else str  # a file may be what is at fault
        self._notifier.failed(hide(str(error).partition("\n")[0]), number)
        return error.exit_code

    # --- signals, in their own thread -------------------------------------------------------------------------------

    def _on_signal(self, number: int) -> None:
        if number == 0:
            if self._interruptible:
                self._break_off_start("asked to stop")
            return
        name = signal.Signals(number).name
        if number == getattr(signal, "SIGHUP", None) and not self._signals.terminal.hung_up():
            since = time.monotonic()
            self._post(lambda: self._on_reload(Discard(), since, signalled=True), broken=self._end_reload)
            return
        if not self._escalation.another(time.monotonic()):
            return
        if self._interruptible:
            self._break_off_start(name)
        elif self._escalation.count <= 2:  # noqa: PLR2004 - the first asks, the second presses
            self.stop(StopReason("signal", name), Discard(), now=self._escalation.count > 1)
        else:
            try:
                self._remove_nodes()
                log.warning(f"{name} once more: gone at once")
                self._logs.flush(_LAST_WORDS)
            finally:
                os._exit(128 + number)

    def _break_off_start(self, why: str) -> None:
        """End a start at once: the main thread may be anywhere in the app's import, and cannot be waited for."""
        timer = threading.Timer(_BREAK_OFF, os._exit, [EX_OK])  # should anything here be held up by the import
        timer.daemon = True
        try:
            timer.start()
            self._starting.acquire(timeout=_BREAK_OFF)  # kept: the main thread makes nothing more
            if not self._interruptible:  # it was faster: there is a server now, and this is a stop like any other
                timer.cancel()
                self._starting.release()
                self.stop(StopReason("signal", why), Discard())
                return
            log.info(f"stopped while starting: {why}")
            self._notifier.stopping("stopped while starting")
            with contextlib.suppress(queue.Empty):
                while True:
                    self._inbox.get_nowait()()
            for reply in self._stop_waiters:
                reply.ok("stopped")
            self._leave_nothing()
            os._exit(EX_OK)
        except Exception:  # whatever it was, the start is over
            log.exception("cannot break off the start in good order")
            os._exit(EX_OK)

    def _forget(self) -> None:
        """In a child that the app forked: let go of all that is the daemon's."""
        self._plane.forget()
        self._state_directory.forget()
        for listener in (*self._listeners, *self._admin_listeners):
            listener.socket.close()  # the servers forget their own; these may not have one yet
        self._notifier.forget()
        self._main.call(end_child)  # a signal handler of the app that forked comes back into the main thread

    def _remove_nodes(self) -> None:
        self._plane.remove_nodes()
        for endpoint in self._endpoints:
            endpoint.withdraw()
        self._close_listeners()

    def _close_listeners(self) -> None:
        for listener in (*self._listeners, *self._admin_listeners):
            listener.close()

    # --- the main loop ----------------------------------------------------------------------------------------------

    def _post(
        self,
        event: Callable[[], None],
        reply: Reply | None = None,
        broken: Callable[[BaseException], None] | None = None,
    ) -> None:
        """Have an event carried out soon, in the one thread that does; see `_carry_out` (any thread)."""
        self._inbox.put(lambda: self._carry_out(event, reply, broken))

    def _turn(self) -> None:
        while self.state is not State.STOPPED:
            with contextlib.suppress(queue.Empty):
                self._inbox.get(timeout=self._until_next())()
            if self.state in {State.DRAINING, State.STOPPING} and not self._until_tick():
                self._carry_out(self._tick)
            if self._readings.late:
                self._carry_out(self._on_late_reading, broken=self._end_reload)

    def _carry_out(
        self,
        event: Callable[[], None],
        reply: Reply | None = None,
        broken: Callable[[BaseException], None] | None = None,
    ) -> None:
        """Carry out an event. One that raises is logged, and ends nothing.

        Its `reply` then has an error, and `broken`, where the event has one, leads on from the state that it may have
        left. What is no Exception, such as SystemExit, was meant to end the process: that is stopped in good order.
        """
        try:
            event()
        except BaseException as error:  # of the app's code, mostly: its objects, its sys.stderr, its registrations
            log.exception("cannot carry out an event")
            if reply is not None:
                reply.error(FlaskdError.code, f"cannot do that: {described(error)}; the log says more")
            for lead_on in (broken, self._fail if not isinstance(error, Exception) else None):
                if lead_on is not None:
                    self._lead_on(lead_on, error)

    @staticmethod
    def _lead_on(lead_on: Callable[[BaseException], None], error: BaseException) -> None:
        try:
            lead_on(error)
        except BaseException:  # there is nothing behind this
            log.exception("cannot lead on from an event that broke off")

    def _raised(self, error: BaseException) -> None:
        self._post(lambda: self._on_raised(error))

    def _on_raised(self, error: BaseException) -> None:
        """Log what the app raised in the main thread; SystemExit and the like stop the daemon in good order."""
        what = f"{type(error).__name__} was raised in the main thread, as by a signal handler of the app"
        if isinstance(error, Exception):
            self._unsaid += 1
            if (now := time.monotonic()) >= self._say_again:
                more = f" ({self._unsaid - 1} more were not logged)" if self._unsaid > 1 else ""
                log.error(f"{what}; flaskd goes on{more}", exc_info=error)
                self._unsaid, self._say_again = 0, now + _TICK
        else:
            log.error(what, exc_info=error)
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Stop in good order, for something that cannot be mended; the exit code tells of it."""
        why = str(error) if isinstance(error, FlaskdError) else f"{described(error)} was raised; the log says more"
        self._failure = self._failure or (error if isinstance(error, FlaskdError) else AppError(f"cannot go on: {why}"))
        self._on_stop(StopReason("failure", why), Discard(), wait=False, now=False)

    def _until_next(self) -> float | None:
        """Seconds until something is due; None when nothing is."""
        if self.state in {State.DRAINING, State.STOPPING}:
            return self._until_tick()
        if (reading := self._readings.present) is not None:
            return max(0.0, reading.until - time.monotonic())
        return None

    def _until_tick(self) -> float:
        following = self._last_tick + _TICK
        if self._drain is not None and self._drain.report is None:
            following = min(following, self._drain.next_moment)
        return max(0.0, following - time.monotonic())

    def _tick(self) -> None:
        self._last_tick = time.monotonic()
        server = self._server
        assert server is not None
        drain = self._drain
        if drain is not None:
            drain.advance()
        if drain is not None and drain.overdue:
            stuck = "the serving thread does not turn"
            cut = server.cut(stuck)
            log.error(f"the drain is over, but {stuck}; {len(cut)} requests are given up")
            self._on_drain_over(drain, DrainReport(cut=cut, background=left_behind()))
            return
        in_flight = server.requests()
        oldest = max(in_flight, key=lambda each: each.age, default=None)
        text = f"{self.state}: {len(in_flight)} in flight" + (f", oldest {oldest}" if oldest else "")
        progress: dict[str, Any] = {"in_flight": len(in_flight)}
        if oldest:
            progress["oldest"] = oldest.as_json()
        if background := background_work():
            text += f"; background: {', '.join(each.name for each in background)}"
            progress["background"] = len(background)
        if self._stop is not None and (running := self._stop.running):
            text += f"; cleanup: {', '.join(running)}"
            progress["cleanup"] = list(running)
        if self._ending is not None and self._ending.begun:
            text += f"; the exit waits for {', '.join(at_exit()) or 'the app'}"
        self._service.progress(text, server, self._stop.left if self._stop else None)
        for reply in [*(drain.waiters if drain else ()), *self._stop_waiters]:
            reply.progress(progress)

    # --- drain and resume -------------------------------------------------------------------------------------------

    def _on_drain(self, reply: Reply, wait: bool) -> None:
        before = self.state
        try:
            state = self._lifecycle.handle(Event.DRAIN)
        except NotNowError as error:
            log.warning(str(error), extra=_REFUSED)
            reply.error(error.code, str(error))
            return
        if before is State.READY:
            timeout = self.configuration.values.shutdown.drain.timeout
            log.info(f"draining: {self._in_flight} in flight, for at most {timeout:g}s")
            self._notifier.status(f"draining: {self._in_flight} in flight")
            self._begin_drain(timeout, announce=self.configuration.values.shutdown.announce)
        drain = self._drain
        assert drain is not None
        if wait and state is State.DRAINING:
            drain.waiters.append(reply)
            reply.progress({"in_flight": self._in_flight})
        elif state is State.DRAINING:
            reply.ok("draining", {"in_flight": self._in_flight, "deadline": round(drain.left, 1)}, hint="undo: resume")
        else:
            account = drain.account()
            reply.ok("drained", account, lines=account_lines(account), hint="undo: resume")

    def _begin_drain(
        self,
        timeout: float,
        *,
        announce: float,
        counted_from: tuple[int, int] | None = None,
        earlier: Drain | None = None,
    ) -> None:
        assert self._server is not None
        drain = Drain(
            self._server,
            timeout,
            lambda drain, report: self._post(
                lambda: self._on_drain_over(drain, report), broken=lambda _: self._let_stop_go_on(report)
            ),
            announce=announce,
            counted_from=counted_from,
            earlier=earlier,
        )
        drain.announce()
        self._drain = drain
        self._counts["drains"] += 1
        self._last_tick = time.monotonic()

    def _on_drain_over(self, drain: Drain, report: DrainReport) -> None:
        if drain is not self._drain or drain.report is not None:
            return  # resume, or the guard, was faster
        report = drain.conclude(report)
        state = self._lifecycle.handle(Event.DRAIN_OVER)
        if self._stop is not None:
            self._stop.drained(report)
            self._claim()
        log.info(f"drained: {report}", extra={"fields": report.as_json()})
        account = drain.account()
        for reply in drain.release():
            reply.ok("drained", account, lines=account_lines(account))
        if state is State.DRAINED:
            self._notifier.status(f"drained: {report}")
            if self.configuration.values.shutdown.drain.while_drained == "auto" and self._server is not None:
                self._server.refuse(on=True)

    def _let_stop_go_on(self, report: DrainReport) -> None:
        """Lead on where the end of a drain could not be told to all: a stop that waits for it goes on."""
        if self._stop is not None:
            self._stop.drained(report)

    def _on_resume(self, reply: Reply) -> None:
        try:
            self._lifecycle.check(Event.RESUME)
            if self.state is not State.READY:
                assert self._server is not None
                self._server.resume()
                self._listeners[:] = self._server.listeners
        except FlaskdError as error:
            log.warning(str(error), extra=_REFUSED)
            reply.error(error.code, str(error))
            return
        if self._lifecycle.state is not State.READY:
            log.info("resumed")
        self._lifecycle.handle(Event.RESUME)
        for waiter in self._drain.release() if self._drain else ():
            waiter.error("not-now", "the drain was undone by resume")
        self._drain = None
        self._notifier.status(self._ready_status())
        reply.ok("ready")

    @property
    def _in_flight(self) -> int:
        return self._server.in_flight if self._server else 0

    # --- reload -----------------------------------------------------------------------------------------------------

    def _on_reload(self, reply: Reply, since: float, *, signalled: bool = False) -> None:
        """Begin a reload; under Type=notify-reload the manager waits for an answer to each SIGHUP."""
        before = self.state
        if signalled and before is State.STARTING:
            self._reload_when_ready = True
            log.info("SIGHUP: the configuration is read again when flaskd is ready")
            return
        try:
            self._lifecycle.handle(Event.RELOAD)
        except NotNowError as error:
            log.warning(str(error), extra=_REFUSED)
            reply.error(error.code, str(error))
            if signalled and before in {State.DRAINING, State.DRAINED}:
                self._notifier.reloading(since)
                self._notifier.ready(f"{before}: {error}")
            return
        self._reload_waiters.append(reply)
        if before is State.RELOADING:
            self._reload_again, self._reload_since = True, since  # what is being read may be older than this wish
            return
        self._notifier.reloading(since)
        self._reload()

    def _reload(self) -> None:
        """Read and prepare aside: a file or an import that hangs must keep no stop waiting, and no reload for ever."""
        self._reload_again = False
        try:
            self._readings.begin()
        except FlaskdError as error:
            self._end_reload(FlaskdError(f"cannot read the configuration: {error}"))

    def _read_whole(self) -> tuple[Configuration, Plan]:
        """Read the configuration and prepare its plan; in the reading thread."""
        found = self._read()
        found[1].prepare()
        return found

    def _read_over(self, reading: Reading[tuple[Configuration, Plan]]) -> None:
        self._post(lambda: self._on_read(reading), broken=self._end_reload)

    def _on_late_reading(self) -> None:
        """Give a reading up that has had its time; the thread that hangs in it cannot be ended."""
        self._readings.give_up()
        path = self.configuration.path
        self._end_reload(
            FlaskdError(
                f"reading {path or 'the configuration'}, and what its policies need, took longer than {LIMIT:g}s; "
                "is it a file, on a disk that answers?"
            )
        )

    def _read(self) -> tuple[Configuration, Plan]:
        """The configuration as it would be now, and its plan. Raises ConfigError."""
        new = load_again(self._load, self.configuration)
        if keys := self.configuration.restart_keys(new):
            raise RestartNeededError(f"{', '.join(keys)}: cannot change without a restart")
        return new, build_plan(new.values.cleanup)

    def _on_read(self, reading: Reading[tuple[Configuration, Plan]]) -> None:
        """Take over what was read, or read again where a wish came meanwhile."""
        if not self._readings.ended(reading) or self.state is not State.RELOADING:
            return  # it came too late, or a stop came first; who waited was told
        self._logs.reclaim()
        error = reading.error
        if reading.found is not None:
            try:
                self._replace(*reading.found)
            except Exception as failure:  # noqa: BLE001 - told below; what was before is in force again
                error = failure
        if self._reload_again:
            self._notifier.reloading(self._reload_since)  # once for all that came meanwhile: a storm is not echoed
            self._reload()
            return
        self._end_reload(error)

    def _replace(self, new: Configuration, plan: Plan) -> None:
        """Put a configuration into force; where a part of it cannot be, the one before is in force again."""
        before = self.configuration, self._outlook.policies
        try:
            self._apply(new, plan)
        except Exception:
            self._apply(*before)
            raise

    def _apply(self, configuration: Configuration, plan: Plan) -> None:
        config = configuration.values
        self._apply_server(config)  # first: there may be no threads for it
        self.configuration = configuration
        self._outlook.set(plan, config.cleanup, self.app)
        self._apply_log(config)
        self._apply_watch()
        self._outlook.look_around()
        self._apply_idle(config)

    def _end_reload(self, error: BaseException | None) -> None:
        """Be ready again, and tell all who wait what came of it."""
        if self.state is not State.RELOADING:
            return
        self._readings.give_up()
        self._lifecycle.handle(Event.RELOADED)
        self._counts["ok" if error is None else "failed"] += 1
        self._last_reload = {"time": logs.timestamp(time.time()), "ok": error is None}
        waiters, self._reload_waiters = self._reload_waiters, []
        if error is None:
            log.info(f"reloaded {self.configuration.path or 'the defaults'}")
            self._notifier.ready(self._ready_status())
            for reply in waiters:
                reply.ok("reloaded", {"config": str(self.configuration.path)} if self.configuration.path else {})
            return
        known = isinstance(error, FlaskdError)
        fault = f"{error if known else described(error)}; keeping the old configuration"
        log.error(f"reload failed: {fault}", exc_info=None if known else error)
        self._last_reload["fault"] = fault
        self._notifier.ready(f"ready, but the reload failed: {fault}")
        for reply in waiters:
            reply.error(error.code if isinstance(error, FlaskdError) else FlaskdError.code, fault)

    def _apply_log(self, config: Config) -> None:
        log, hide = config.log, self.configuration.veil
        self._logs.apply(level=log.level, log_format=log.format, access=log.access, hide=hide)

    def _apply_watch(self) -> None:
        path = self.configuration.path
        if self._watch is None and path is not None:
            self._watch = FileWatch(
                path,
                changed=lambda digest: self._post(lambda: self._on_edit(digest), broken=self._end_reload),
                wanted=lambda: self.state is State.READY,
            )
        if self._watch is not None:
            self._watch.known = self.configuration.digest
            (self._watch.start if self.configuration.values.watch else self._watch.stop)()

    def _end_watch(self) -> None:
        if self._watch is not None:
            self._watch.stop()

    def _on_edit(self, digest: str) -> None:
        """Reload once for an edit that was seen, whatever comes of it."""
        if self.state is State.READY and self._watch is not None and self._watch.known != digest:
            self._watch.known = digest
            log.info(f"{self.configuration.path} has changed")
            self._on_reload(Discard(), time.monotonic())

    def _apply_server(self, config: Config) -> None:
        assert self._server is not None
        self._server.set_threads(config.server.threads)
        self._server.set_graces(config.shutdown.drain.keepalive_grace, config.shutdown.drain.stream_grace)
        self._server.answer_health(config.health.path or "", self.readiness)
        self._server.tell_answers(self._on_answer if config.log.access != "off" else None)
        self._service.stuck_after = config.systemd.stuck_after

    def _apply_idle(self, config: Config) -> None:
        assert self._server is not None
        idle = config.shutdown.idle
        self._server.watch_idle(idle.after, idle.ignore, lambda: self._post(self._on_idle))

    def _on_idle(self) -> None:
        """Stop, unless something came first: a request, or somebody who drains and wants to go on with it."""
        after, idle = self.configuration.values.shutdown.idle.after, self._server.idle if self._server else None
        if self.state is State.READY and after is not None and idle is not None and not idle[1]:
            why = f"nothing was asked for {write_duration(after)}"
            self._on_stop(StopReason("idle", why), Discard(), wait=False, now=False)

    def readiness(self) -> tuple[str, str]:
        """What `health.path` and the admin listener answer: a status line and a word (any thread)."""
        if self.state in {State.READY, State.RELOADING}:
            return "200 OK", "ready"
        status = self.configuration.values.health.unready_status
        return f"{status} {http.client.responses.get(status, 'Not Ready')}", str(self.state)

    def _on_answer(self, fields: dict[str, Any]) -> None:
        logs.log_access(self._logs.access, fields)

    # --- stop -------------------------------------------------------------------------------------------------------

    def _on_stop(self, reason: StopReason, reply: Reply, *, wait: bool, now: bool) -> None:
        self._lifecycle.handle(Event.STOP)
        if self._interruptible:
            if wait:  # the signal thread ends the process in a moment, and answers
                self._stop_waiters.append(reply)
            else:
                reply.ok("stopping")
            return
        if self._stop is None:
            self._begin_stop(reason)
        assert self._stop is not None
        if now:
            self._stop.hurry()
            if self._drain is not None:
                self._drain.shorten(0)
        if wait:
            self._stop_waiters.append(reply)
            reply.progress({"in_flight": self._in_flight})
        else:
            fields = {"in_flight": self._in_flight, "deadline": round(self._stop.left, 1)}
            reply.ok("stopping", fields, hint=self._undone_by())

    def _undone_by(self) -> str:
        """What would undo a stop, for who asked for it."""
        passed = any(listener.shared and not listener.stored for listener in self._listeners)
        return "the next connection starts it again, unless the .socket unit is stopped too" if passed else ""

    def _begin_stop(self, reason: StopReason) -> None:
        config = self.configuration.values
        self._counted = counted = self._server.counted if self._server else (0, 0)
        self._stop = stop = Stop(
            reason,
            plan=self._outlook.plan,
            sweep=self._outlook.sweep,
            app=self.app.flask,
            shutdown=config.shutdown,
            cleanup=config.cleanup,
            state=self._state_directory.writable,
            drain=lambda: self._post(lambda: self._drain_to_stop(counted), broken=self._stop_without_drain),
            over=lambda error: self._post(lambda: self._on_stop_over(error), broken=lambda _: self._on_stop_over(None)),
            on_step=lambda result: self._post(lambda: self._on_step(result)),
            on_begin=lambda: self._post(self._claim),
            spare=self._cleanup_thread.spare,
        )
        open_files.share()
        self._stop.arm()  # before another line of Python: the app may take the GIL and never give it back
        for tell in (
            lambda: self._say_what_stops(reason, stop),
            self._end_reloads,
            lambda: self._service.stopping(
                f"stopping ({reason}): {self._in_flight} in flight", stop.left, reason, self._listeners, self._server
            ),
            self._announce_stop,
            # A disk that hangs must not keep the stop.
            lambda: call_in_thread(lambda: self._state_directory.stopping(str(reason))).close(0),
        ):
            try:
                tell()
            except BaseException:  # whatever could not be told, the stop goes on
                log.exception("cannot tell everybody of the stop")
        self._cleanup_thread.run(stop.run)
        self._last_tick = time.monotonic()

    def _say_what_stops(self, reason: StopReason, stop: Stop) -> None:
        most = f"at most {self.configuration.values.shutdown.deadline:g}s for everything"
        log.info(f"stopping ({reason}): {self._in_flight} in flight, {most}; plan {stop.plan.id}")

    def _stop_without_drain(self, error: BaseException) -> None:
        """Lead on where the drain of a stop could not begin: what is in hand is given up, and told."""
        assert self._stop is not None
        why = f"the drain could not begin: {described(error)}"
        self._stop.drained(DrainReport(cut=self._server.cut(why) if self._server else (), background=left_behind()))

    def _end_reloads(self) -> None:
        waiters, self._reload_waiters = self._reload_waiters, []
        for reply in waiters:
            reply.error("not-now", "the reload was overtaken by a stop")

    def _announce_stop(self) -> None:
        if self._server is not None:
            # A successor may share the listeners: from now on their backlog is left to it.
            self._server.refuse(on=False)
            self._server.announce()

    def _drain_to_stop(self, counted_from: tuple[int, int]) -> None:
        assert self._stop is not None
        if self._drain is None:
            announce = 0.0 if self._stop.hurried else self.configuration.values.shutdown.announce - self._stop.took
            self._begin_drain(self._stop.drain_time, announce=max(0.0, announce), counted_from=counted_from)
        elif self._drain.report is None:
            self._drain.shorten(self._stop.drain_time)
        elif in_background() and self._failure is None:  # begun, or not over, since it was drained
            self._begin_drain(self._stop.drain_time, announce=0.0, earlier=self._drain)
        else:  # drained before, or the serving thread is dead
            self._stop.drained(self._drain.report)
        self._claim()

    def _claim(self) -> None:
        """Tell the service manager what the drain and the steps under way may take: one of them began, or ended."""
        assert self._stop is not None
        drain = self._drain.left if self._drain else 0.0
        self._service.step(max(drain, self._stop.step_left), self._stop.left)

    def _on_step(self, result: StepResult) -> None:
        self._claim()
        fields = {"policy": result.name, "fate": str(result.fate), "took": round(result.took, 3)}
        if result.why:
            fields["why"] = result.why
        for reply in self._stop_waiters:
            reply.progress(fields)

    def _on_stop_over(self, error: BaseException | None) -> None:
        if error is not None:
            log.error(f"cleanup broke off: {error}", exc_info=error)
        if self._ending is not None:
            self._main.call(functools.partial(self._end_the_app, self._ending))
        else:
            self._on_exit_over()

    def _end_the_app(self, ending: Ending) -> None:
        """Give what the app has left to the end of the process its time (main thread); the events go on meanwhile."""
        assert self._stop is not None
        ending.left = self._stop.left_for_the_exit()
        self._post(self._claim_the_exit)
        ending.run(cut=lambda unfinished: self._post(lambda: self._on_exit_cut(unfinished)))
        self._post(self._on_exit_over)

    def _on_exit_over(self) -> None:
        self._lifecycle.handle(Event.STOP_OVER)

    def _claim_the_exit(self) -> None:
        assert self._stop is not None
        assert self._ending is not None
        self._service.step(self._ending.left(), self._stop.left)

    def _on_exit_cut(self, unfinished: tuple[Unfinished, ...]) -> None:
        """Stop without what the app has left to the end of the process: the main thread is in it, and stays there."""
        self._unfinished, self._main_is_lost = unfinished, True
        for each in unfinished:
            log.warning(f"cut at the exit: {each.name}\n{each.stack}".rstrip())
        self._lifecycle.handle(Event.STOP_OVER)

    def _leave_nothing(self) -> None:
        self._remove_nodes()
        self._state_directory.close()
        self._plane.close()
        self._logs.flush(_LAST_WORDS)

    def _on_death(self, error: BaseException | None) -> None:
        """Stop, for the serving thread died: what was in hand is lost, and told."""
        assert self._server is not None
        why = f"the serving thread died: {error!r}"
        self._failure = self._failure or AppError(why)
        report = DrainReport(cut=self._server.cut(why), background=left_behind())
        if self._drain is None:
            self._drain = Drain(self._server, 0, lambda *_: None)
            self._drain.report = report
        else:
            self._on_drain_over(self._drain, report)
        self._on_stop(StopReason("failure", why), Discard(), wait=False, now=False)

    def _finish(self) -> int:
        """Join the server, write the record, answer who waits, and choose the exit code."""
        stop, server, report = self._stop, self._server, self._drain.report if self._drain else None
        assert stop is not None
        assert server is not None
        if report is None:  # the cleanup broke off, which has been logged, and the drain had no time left
            completed, rejected = (now - then for now, then in zip(server.counted, self._counted, strict=True))
            report = DrainReport(completed, rejected, server.cut("the cleanup broke off"), background=left_behind())
        report = report.with_unfinished(stop.cut_work() + self._unfinished)
        self._close_endpoints(min(_ENDPOINT_CLOSING, stop.left))
        for each in self._listeners:
            if each.shared and (waiting := each.waiting()):
                log.info(f"{waiting} connections wait on {each.address} for who listens there next, or are reset")
        server.end(timeout=min(0.2, stop.left))
        code = EX_OK if report.clean else self.configuration.values.shutdown.exit_codes.degraded
        if self._failure is not None:
            code = self._failed(self._failure)
        if self._ending is None or self._unfinished:
            self._state_directory.record(stop.record(report))
        else:
            late = report.with_unfinished((Unfinished("finalizers"),))
            self._ending.late_code = code or self.configuration.values.shutdown.exit_codes.degraded
            self._ending.settle = self._state_directory.prepare(stop.record(report), unless=stop.record(late))
        policies = stop.policies
        fates = [entry["fate"] for entry in policies.values()]
        cleanup = ", ".join(f"{fates.count(fate)} {fate}" for fate in dict.fromkeys(fates)) or "none"
        log.info(f"stopped: {report}; cleanup: {cleanup}; in {stop.took:.1f}s", extra={"fields": report.as_json()})
        if self._failure is None:  # else its STATUS is what people need to see
            self._notifier.status(f"stopped: {report}")
        for reply in self._stop_waiters:
            fields = {**report.as_json(), "took": round(stop.took, 3), "policies": policies}
            reply.ok("stopped", fields, lines=account_lines(fields), hint=self._undone_by())
        return code


def _put_away(end: Callable[..., object], *args: object) -> None:
    """End a part of the daemon when all is over; one that cannot be changes neither the others nor the exit code."""
    try:
        end(*args)
    except BaseException:  # see above
        log.exception("cannot put everything away")


class RestartNeededError(ConfigError):
    """A reload that only a restart could carry out."""

    code = "restart-needed"
