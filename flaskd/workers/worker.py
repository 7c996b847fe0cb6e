"""A worker of the pool: a daemon without control nodes and listeners of its own, which a supervisor directs by wire."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from flaskd.boot import Boot
from flaskd.config import Config
from flaskd.daemon import Daemon
from flaskd.errors import FlaskdError
from flaskd.holdings import Holdings, Plane, put_away
from flaskd.ledger import be_worker
from flaskd.lifecycle import State, StopReason
from flaskd.notices import BecameReady, DrainEnded, Notice, Progress, StepDone, StepsTake, StopBegan
from flaskd.pool import messages as say
from flaskd.pool.spawn import EX_LATE, STACKS
from flaskd.pool.wire import Wire
from flaskd.process.bootstrap import heed_as_worker, open_standard_streams
from flaskd.process.exit import Ending, leave
from flaskd.process.forks import forgotten_by_children
from flaskd.server import Board
from flaskd.serving import launch
from flaskd.serving.api import Account
from flaskd.serving.inprocess import AsWorker
from flaskd.serving.loading import LoadedApp
from flaskd.snapshot import Held
from flaskd.sockets import Address
from flaskd.systemd.store import Store
from flaskd.workers.link import Link

if TYPE_CHECKING:
    from flaskd.admin.endpoint.server import EndpointServer
    from flaskd.pool.pool import Pool

log = logging.getLogger("flaskd.daemon")

_NOT_OURS = (
    "NOTIFY_SOCKET",
    "WATCHDOG_USEC",
    "WATCHDOG_PID",
    "LISTEN_FDS",
    "LISTEN_PID",
    "LISTEN_FDNAMES",
    "LISTEN_PIDFDID",
)
"""Environment variables that are meant for the supervisor alone."""
_ENDPOINT = 5.0
"""Seconds that the supervisor has to open a shutdown endpoint."""


class WorkerBoot(Boot):
    """Runs one worker in this process."""

    _is_worker = True

    def __init__(self, link: Link, board: Board, ending: Ending, app: LoadedApp | None) -> None:
        self._link, self._board, self._preloaded = link, board, app
        environ = {name: value for name, value in os.environ.items() if name not in _NOT_OURS}
        super().__init__(
            lambda: link.configuration, plane=self._plane, name=link.begin.name, environ=environ, app=app, ending=ending
        )
        self.daemon.reload.is_workers = True
        self.daemon.logs.always = {"worker": link.begin.slot}

    def _plane(self, daemon: Daemon) -> Plane:
        self._link.serve(daemon)
        return self._link

    def _holdings(self, daemon: Daemon, plane: Plane, name: str, environ: Mapping[str, str]) -> Holdings:
        return WorkerHoldings(plane, self._link, daemon, name, environ, forked=self._preloaded is not None)

    def _as_worker(self) -> AsWorker:
        link = self._link
        return AsWorker(
            self._board, lambda: link.listeners, closed=lambda: link.tell(say.Closed()), first=link.begin.first
        )

    def _readiness(self, daemon: Daemon) -> tuple[str, str]:
        """The readiness of the service, which does not change when this worker alone drains or stops."""
        if self._link.announced:
            return daemon.readiness(State.STOPPING)
        match daemon.state:
            case State.READY | State.RELOADING if self._link.drains:
                return daemon.readiness(State.DRAINING)
            case State.DRAINING | State.DRAINED if not self._link.drains:
                return daemon.readiness(State.READY)
            case State.STOPPING if self._link.leaves:
                return daemon.readiness(State.READY)
        return daemon.readiness()

    def _signalled(self, number: int) -> None:
        """Have this worker replaced at SIGTERM. A terminal sends Ctrl-C to all processes; the supervisor handles it."""
        if number == signal.SIGTERM:
            self._link.want("replace", StopReason("recycle", "SIGTERM"))
        elif number == 0 and self._start.breakable:
            self._break_off("asked to stop")

    def _loaded(self, app: LoadedApp | Pool) -> None:
        """Report that the app is loaded, and wait for the listeners; a stop meanwhile ends the process."""
        if self._link.begin.slot == 0 and self._preloaded is None:  # a template has logged it already
            app.tell()
        self._link.tell(say.Loaded(str(self.daemon.serving.target)))
        self._link.passed.wait()
        self.daemon.holdings.listeners[:] = self._link.listeners

    def _heard(self, notice: Notice) -> None:
        """Send a notice to the supervisor, which logs it; here it is logged at level debug only."""
        log.debug("%s", notice)
        match notice:
            case BecameReady():
                self._link.tell(say.IsReady())
            case DrainEnded(report=report):
                self._link.tell(say.DrainOver(report))
            case StopBegan(reason):
                self._link.stops(reason)
            case Progress():
                if waits := self.daemon.stopping.exit_waits_for:
                    self._link.tell(say.ExitWaits(waits))
            case StepsTake(seconds):
                self._link.tell(say.StepBegins(seconds, self.daemon.serving.snapshot().cleanup))
            case StepDone(result):
                self._link.tell(say.StepOver(result))

    def _late_code(self, code: int) -> int:  # noqa: ARG002
        """The exit code that tells the supervisor that finalizers were cut."""
        return EX_LATE

    def _failed(self, error: FlaskdError) -> int:
        """Send a failure to the supervisor, which logs it and decides whether the service goes on."""
        self._link.tell(say.NotReady(error))
        return error.exit_code

    def _record(self, account: Account) -> None:
        """Send the account of the stop to the supervisor, which writes the record."""
        self._link.tell(say.Ended(account))


class WorkerHoldings(Holdings):
    """What a worker holds beside the app: the listeners that it was given."""

    def __init__(
        self, plane: Plane, link: Link, daemon: Daemon, name: str, environ: Mapping[str, str], *, forked: bool
    ) -> None:
        super().__init__(
            plane,
            daemon,
            name,
            environ,
            describe_stop=lambda: daemon.serving.describe_stop(),  # noqa: PLW0108 - `serving` is set later
            stop=self._ask,
        )
        self._link, self._forked = link, forked
        self.state = WorkerState(link.begin.state)  # type: ignore[assignment]

    def _ask(self, reason: StopReason) -> None:
        self._link.want("stop", reason)

    def open(self, config: Config, store: Store, stack: ExitStack) -> None:  # noqa: ARG002 - it stores nothing
        """Begin to listen to the supervisor; it passes the listeners once the app is loaded."""
        stack.callback(put_away, self.plane.close)
        self.plane.open(config, [])
        stack.callback(put_away, self.close_listeners)
        if not self._forked:  # a forked worker is where the template was; the app may have changed that on import
            launch.change_directory(config.app)

    def snapshot(self) -> Held:
        """An empty snapshot: only the supervisor shows what flaskd holds."""
        return Held()

    def tell(self) -> None:
        """Do nothing: the supervisor logs the addresses."""

    def open_endpoint(self, address: Address, token: bytes, allowed_hosts: Sequence[str]) -> EndpointServer:
        """Have the supervisor open the endpoint, once for all workers; raises the supervisor's error."""
        from flaskd.admin.endpoint.server import EndpointServer  # noqa: PLC0415 - few apps have an endpoint

        there = self._link.open_endpoint(address, token, tuple(allowed_hosts), _ENDPOINT)
        return EndpointServer(there, token, allowed_hosts=allowed_hosts, plan=dict, stop=lambda _: None)


class WorkerState:
    """The service's state directory, in which a worker keeps its cache; the supervisor writes record and mark."""

    previous = None

    def __init__(self, path: Path | None) -> None:
        self.writable = path

    def stopping(self, reason: str) -> None:
        """Do nothing: the supervisor notes the stop."""

    def record(self, entry: Mapping[str, Any]) -> None:
        """Do nothing: the supervisor writes the record."""

    def close(self) -> None:
        """Do nothing: a worker holds no lock."""

    def forget(self) -> None:
        """Do nothing: a worker holds no lock."""


def main(wire: int, board: int, stacks: int) -> None:
    """Run a worker in this process, on the descriptors that it was started with."""
    open_standard_streams()
    heed_as_worker()
    look_for_garbage()
    serve(wire, board, stacks)


def look_for_garbage() -> None:
    """Switch garbage collection on, which was off for flaskd's imports; their objects count as old ones."""
    gc.freeze()
    gc.unfreeze()
    gc.enable()


def serve(wire: int, board: int, stacks: int, app: LoadedApp | None = None) -> NoReturn:
    """Be a worker until the process ends; `app` is given if a template imported it before the fork."""
    for each in (wire, board, stacks):
        os.set_inheritable(each, False)
    faulthandler.register(STACKS, file=stacks, all_threads=True, chain=False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (STACKS,))
    mine = Board.attach(board)

    def forget() -> None:
        """In a child that the app forked, close what the worker shares with the supervisor."""
        faulthandler.unregister(STACKS)
        os.close(stacks)
        mine.close()

    end = Wire(socket.socket(fileno=wire))
    end.greet()
    begin, _ = end.receive()
    if app is None:
        sys.path[:] = begin.path
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(f"flaskd-worker-{begin.slot}", encoding="ascii")
    ending = Ending()
    be_worker(begin.slot)
    with forgotten_by_children(forget):
        code = WorkerBoot(Link(end, begin), mine, ending, app).run(last=True)
        end.keep_open()
        leave(code, ending)
