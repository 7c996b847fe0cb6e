"""The run of a daemon: its start, which a stop can break off, its signals, and its exit code."""

from __future__ import annotations

import errno
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NoReturn

from flaskd.admin import opened_by
from flaskd.config import Configuration
from flaskd.daemon import Daemon, own_holdings
from flaskd.errors import EX_LOST, EX_OK, FlaskdError, NotNowError
from flaskd.holdings import Holdings, Plane, put_away
from flaskd.inbox import Asked, ExitBegan, ExitOver, IdleOver, Raised, ReloadAsked, StopAsked
from flaskd.lifecycle import Event, State, StopReason
from flaskd.notices import BrokenOff, FailedFor, Loaded, Notice, Starting, log_it
from flaskd.process.descriptors import open_files
from flaskd.process.exit import Ending
from flaskd.process.forks import AppCode, end_child, forgotten_by_children
from flaskd.process.main_thread import MainThread
from flaskd.process.orphans import orphans
from flaskd.process.signals import Escalation, SignalWatch
from flaskd.reload import tell_doubts
from flaskd.serving import launch
from flaskd.serving.api import Account
from flaskd.serving.inprocess import AsWorker, InProcess
from flaskd.serving.loading import LoadedApp
from flaskd.serving.patching import patching_refused
from flaskd.starting import Start

if TYPE_CHECKING:
    from flaskd.pool.early import Early
    from flaskd.pool.pool import Pool

log = logging.getLogger("flaskd.daemon")

_LAST_WORDS = 0.2
"""Seconds for the last log lines of a process that ends at once."""
_SWITCH = 0.001
"""Seconds after which a computing thread lets another one run (sys.setswitchinterval; Python's default is 5 ms).

For one answer, the serving, control and admin threads take the GIL several times, and wait each time for all threads
that compute: with four of these a probe took up to 190 ms with the default, and takes up to 40 ms with this.
"""


class Boot:
    """Runs one daemon in this process.

    `load` reads the configuration, at the start and at each reload. The app is `app`, or what `make_app` returns when
    it is called at the start; without both, the app that the configuration names is imported. `ending` is given if the
    process ends after the stop: it runs what the app has left to the process' end. `early` are the processes for the
    first workers.
    """

    _is_worker = False

    def __init__(
        self,
        load: Callable[[], Configuration],
        *,
        plane: Callable[[Daemon], Plane],
        name: str,
        environ: Mapping[str, str],
        app: Callable[..., Any] | LoadedApp | None = None,
        make_app: Callable[[], Callable[..., Any]] | None = None,
        ending: Ending | None = None,
        early: Sequence[Early] = (),
    ) -> None:
        self._early = early
        self._load, self._ending, self._name = load, ending, name
        self._in_hand = app is not None or make_app is not None
        self._serving: InProcess | Pool
        self._start = Start(asked=lambda: self._signals.poke())  # noqa: PLW0108 - `_signals` is set later

        def serving(daemon: Daemon) -> InProcess:
            in_process = self._serving = InProcess(
                daemon.inbox.post,
                app=app,
                make_app=make_app,
                environ=environ,
                readiness=lambda: self._readiness(daemon),
                answered=daemon.logs.write_access,
                idle_over=lambda: daemon.inbox.post(IdleOver()),
                leaves=ending is not None,
                worker=self._as_worker(),
            )
            return in_process

        daemon = self.daemon = Daemon(
            load,
            serving=serving,
            holdings=self._holdings,
            plane=plane,
            name=name,
            environ=environ,
            start=self._start,
            end_the_app=(lambda: self._main.call(self._end_the_app)) if ending is not None else None,
            heard=self._heard,
        )
        self._signals = SignalWatch(self._signalled, wake=lambda: self._main.call(lambda: None))
        self._escalation = Escalation()
        self._main = MainThread(self._serve, lambda error: daemon.inbox.post(Raised(error)), self._look)

    def run(self, *, last: bool = False) -> int:
        """Serve until stopped, and return the exit code, which also says whether the start failed; errors are logged.

        `last`: the process ends after this, so the app's own signal handlers are not restored.
        """
        if threading.current_thread() is not threading.main_thread():
            raise FlaskdError("cannot serve: flaskd needs the main thread for its signals; elsewhere use ServerThread")
        daemon = self.daemon
        with ExitStack() as stack:
            if not last:
                stack.callback(self._main.put_handlers_back)
            stack.enter_context(daemon.logs)
            daemon.logs.apply(level="info", log_format="auto", access="off")
            stack.callback(put_away, daemon.service.close)
            stack.enter_context(daemon.service.attended())
            stack.enter_context(forgotten_by_children(self._forget))
            stack.callback(faulthandler.cancel_dump_traceback_later)
            stack.callback(put_away, daemon.reload.close)
            stack.callback(sys.setswitchinterval, sys.getswitchinterval())
            sys.setswitchinterval(_SWITCH)
            with AppCode():  # a child that the app forks in this thread does not unwind the stack
                try:
                    if self._ending is not None:
                        self._ending.start()
                    self._make(stack)
                    self._main.begin()
                except BaseException as error:  # noqa: BLE001 - the app's code runs in this thread; reported below
                    if not self._main.begun:
                        return self._not_started(error)
                    daemon.inbox.post(Raised(error))
                return self._main.wait()
        raise AssertionError  # the stack suppresses nothing

    def _make(self, stack: ExitStack) -> None:
        """Make all that serving needs, import the app, and start to serve; until then a stop ends the process."""
        daemon, holdings = self.daemon, self.daemon.holdings
        configuration = self._load()
        config = configuration.values
        if config.server.workers and not self._is_worker:
            if self._in_hand:
                configuration.refuse_given_app()
            daemon.serve_by(self._workers())
        elif not self._is_worker:
            os.environ.update(FLASKD_WORKER="0", FLASKD_GENERATION="0")  # for apps that run a task in worker 0 alone
        serving = self._serving
        daemon.configured(configuration)
        self._start.breakable = True
        stack.enter_context(self._signals)
        daemon.notices.tell(Starting())
        if not self._is_worker:
            tell_doubts(configuration)
        with self._start.making:
            holdings.open(config, daemon.service.store, stack)
            stack.callback(put_away, serving.abandon)
            serving.make_threads()
        stack.enter_context(opened_by(holdings.open_endpoint))
        holdings.tell()
        stack.enter_context(patching_refused())
        app = serving.load(config, holdings.state.writable)
        self._signals.reclaim()
        daemon.logs.reclaim()
        self._loaded(app)
        serving.make_server(config, holdings.listeners)
        stack.enter_context(open_files.reserve())
        self._start.end()
        serving.start(configuration)
        launch.keep(config, holdings.listeners, daemon.service.store)
        daemon.notices.tell(Loaded(config.health.probe_timeout if config.health.probe else 0.0))

    def _workers(self) -> Pool:
        """Make the pool, which serves with workers."""
        from flaskd.pool.pool import Pool  # noqa: PLC0415 - a daemon without workers starts faster

        daemon = self.daemon
        pool = self._serving = Pool(
            daemon.inbox.post,
            daemon.inbox.post_at,
            name=self._name,
            stop=lambda reason: daemon.ask(StopAsked(reason)),
            open_endpoint=lambda *asked: daemon.holdings.endpoint_for(*asked).address,
            idle_over=lambda: daemon.inbox.post(IdleOver()),
            early=self._early,
        )
        return pool

    # --- replaced in a worker (`flaskd.workers.worker`) ---------------------------------------------------------------

    def _holdings(self, daemon: Daemon, plane: Plane, name: str, environ: Mapping[str, str]) -> Holdings:
        return own_holdings(daemon, plane, name, environ)

    def _as_worker(self) -> AsWorker | None:
        return None

    def _readiness(self, daemon: Daemon) -> tuple[str, str]:
        """The answer on `health.path`: the status line and a text."""
        return daemon.readiness()

    def _late_code(self, code: int) -> int:
        """The exit code if finalizers are cut."""
        return code

    def _heard(self, notice: Notice) -> None:
        """Log a notice of the daemon."""
        log_it(notice)

    def _loaded(self, app: LoadedApp | Pool) -> None:
        """Log which app was loaded and will be served."""
        app.tell()

    def _not_started(self, error: BaseException) -> int:
        """Report why the start failed; returns the exit code."""
        self._start.end()
        self.daemon.lifecycle.handle(Event.START_FAILED)
        if self.daemon.configuration is None and not isinstance(error, Exception):
            raise error  # a Ctrl-C before the configuration was read is for the caller
        return self._failed(launch.fault_of(error))

    def _failed(self, error: FlaskdError) -> int:
        """Log a failure, and tell systemd; returns its exit code."""
        *faults, last = str(error).split("\n")  # not splitlines(): an app's text may have other line ends
        for each in faults:
            log.error(each)
        log.error(f"{last}\n{error.details}".rstrip())
        cause = error.__cause__
        number = cause.errno if isinstance(cause, OSError) and cause.errno else errno.EINVAL
        configuration = self.daemon.configuration
        why = str(error).partition("\n")[0]  # the errno of a file's error is passed on, too
        self.daemon.notices.tell(FailedFor(configuration.redact(why) if configuration is not None else why, number))
        return error.exit_code

    def _look(self) -> None:
        """Take signals back, adjust limits and reap orphans; called once a second in the main thread."""
        self._signals.reclaim()  # C code may replace a handler at any time
        open_files.adjust()
        orphans.reap()

    def _forget(self) -> None:
        """In a child that the app forked, close the copies of all that belongs to the daemon."""
        self.daemon.holdings.forget()
        self.daemon.service.forget()
        self._main.call(end_child)  # ends a child that a signal handler forked, when it returns to the main thread

    # --- signals, in their own thread -------------------------------------------------------------------------------

    def _signalled(self, number: int) -> None:
        if number == 0:
            if self._start.breakable:
                self._break_off("asked to stop")
            return
        name = signal.Signals(number).name
        if number == getattr(signal, "SIGHUP", None) and not self._signals.terminal.hung_up():
            self.daemon.inbox.post(ReloadAsked(signalled=True))
        elif self._escalation.another(time.monotonic()):
            if self._start.breakable:
                self._break_off(name)
            elif self._escalation.count <= 2:  # noqa: PLR2004 - the first begins a stop, the second hurries it
                self.daemon.ask(StopAsked(StopReason("signal", name), now=self._escalation.count > 1))
            else:
                self._leave_at_once(name, 128 + number)

    def _leave_at_once(self, name: str, code: int) -> NoReturn:
        try:
            self._serving.end_processes()
            self.daemon.holdings.remove_nodes()
            log.warning(f"{name} again: flaskd ends at once")
            self.daemon.logs.flush(_LAST_WORDS)
        finally:
            os._exit(code)

    def _break_off(self, why: str) -> None:
        """Break off the start and end the process; events in the inbox are answered, but not carried out."""

        def take_away() -> None:
            self.daemon.notices.tell(BrokenOff(why))
            for event in self.daemon.inbox.rest():
                if isinstance(event, StopAsked):
                    event.reply.ok("stopped" if event.wait else "stopping")
                elif isinstance(event, Asked):
                    event.reply.error(NotNowError.code, f"cannot do that: flaskd is {State.STOPPING}")
            self._leave_nothing()

        if not self._start.break_off(take_away):
            self.daemon.ask(StopAsked(StopReason("signal", why)))

    # --- the end ----------------------------------------------------------------------------------------------------

    def _serve(self) -> int:
        """Run the daemon to its end, in the thread of the events; returns the exit code."""
        daemon = self.daemon
        daemon.turn()
        if not daemon.stopping.main_is_lost:
            return self._concluded()
        code = EX_LOST
        try:
            code = self._concluded()
            self._leave_nothing()
        finally:
            os._exit(code)

    def _concluded(self) -> int:
        """Write the record, answer the callers that wait for the stop, and return the exit code."""
        daemon = self.daemon
        account = daemon.stopping.conclude()
        assert daemon.configuration is not None
        degraded = daemon.configuration.values.shutdown.exit_codes.degraded
        code = EX_OK if account.report.clean else degraded
        if daemon.failure is not None:
            code = self._failed(daemon.failure)
        if self._ending is not None and not daemon.stopping.main_is_lost:
            self._ending.late_code = self._late_code(code or degraded)
        self._record(account)
        daemon.stopping.tell_the_end(account, failed=daemon.failure is not None)
        return code

    def _record(self, account: Account) -> None:
        daemon = self.daemon
        if self._ending is None or daemon.stopping.main_is_lost:
            daemon.holdings.state.record(account.record)
        else:
            prepared = daemon.holdings.state.prepare(account.record, unless=account.late_record)
            if prepared is not None:
                self._ending.settle, self._ending.unsettle = prepared

    def _end_the_app(self) -> None:
        """Run what the app has left to the process' end, in the main thread; events are still handled meanwhile."""
        ending, inbox = self._ending, self.daemon.inbox
        assert ending is not None
        ending.left = self.daemon.serving.left_for_the_exit()
        inbox.post(ExitBegan(ending.left))
        ending.run(cut=lambda unfinished: inbox.post(ExitOver(unfinished, cut=True)))
        inbox.post(ExitOver())

    def _leave_nothing(self) -> None:
        self.daemon.holdings.leave_nothing()
        self.daemon.logs.flush(_LAST_WORDS)
