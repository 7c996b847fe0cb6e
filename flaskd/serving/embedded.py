"""`ServerThread`: an app served by threads of this process, with the daemon's own pipeline for its stop."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self

from flaskd.cleanup import DiscoveryRun, Plan, StepResult, build_plan, with_callbacks
from flaskd.config import ShutdownConfig
from flaskd.errors import FlaskdError
from flaskd.ledger import DrainReport, InFlight
from flaskd.lifecycle import StopReason
from flaskd.process.descriptors import open_files
from flaskd.server import BehindProxies, WaitressThread, adjustments, limits
from flaskd.serving.configuration import read
from flaskd.serving.loading import check_servable
from flaskd.serving.pipeline import Pipeline
from flaskd.serving.stop import CleanupThread, Stop, serving
from flaskd.serving.wsgi import find_flask
from flaskd.sockets import Address, check_serving

if TYPE_CHECKING:
    from flaskd.server.werkzeug import WerkzeugThread

log = logging.getLogger("flaskd.thread")

_WORKERS_END, _STUCK_END = 1.0, 0.2
"""Seconds that the app's threads have to end: if all are idle, and if one is stuck in a request that was cut."""
_TURN = 0.2
"""Most seconds for which a wait does not let Python handle signals."""
_GRACES = {"keepalive_grace", "stream_grace"}
_ASKED = StopReason("control", "ServerThread.stop()")


class ServerThread:
    """Serves a WSGI app with threads of its own, for tests, scripts and embedding.

    ``start()`` returns once requests are served, or raises an error. ``stop()`` answers the requests in flight, runs
    the cleanup policies and the functions of `flaskd.on_stop`, and joins every thread. What else the app holds is left
    alone, unless ``cleanup.discovery`` is set. As a context manager it does both; it can be started again afterwards.
    ``join()`` waits until another thread has stopped it. Port 0 takes a free port, which ``url`` shows.

    `server` is ``waitress``, or ``werkzeug`` for Werkzeug's development server, which makes a thread for each
    connection whatever `threads` says. `config` is a mapping in the shape of the YAML file, or a path to one; its
    sections ``server``, ``shutdown`` and ``cleanup`` are used here, and with Waitress ``log.request_id``. `on_step` is
    called with each cleanup step's result. With `own_process` the whole process belongs to this server: at the stop,
    what the app holds is looked for and closed (as in the daemon), and if Python code cannot end the process, it is
    killed half a second after the deadline. Raises ConfigError for a wrong configuration, ValueError or TypeError for
    another wrong argument.
    """

    def __init__(
        self,
        app: Callable[..., Any],
        host: str = "127.0.0.1",
        port: int = 0,
        threads: int = 4,
        server: Literal["waitress", "werkzeug"] = "waitress",
        *,
        config: Mapping[str, object] | str | os.PathLike[str] | None = None,
        on_step: Callable[[StepResult], None] | None = None,
        own_process: bool = False,
    ) -> None:
        if server not in {"waitress", "werkzeug"}:
            raise ValueError(f'cannot serve with {server!r}: expected "waitress" or "werkzeug"')
        check_serving(host, port, threads)
        self._app = app
        self._address = Address(host, port)
        self._threads, self._kind = threads, server
        self._config = read(config).values
        self._on_step, self._own_process = on_step, own_process
        self._lock, self._over_lock = threading.Lock(), threading.Lock()
        self._pid = 0
        self._server: WaitressThread | WerkzeugThread | None = None
        self._pipeline: Pipeline | None = None
        self._cleanup_thread: CleanupThread
        self._stopped: Future[DrainReport]
        self._when_over: list[Callable[[], None]] | None = None
        self._endpoints = contextlib.ExitStack()
        self._pressed = False
        self._report: DrainReport | None = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> Self:
        """Bind, listen and serve; returns once requests are accepted and a thread of the pool has run.

        Raises CannotCreateError if the address cannot be bound, ConfigError if a policy cannot be prepared or the app
        cannot be served, and any other error that keeps it from serving.
        """
        check_servable(self._app)
        with self._lock:
            if self._is_ours and not self._stopped.done():
                raise FlaskdError("cannot start: this server is running; stop it first, or make another one")
            self._plan = build_plan(self._config.cleanup)
            self._plan.prepare()
            self._pid, self._report, self._pressed = os.getpid(), None, False
            self._stopped, self._when_over = Future(), []
            self._cleanup_thread = CleanupThread()
            self._cleanup_thread.start()
            self._server = self._new_server()  # from now on a request may stop it
            self._pipeline = Pipeline(self._server)
            if (app := find_flask(self._app)) is not None:
                self._endpoints.enter_context(serving(app, self))
            try:
                self._server.start()
            except BaseException:
                self._server = self._pipeline = None
                self._endpoints.close()
                self._cleanup_thread.dismiss()
                raise
        return self

    @property
    def _is_ours(self) -> bool:
        """Whether it was started by this process, not by the one that forked this one."""
        return self._server is not None and self._pid == os.getpid()

    def _new_server(self) -> WaitressThread | WerkzeugThread:
        if self._kind == "werkzeug":
            return _werkzeug_thread(self._app, self._address)
        drain, server = self._config.shutdown.drain, self._config.server
        # The graces of clients are shorter than in production, unless configured: tests should not wait.
        more = {"limits": limits(server)} | {name: getattr(drain, name) for name in drain.model_fields_set & _GRACES}
        return WaitressThread(
            BehindProxies(self._app, server),
            self._address.host,
            self._address.port,
            self._threads,
            backlog=server.backlog,
            adjustments=adjustments(server, open_files.limit()),
            ids=self._config.log.request_id,
            served_by=self._config.served_by,
            **more,
        )

    @property
    def _serving(self) -> Pipeline:
        if self._pipeline is None:
            raise FlaskdError("cannot do that: this server has not been started")
        return self._pipeline

    @property
    def _stop(self) -> Stop | None:
        return self._pipeline.stop if self._pipeline is not None else None

    @property
    def addresses(self) -> list[Address]:
        """The address that it listens on; after the start, port 0 is replaced by the real port."""
        return self._server.addresses if self._server is not None else [self._address]

    @property
    def url(self) -> str:
        """The URL that it serves, ending in a slash."""
        return self.addresses[0].url

    @property
    def port(self) -> int:
        """The port that it listens on; 0 if it is chosen at the start."""
        return self.addresses[0].port

    @property
    def in_flight(self) -> int:
        """How many requests were accepted and are not yet completely answered."""
        return self._server.in_flight if self._server is not None else 0

    def requests(self) -> list[InFlight]:
        """The requests in flight, oldest first."""
        return self._server.requests() if self._server is not None else []

    def app_threads(self) -> list[threading.Thread]:
        """The threads that run the app and have not ended; after a stop, those that did not end in time."""
        return self._server.app_threads() if self._server is not None else []

    def left_behind(self) -> dict[threading.Thread, InFlight]:
        """The threads that still run a request that is over, because a drain cut it or ended its stream."""
        return self._server.left_behind() if self._server is not None else {}

    @property
    def report(self) -> DrainReport | None:
        """The report of the last drain or stop since the start; None if there was none."""
        return self._report

    @property
    def policies(self) -> dict[str, dict[str, Any]]:
        """The result of each cleanup step of the last stop, by name."""
        return self._stop.policies if self._stop is not None else {}

    def drain(self, timeout: float | None = None) -> DrainReport:
        """Take no new work, finish the requests in hand within `timeout` seconds, and report how they ended.

        The default is ``shutdown.drain.timeout`` (15 s unless configured). The threads stay; `resume` undoes it. Raises
        FlaskdError inside of a request of this server, because the drain would wait for that request.
        """
        serving = self._serving
        if threading.current_thread() in self.app_threads():
            raise FlaskdError(
                "cannot drain: this is a request that the drain would wait for; call it in another thread, or call "
                "stop(), which does not wait here"
            )
        drain = serving.begin_drain(self._config.shutdown.drain.timeout if timeout is None else timeout)
        report = self._report = drain.wait()
        assert report is not None
        return report

    def resume(self) -> None:
        """Serve again after a drain, at the same address; raises CannotCreateError if that cannot be bound again."""
        serving = self._serving
        if self._server is not None:
            self._server.resume()
        serving.undo_drain()

    def stop(self, timeout: float | None = None, *, reason: StopReason = _ASKED) -> DrainReport:
        """Drain, run the cleanup steps, join every thread; a second call waits for the first, and returns its report.

        The stop takes at most `timeout` seconds, by default ``shutdown.deadline`` (25 s unless configured). Inside of a
        request of this server or a cleanup step of its stop, for which the stop waits, this begins the stop and returns
        at once, with the report so far. If the wait is interrupted, for example by Ctrl-C, the stop is cut short as by
        `hurry`. In a forked child it does nothing, because the child does not have the server's threads.
        """
        server = self._server
        if server is None or not self._is_ours:
            return DrainReport()
        end, here = partial(self._end, server, timeout, reason), threading.current_thread()
        try:
            self._cleanup_thread.run(end)
            if here in server.app_threads() or (self._stop is not None and self._stop.runs_in(here)):
                return self._stop.report if self._stop is not None else DrainReport()
            self._wait()
        except BaseException:
            self._cleanup_thread.run(end)  # the first call may have been interrupted
            self.hurry()
            self._wait()
            raise
        self._cleanup_thread.join()
        return self._stopped.result()

    def join(self, timeout: float | None = None) -> None:
        """Wait at most `timeout` seconds (None: without limit) until another thread has stopped it."""
        if self._is_ours and self._wait(timeout):
            self._cleanup_thread.join()

    def _wait(self, timeout: float | None = None) -> bool:
        """Wait at most `timeout` seconds for the end of the stop; returns whether it is over.

        The wait is in turns of `_TURN` seconds: Python handles a signal that came just before the wait for a lock only
        after that wait, and on Windows this is so for every signal.
        """
        until = math.inf if timeout is None else time.monotonic() + timeout
        while not self._stopped.done() and (left := until - time.monotonic()) > 0:
            wait([self._stopped], min(left, _TURN))
        return self._stopped.done()

    def stop_for(self, reason: StopReason, over: Callable[[], None]) -> bool:
        """Begin the stop for a shutdown endpoint of the app; see `flaskd.serving.stop.Serves`."""
        server = self._server
        with self._over_lock:
            if server is None or self._when_over is None:
                return False
            self._when_over.append(over)
        self._cleanup_thread.run(partial(self._end, server, None, reason))
        return True

    def describe_stop(self) -> dict[str, Any]:
        """The answer of a shutdown endpoint of the app: the stop to come or under way."""
        plan = self._stop.plan if self._stop is not None else self._whole_plan()
        return {"plan": plan.id, "steps": plan.describe(), "in_flight": self.in_flight}

    def left_for_the_exit(self) -> Callable[[], float]:
        """A function that returns how many seconds are left for what the app has left to the process' end."""
        return self._stop.left_for_the_exit() if self._stop is not None else lambda: 0.0

    def hurry(self) -> None:
        """Cut a stop under way short: its drain ends now, all remaining cleanup has one second (any thread)."""
        if self._when_over is None:
            return
        self._pressed = True
        if self._pipeline is not None:
            self._pipeline.hurry()

    def _end(self, server: WaitressThread | WerkzeugThread, timeout: float | None, reason: StopReason) -> None:
        """Carry out the stop, in a thread of its own: it goes on even if its caller stops waiting."""
        with contextlib.ExitStack() as after:
            try:
                self._report = self._run_stop(server, timeout, reason)
                after.callback(self._stopped.set_result, self._report)
            except BaseException as error:  # noqa: BLE001 - raised in the waiting thread
                after.callback(self._stopped.set_exception, error)
            with self._over_lock:
                when_over, self._when_over = self._when_over or [], None
            self._endpoints.close()
            for over in when_over:
                after.callback(over)

    def _whole_plan(self) -> Plan:
        return with_callbacks(self._plan, find_flask(self._app), timeout=self._config.cleanup.defaults.timeout)

    def _run_stop(
        self, server: WaitressThread | WerkzeugThread, timeout: float | None, reason: StopReason
    ) -> DrainReport:
        cleanup, app = self._config.cleanup, find_flask(self._app)
        plan = self._whole_plan()
        # The app outlives a server in a thread, so what it holds is left alone unless that was asked for.
        asked = (self._own_process or "discovery" in cleanup.model_fields_set) and cleanup.discovery.mode == "auto"
        discovery = DiscoveryRun(app) if asked or any(each.takes for each in plan.steps) else None
        if not asked:
            off = cleanup.discovery.model_copy(update={"mode": "off"})
            cleanup = cleanup.model_copy(update={"discovery": off})
        stop = self._serving.begin_stop(
            reason,
            plan=plan,
            app=app,
            shutdown=_shutdown(self._config.shutdown, timeout, cleanup=asked or bool(plan.steps)),
            cleanup=cleanup,
            discovery=discovery,
            spare=self._cleanup_thread.spare,
            on_step=self._on_step,
        )
        if self._own_process:
            stop.arm()
        if self._pressed:
            self.hurry()
        if isinstance(server, WaitressThread):  # Werkzeug's closes each connection anyway
            server.announce()
        try:
            stop.run()
        finally:
            # Threads of cut requests may never end, and are not waited for; all others end soon.
            server.end(_WORKERS_END if stop.report.clean else _STUCK_END)
        return stop.report.with_unfinished(stop.cut_work())


def _shutdown(shutdown: ShutdownConfig, timeout: float | None, *, cleanup: bool) -> ShutdownConfig:
    """The times of the stop: as configured, or `timeout` seconds for the whole stop.

    Of `timeout`, the cleanup has as much as the configuration leaves for it, at most two fifths (as by default), and
    nothing if there is nothing to clean up; the drain has the rest.
    """
    if timeout is None:
        return shutdown if cleanup else shutdown.model_copy(update={"reserve": 0.0})
    share = min(max(shutdown.reserve, shutdown.deadline - shutdown.drain.timeout), timeout * 2 / 5) if cleanup else 0.0
    return shutdown.model_copy(
        update={
            "deadline": timeout,
            "reserve": min(shutdown.reserve, share / 2),
            "drain": shutdown.drain.model_copy(update={"timeout": timeout - share}),
        }
    )


def _werkzeug_thread(app: Callable[..., Any], address: Address) -> WerkzeugThread:
    from flaskd.server.werkzeug import WerkzeugThread  # noqa: PLC0415 - 4 MiB of memory, which a supervisor does not need

    return WerkzeugThread(app, address)
