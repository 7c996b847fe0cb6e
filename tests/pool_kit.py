"""A pool without processes: workers whose messages the test sends, and a clock that the test sets."""

# ruff: noqa: SLF001 - the kit of the room's own tests

from __future__ import annotations

import contextlib
import heapq
import itertools
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

from flaskd.config import Configuration, load_mapping
from flaskd.errors import CannotCreateError, FlaskdError
from flaskd.ledger import DrainReport
from flaskd.lifecycle import StopReason
from flaskd.pool import messages as say
from flaskd.pool.handle import Handle, Phase
from flaskd.pool.pool import Pool
from flaskd.pool.slots import Slots
from flaskd.server.request import Request
from flaskd.serving.api import Account, CleanupOver, ServingEvent, Work, WorkersStart
from flaskd.sockets import Listener

WITH_LISTENERS = {Phase.STARTING, Phase.READY, Phase.DRAINING, Phase.DRAINED}
"""The phases of a worker that has listeners and was not told to stop."""


def configuration(workers: int = 2, **keys: Any) -> Configuration:
    """A configuration with so many workers; keys of sections are given as ``pool={"surge": 2}``."""
    return load_mapping({"server": {"workers": workers}, **keys}, actions={}, environ={})


class FakeWorker(Handle):
    """A worker without a process: the test sends its messages; `step` does what it would do next by itself."""

    def __init__(self, slot: int, generation: int, world: World) -> None:
        super().__init__(slot, generation)
        self._world = world
        self.told: list[Any] = []
        """The messages that it was sent, in order."""
        self.to_do: list[Callable[[], None]] = []
        self.asked_for_stacks = 0
        self._ids = itertools.count(1)
        self._on_board: list[Request] = []

    def start(  # type: ignore[override]
        self, environ: Any, first: Any, *, made: Any, heard: Any, gone: Any, template: Any, early: Any
    ) -> None:
        self.early = early
        if self._world.no_more:
            self.close()
            raise CannotCreateError("cannot start a worker: there is no memory")
        self._made, self._heard, self._gone = made, heard, gone
        self.pid = next(self._world.pids)
        self._world.made.append(self)
        self.told.append(first())
        self.to_do.append(lambda: self.says(say.Loaded("shop:app")))
        if self._world.forks:
            self.is_made()

    def send(self, message: Any, descriptors: Sequence[int] = ()) -> bool:
        if self.code is not None:
            return False
        self.told.append(message)
        match message:
            case say.Serve():
                self.to_do.append(lambda: self.says(say.IsReady()))
            case say.DrainNow():
                self.to_do += [lambda: self.says(say.Closed()), self._drained]
            case say.CloseListeners():
                self.to_do.append(lambda: self.says(say.Closed()))
            case say.StopNow(leave=leave):
                if leave:
                    self.says(say.Closed())
                self.to_do += [self._drained, self._stopped, lambda: self.dies(0)]
            case say.PauseSchedulers(number):
                self.answer(number, None, None)
            case say.Renew(number):
                self.to_do.append(lambda: self.says(say.Answer(number)))
        return True

    def _drained(self) -> None:
        self.finish_all()
        if not self.closed:
            self.says(say.Closed())
        self.says(say.DrainOver(DrainReport()))

    def _stopped(self) -> None:
        self.says(say.Ended(Account(DrainReport(), {}, {}, {})))

    def kill(self, why: str) -> None:
        self.killed_for = self.killed_for or why
        self.to_do[:] = [lambda: self.dies(-signal.SIGKILL)]

    def ask_for_stacks(self) -> None:
        self.asked_for_stacks += 1

    def stacks(self) -> str:
        return "File shop.py, line 1 in slow"

    # --- what a test lets it do ---

    def is_made(self) -> None:
        """Its process exists."""
        self._made(self)

    def says(self, message: Any) -> None:
        """Send a message as the worker."""
        self._heard(self, message, [])

    def dies(self, code: int = -signal.SIGKILL) -> None:
        """End its process."""
        if self.code is None:
            self.to_do.clear()
            self.code = code
            self._gone(self)

    def fails(self) -> None:
        """Fail to become ready, and end."""
        self.says(say.NotReady(FlaskdError("cannot load shop:app")))
        self.dies(70)

    def stops_by_itself(self) -> None:
        """Stop by itself, as if the app had raised SystemExit: drain, and end."""
        self.to_do.clear()
        self.says(say.Leaves(StopReason("failure", "SystemExit")))
        self.to_do += [self._drained, self._stopped, lambda: self.dies(0)]

    def step(self) -> bool:
        """Do the next thing that it does by itself; returns whether there was one."""
        if not self.to_do or self.code is not None:
            return False
        self.to_do.pop(0)()
        return True

    def takes(self, path: str = "/") -> None:
        """Read a request."""
        request = Request(Channel(), None)
        request.id, request.command, request.request_uri, request.headers_finished = next(self._ids), "GET", path, True
        request.first_byte = request.complete = time.monotonic()
        self.board.enter(request)
        self._on_board.append(request)

    def answers(self, count: int) -> None:
        """Answer so many more requests."""
        for _ in range(count):
            self.takes()
        self.finish_all()

    def finish_all(self) -> None:
        """Answer all requests."""
        for each in self._on_board:
            self.board.counts.add(each, "completed", time.monotonic())
            self.board.leave(each)
        self._on_board.clear()


class Channel:
    """The part of a connection that a request uses."""

    internal, client, flushed = False, "127.0.0.1", 0

    def client_told_by(self, headers: Any) -> str:
        return ""


class World:
    """The thread of the events, its clock, and all workers that were made."""

    def __init__(self) -> None:
        self.made: list[FakeWorker] = []
        self.pids = itertools.count(1000)
        self.no_more = False
        """Whether no worker can be started."""
        self.forks = True
        """Whether a worker has its process at once; else it waits for a template, until the test calls `is_made`."""
        self.events: list[ServingEvent] = []
        """The events that the pool posted to its daemon, except those on the progress of starts."""
        self.hung: set[FakeWorker] = set()
        """The workers whose loops do not turn."""
        self.early: list[Any] = []
        """The processes that were forked early."""
        self.stops: list[Any] = []
        """The reasons for which workers' apps asked for a stop of the service."""
        self._posted: queue.SimpleQueue[ServingEvent] = queue.SimpleQueue()
        self._later: list[tuple[float, int, ServingEvent]] = []
        self._numbers = itertools.count()
        self._ahead = 0.0

    def post(self, event: ServingEvent) -> None:
        self._posted.put(event)

    def post_at(self, moment: float, event: ServingEvent) -> None:
        heapq.heappush(self._later, (moment, next(self._numbers), event))

    def _do(self, event: ServingEvent) -> None:
        if isinstance(event, Work):
            event.run()
        elif not isinstance(event, WorkersStart):
            self.events.append(event)

    def run(self) -> None:
        """Carry out all that is due; the loops of all workers turn."""
        for each in set(self.alive) - self.hung:
            each.board.turned(time.monotonic())
        while True:
            with contextlib.suppress(queue.Empty):
                while True:
                    self._do(self._posted.get_nowait())
            if not self._later or self._later[0][0] > time.monotonic():
                return
            self._do(heapq.heappop(self._later)[2])

    def advance(self, seconds: float) -> None:
        """Let time pass, and carry out all that becomes due, each at its moment."""
        self.run()
        until = time.monotonic() + seconds
        while self._later and self._later[0][0] <= until:
            self._ahead += max(0.0, self._later[0][0] - time.monotonic())
            self.run()
        self.sleep(until - time.monotonic())
        self.run()

    def sleep(self, seconds: float) -> None:
        """Let time pass while all processes are stopped."""
        self._ahead += max(0.0, seconds)

    def settle(self) -> None:
        """Let all workers do what they do by themselves, until nothing is left."""
        self.run()
        while sum(each.step() for each in self.made):
            self.run()

    @property
    def alive(self) -> list[FakeWorker]:
        """The workers that are not gone."""
        return [each for each in self.made if each.code is None]

    def pool(self, listeners: Sequence[Listener] = ()) -> Pool:
        """A pool with fake workers."""
        pool = Pool(
            self.post,
            self.post_at,
            name="flaskd",
            stop=self.stops.append,
            open_endpoint=lambda address, *_: address,
            idle_over=lambda: None,
            make=lambda slot, generation: FakeWorker(slot, generation, self),
            early=self.early,
        )
        pool._crew.listeners = listeners
        return pool

    def started(self, workers: int = 2, listeners: Sequence[Listener] = (), **keys: Any) -> Pool:
        """A pool whose workers are ready."""
        pool, config = self.pool(listeners), configuration(workers, **keys)
        pool.start(config)
        self.settle()
        pool.started(config)
        self.events.clear()
        return pool

    def worker(self, slot: int) -> FakeWorker:
        """The newest living worker of a slot."""
        return [each for each in self.alive if each.slot == slot][-1]


@contextlib.contextmanager
def world() -> Iterator[World]:
    """A world whose clock replaces time.monotonic(), in threads, too."""
    made, monotonic = World(), time.monotonic

    def now() -> float:
        return monotonic() + made._ahead

    with mock.patch.object(time, "monotonic", now):
        try:
            yield made
        finally:
            for each in made.made:
                each.close()


def slots_of(pool: Pool) -> Slots:
    """The slots of a pool."""
    return pool._crew.slots


def stop(world: World, pool: Pool, reason: Any) -> None:
    """Stop a pool completely; its workers do what they do by themselves."""
    pool.make_threads()
    with mock.patch("flaskd.serving.stop.Stop.arm"):  # the tests' own process must not end at that deadline
        pool.begin_stop(reason, pool._crew.configuration, None)
    pool.announce_stop()
    pool.run_stop()
    end = threading.Event()
    for _ in range(2000):
        world.settle()
        if any(isinstance(each, CleanupOver) for each in world.events):
            pool._service_stop.dismiss()
            return
        end.wait(0.001)
    raise AssertionError("the stop did not end")
