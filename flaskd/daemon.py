"""The daemon: its life cycle and its inbox.

One thread makes every transition, with one method for each event. All other threads (signals, control, serving,
cleanup) only post to the inbox. The app is served by an object with the interface `flaskd.serving.api`; notices tell
the log, systemd and the counts what happens. `flaskd.boot` starts the daemon, handles signals, and ends the process.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from flaskd import notices
from flaskd.cleanup import Plan
from flaskd.config import Configuration, write_duration
from flaskd.drains import Drains
from flaskd.errors import AppError, FlaskdError, NotNowError, described
from flaskd.holdings import Holdings, Plane
from flaskd.inbox import (
    Asked,
    DrainAsked,
    ExitBegan,
    ExitOver,
    FileChanged,
    IdleOver,
    Inbox,
    InboxEvent,
    PulseDue,
    Raised,
    ReadingLate,
    ReloadAsked,
    RestartAsked,
    ResumeAsked,
    ScaleAsked,
    StopAsked,
    Tick,
    Wish,
)
from flaskd.lifecycle import Event, Lifecycle, State, StopReason
from flaskd.log import setup as logs
from flaskd.notices import Notice
from flaskd.process.main_thread import Complaints
from flaskd.protocol import reason_of
from flaskd.questions import Questions
from flaskd.readings import ReadingOver
from flaskd.reload import Reload
from flaskd.serving.api import (
    CleanupOver,
    Died,
    Drained,
    Failed,
    Ready,
    Renewed,
    Serving,
    StepBegan,
    StepEnded,
    TroubleChanged,
    Work,
    WorkersStart,
)
from flaskd.snapshot import Counts, Snapshot
from flaskd.starting import Start
from flaskd.stopping import Stopping
from flaskd.systemd.notify import Notifier
from flaskd.systemd.service import Service
from flaskd.workforce import Workforce

log = logging.getLogger("flaskd.daemon")

_WEDGED = 5.0
"""Seconds without a turn after which the serving thread counts as dead; a healthy one turns every second."""
_SERVING = {State.READY, State.RELOADING}
_TICK = 1.0
"""Seconds between two progress reports of a drain or stop."""


def own_holdings(daemon: Daemon, plane: Plane, name: str, environ: Mapping[str, str]) -> Holdings:
    """Make the holdings of a daemon that is not a worker."""
    return Holdings(
        plane,
        daemon,
        name,
        environ,
        describe_stop=lambda: daemon.serving.describe_stop(),  # noqa: PLW0108 - `serving` is set later
        stop=lambda reason: daemon.ask(StopAsked(reason)),
    )


class Daemon:
    """One serving daemon, to the end of its stop; for `load`, `plane` and `name` see `flaskd.boot.Boot`.

    `serving` makes the object that serves the app, which posts to the inbox. A stop during the `start` ends the
    process. `end_the_app` runs what the app has left to the process' end, in another thread, and posts ExitOver; None
    if the process goes on after the stop.
    """

    def __init__(
        self,
        load: Callable[[], Configuration],
        *,
        serving: Callable[[Daemon], Serving],
        plane: Callable[[Daemon], Plane],
        name: str,
        environ: Mapping[str, str],
        start: Start,
        end_the_app: Callable[[], None] | None = None,
        holdings: Callable[[Daemon, Plane, str, Mapping[str, str]], Holdings] | None = None,
        heard: Callable[[Notice], None] = notices.log_it,
    ) -> None:
        self.name = name
        self.configuration: Configuration | None = None
        """The configuration in force; None before the first one was read."""
        self.failure: FlaskdError | None = None
        """The failure for which the daemon stops; None without one."""
        self.logs = logs.Logs()
        self.inbox = Inbox()
        self.lifecycle = Lifecycle()
        self._began = time.time()
        self._start = start
        self.holdings = (holdings or own_holdings)(self, plane(self), name, environ)
        self.service = Service(Notifier(environ), environ, lambda: self.inbox.post(PulseDue()))
        self._counts = Counts()
        self.notices = notices.Notices(heard, self.service.heard, self._counts.heard)
        self.reload = Reload(
            load,
            prepare=lambda configuration: self.serving.prepare(configuration),  # noqa: PLW0108 - `serving` is set later
            apply=self._apply,
            serving=lambda: self.serving,
            status=lambda: self._became_ready().status,
            lifecycle=self.lifecycle,
            notices=self.notices,
            inbox=self.inbox,
        )
        self.workforce = Workforce(lambda: self.serving, self.lifecycle, self.notices)
        self.drains = Drains(
            lambda: self.serving,
            self.holdings,
            self.lifecycle,
            self.notices,
            self.inbox,
            reload=self.reload,
            status=lambda: self._became_ready().status,
        )
        self._end_the_app = end_the_app
        self.serve_by(serving(self))
        self._complaints = Complaints()
        self._next_tick = 0.0
        self.questions: Questions = Questions(self.reload.read, lambda: self.serving, lambda: self._config)

    # --- any thread -------------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """The present state."""
        return self.lifecycle.state

    @property
    def _config(self) -> Configuration:
        assert self.configuration is not None
        return self.configuration

    def ask(self, event: Wish) -> None:
        """Ask for something; the event's reply is called with the outcome."""
        if self._start.breakable and not isinstance(event, StopAsked):
            try:  # during the start no event is handled
                self.lifecycle.check(_OF[type(event)])
            except NotNowError as error:
                self.drains.refuse(event.reply, error)
                return
        self.inbox.post(event)
        if self._start.breakable:
            self._start.asked()

    def snapshot(self) -> Snapshot:
        """All figures at this moment."""
        life, configuration = self.lifecycle, self._config
        return Snapshot(
            name=self.name,
            state=life.state,
            since=life.since,
            age=life.age,
            started=self._began,
            uptime=life.uptime,
            reason=self.stopping.reason,
            app=self.serving.target,
            threads=configuration.values.server.threads,
            serving=self.serving.snapshot(),
            held=self.holdings.snapshot(),
            log_level=self.logs.level,
            config=str(configuration.path) if configuration.path else None,
            counts=self._counts,
            left=self.stopping.left if self.stopping.begun else self.drains.left,
            instance=configuration.values.instance,
        )

    def look(self) -> None:
        """Count recent answers, and refuse questions that wait too long; called every second (the control thread)."""
        self._counts.recent.note(lambda: self.serving.snapshot().tally.took.counts)
        self.questions.look()

    @property
    def wedged(self) -> str:
        """Why flaskd counts as dead, for ``health`` and ``/livez``; empty while it is alive, or starts."""
        silent = self.serving.silent_for
        return f"the serving thread has not turned for {silent:.1f}s" if silent > _WEDGED else ""

    def readiness(self, state: State | None = None) -> tuple[str, str]:
        """The answer on `health.path` and of the admin listener in a state, by default the present: status and text."""
        why = self.serving.unready if state is None and self.state in _SERVING else ""
        if (state := state or self.state) in _SERVING and not why:
            return "200 OK", "ready"
        status = self._config.values.health.unready_status
        return f"{status} {reason_of(status, 'Not Ready')}", why or str(state)

    def serve_by(self, serving: Serving) -> None:
        """Set the object that serves the app; before anything is served."""
        self.serving = serving
        self.service.attach(serving, self.holdings.listeners, lambda: self.state)
        self.stopping = Stopping(serving, self.holdings, self.notices, self._end_the_app)

    # --- the thread of the events -----------------------------------------------------------------------------------

    def configured(self, configuration: Configuration) -> None:
        """Take a configuration as the one in force."""
        config, self.configuration = configuration.values, configuration
        level, log_format, access = config.log.level, config.log.format, config.log.access
        self.logs.always["instance"] = config.instance
        self.logs.apply(level=level, log_format=log_format, access=access, hide=configuration.redact)
        self.service.stuck_after = config.systemd.stuck_after
        self.reload.follow(configuration)

    def turn(self) -> None:
        """Handle events until the stop is over."""
        while self.state is not State.STOPPED:
            self.carry_out(self.inbox.take())

    def carry_out(self, event: InboxEvent) -> None:
        """Handle an event. If its method raises, that is logged, and the daemon goes on.

        The event's reply then gets an error, and `_GO_ON` leads out of a state in which the event may have left the
        daemon. SystemExit and the like are meant to end the process: the daemon stops in good order.
        """
        log.debug("%s", event)
        try:
            _METHODS[type(event)](self, event)
        except BaseException as error:  # mostly from the app's code: its objects, its sys.stderr, its registrations
            log.exception("cannot carry out an event")
            if isinstance(event, Asked):
                event.reply.error(FlaskdError.code, f"cannot do that: {described(error)}; the log says more")
            ways = [_GO_ON.get(type(event)), None if isinstance(error, Exception) else Daemon._fail]
            for go_on in filter(None, ways):
                try:
                    go_on(self, error)
                except BaseException:  # the last line of defence
                    log.exception("cannot recover from a failed event")

    def _ready(self, _event: Ready) -> None:
        if self.state is not State.STARTING:
            return  # a stop came first
        self.serving.started(self._config)
        self.lifecycle.handle(Event.STARTED)
        self.notices.tell(self._became_ready())
        self.reload.started()

    def _became_ready(self) -> notices.BecameReady:
        return notices.BecameReady(str(self.serving.target), [each.address for each in self.holdings.listeners])

    def _not_ready(self, event: Failed) -> None:
        if self.state is State.STARTING:
            self._fail(event.error)

    def _drained(self, event: Drained) -> None:
        state = self.drains.over(event)
        if state is State.STOPPING:
            self.stopping.claim()
        elif state is State.DRAINED and self._config.values.shutdown.drain.while_drained == "auto":
            self.serving.refuse()

    def _apply(self, configuration: Configuration, plan: Plan) -> None:
        """Put a configuration into force; if a part of it fails, the old one is in force again."""
        before, policies = self._config, self.serving.policies
        try:
            self.serving.apply(configuration, plan)
            self.configured(configuration)
        except Exception:
            self.serving.apply(before, policies)
            self.configured(before)
            raise

    def _reading_over(self, event: ReadingOver) -> None:
        self.logs.reclaim()
        self.reload.reading_over(event.reading)

    def _idle_over(self, _event: IdleOver) -> None:
        """Stop because of idleness, unless a request, or another event that changed the state, came first."""
        after, idle = self._config.values.shutdown.idle.after, self.serving.snapshot().idle
        if self.state is State.READY and after is not None and idle is not None and not idle[1]:
            self._stop_asked(StopAsked(StopReason("idle", f"no request for {write_duration(after)}")))

    def _stop_asked(self, event: StopAsked) -> None:
        self.lifecycle.handle(Event.STOP)
        if not self.stopping.begun:
            configuration = self._config.within(event.within)
            self.stopping.begin(event.reason, configuration, overtaken=lambda: self.reload.overtaken("stop"))
            self._tick_later()
        self.stopping.join(event)

    def _cleanup_over(self, _event: CleanupOver) -> None:
        if not self.stopping.end_the_app():
            self._exit_over(ExitOver())

    def _exit_over(self, event: ExitOver) -> None:
        self.stopping.exit_over(event)
        self.lifecycle.handle(Event.STOP_OVER)

    def _died(self, event: Died) -> None:
        """Stop, because the serving thread died; requests in hand are lost, and reported as cut."""
        why = f"the serving thread died: {event.error!r}"
        self.failure = self.failure or AppError(why)
        self._stop_asked(StopAsked(StopReason("failure", why)))
        self.serving.give_up(why)

    def _raised(self, event: Raised) -> None:
        """Log what the app's code raised in the main thread; SystemExit and the like stop the daemon in good order."""
        self._complaints.tell(event.error)
        if not isinstance(event.error, Exception):
            self._fail(event.error)

    def _fail(self, error: BaseException) -> None:
        """Stop in good order because of an error; the exit code says so."""
        why = str(error) if isinstance(error, FlaskdError) else f"{described(error)} was raised; the log says more"
        self.failure = self.failure or (error if isinstance(error, FlaskdError) else AppError(f"cannot go on: {why}"))
        self._stop_asked(StopAsked(StopReason("failure", self._config.redact(why))))

    def _tick_later(self) -> None:
        self._next_tick = time.monotonic() + _TICK
        self.inbox.post_at(self._next_tick, Tick())

    def _tick(self, _event: Tick) -> None:
        """Give up a drain whose server is dead or overdue; report progress."""
        drain = self.serving.drain
        if self.state not in {State.DRAINING, State.STOPPING} or (drain is not None and drain.look()):
            return
        if time.monotonic() < self._next_tick:
            return  # a tick of an earlier drain, or one that only checks an overdue drain
        now = self.snapshot()
        waits = self.stopping.exit_waits_for
        text = f"{now}; the exit waits for {waits}" if waits else str(now)
        self.notices.tell(notices.Progress(text, self.stopping.left))
        for reply in (*self.drains.waiters, *self.stopping.waiters):
            reply.progress(now.progress)
        self._tick_later()


# ruff: noqa: SLF001 - of this class

_METHODS: dict[type[Any], Callable[[Daemon, Any], None]] = {
    Ready: Daemon._ready,
    Failed: Daemon._not_ready,
    DrainAsked: lambda daemon, event: daemon.drains.asked(event, daemon._config, daemon._tick_later),
    Drained: Daemon._drained,
    ResumeAsked: lambda daemon, event: daemon.drains.resume_asked(event),
    ReloadAsked: lambda daemon, event: daemon.reload.asked(event),
    FileChanged: lambda daemon, event: daemon.reload.file_changed(event),
    ReadingOver: Daemon._reading_over,
    ReadingLate: lambda daemon, _: daemon.reload.reading_late(),
    IdleOver: Daemon._idle_over,
    StopAsked: Daemon._stop_asked,
    StepBegan: lambda daemon, _: daemon.stopping.claim(),
    StepEnded: lambda daemon, event: daemon.stopping.step_ended(event),
    CleanupOver: Daemon._cleanup_over,
    ExitBegan: lambda daemon, event: daemon.stopping.exit_began(event),
    ExitOver: Daemon._exit_over,
    Died: Daemon._died,
    Renewed: lambda daemon, event: daemon.reload.renewed(event),
    WorkersStart: lambda daemon, event: daemon.workforce.starts(event, daemon.reload.waiters),
    TroubleChanged: lambda daemon, _: daemon.workforce.trouble_changed(str(daemon.snapshot())),
    Work: lambda _, event: event.run(),
    ScaleAsked: lambda daemon, event: daemon.workforce.scale(event),
    RestartAsked: lambda daemon, event: daemon.workforce.restart(event),
    Raised: Daemon._raised,
    PulseDue: lambda daemon, _: daemon.service.pulse(),
    Tick: Daemon._tick,
}
"""The method for each event."""

_GO_ON: dict[type[Any], Callable[[Daemon, BaseException], None]] = {
    **dict.fromkeys((DrainAsked, Ready, Failed, Died), Daemon._fail),
    **dict.fromkeys((ReloadAsked, FileChanged, ReadingOver, Renewed), lambda daemon, error: daemon.reload.end(error)),
    **dict.fromkeys((CleanupOver, ExitBegan), lambda daemon, _: daemon._exit_over(ExitOver())),
}
"""What follows a failed event, so that the daemon does not stay in a state for ever."""

_OF: dict[type[Any], Event] = {
    DrainAsked: Event.DRAIN,
    ResumeAsked: Event.RESUME,
    **dict.fromkeys((ReloadAsked, ScaleAsked, RestartAsked), Event.RELOAD),
}
