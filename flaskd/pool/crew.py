"""The crew: all workers of the service. It starts them, receives their messages, and deals with their deaths."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from flaskd.config import Configuration
from flaskd.errors import FlaskdError, NotNowError
from flaskd.ledger import Cut, DrainReport
from flaskd.lifecycle import StopReason
from flaskd.pool import messages as say
from flaskd.pool.deaths import Deaths, tell_failure
from flaskd.pool.early import Early
from flaskd.pool.handle import Handle, Phase
from flaskd.pool.recycling import Recycling
from flaskd.pool.renewals import Renewals
from flaskd.pool.schedulers import Schedulers
from flaskd.pool.slots import Slots
from flaskd.pool.sums import Sums
from flaskd.pool.template import Templates
from flaskd.pool.watch import Watch
from flaskd.serving.api import Outcome, ServingEvent, StepBegan, StepEnded, TroubleChanged, Work, WorkersStart
from flaskd.sockets import Address, Listener

log = logging.getLogger("flaskd.pool")

_KILLED_AFTER = 0.7
"""Seconds after the deadline of its stop at which a worker is killed."""
_AGAIN = 5.0
"""Seconds after which the log says again that workers are being started."""
_READERS = 5.0
"""Seconds until the board of a dead worker is closed; another thread may still be reading it."""


class Owner(Protocol):
    """What the crew reports to: the pool."""

    def ready(self) -> None:
        """Note that a worker has become ready."""

    def not_filled(self, error: FlaskdError) -> None:
        """Note that an empty slot could not be filled."""

    def closed(self, worker: Handle) -> None:
        """Note that a worker has closed its copies of the listeners that no other process shares."""

    def reported(self, worker: Handle, report: DrainReport) -> None:
        """Note that the drain of a worker is over."""

    def ended(self, worker: Handle) -> None:
        """Note that the stop of a worker is over."""

    def gone(self, worker: Handle, cut: tuple[Cut, ...]) -> None:
        """Note that the process of a worker has ended; `cut` are the requests that were in flight in it."""


class Crew:
    """All workers; methods run in the thread of the daemon's events, to which `post` and `post_at` bring events.

    `stop` asks for a stop of the service, and `open_endpoint` opens a shutdown endpoint, both for a worker's app.
    `early` are the processes for the first workers.
    """

    def __init__(
        self,
        owner: Owner,
        sums: Sums,
        post: Callable[[ServingEvent], None],
        post_at: Callable[[float, ServingEvent], None],
        *,
        name: str,
        stop: Callable[[StopReason], None],
        open_endpoint: Callable[[Address, bytes, Sequence[str]], Address],
        make: Callable[[int, int], Handle] = Handle,
        early: Sequence[Early] = (),
    ) -> None:
        self._owner, self._sums = owner, sums
        self._post, self._post_at = post, post_at
        self._name, self._ask_to_stop, self._open_endpoint = name, stop, open_endpoint
        self._make, self._early = make, list(early)
        self.slots = Slots(
            launch=self._launch,
            serve=self._serve,
            leave=self._leave,
            later=self.later,
            start_timeout=lambda worker: (worker.configuration or self.configuration).values.pool.start_timeout,
            failed=owner.not_filled,
        )
        self.state: Path | None = None
        """The state directory."""
        self.listeners: Sequence[Listener] = ()
        self.starting = True
        """Whether the service is not ready yet."""
        self.templates = Templates(self.later)
        self.renewals = Renewals(self.slots, post, self.do, self.later, settled=self.templates.keep_only)
        self.log_level = ""
        """The level that was asked for since the last configuration was taken; empty: the configuration's."""
        self._tells = False
        """Whether a repetition of the log line on starting workers is planned."""
        self._deaths, self._schedulers = Deaths(), Schedulers()
        self.watch = Watch(self.slots, config=lambda: self.configuration.values, later=self.later, replace=self.replace)
        self.recycling = Recycling(
            self.slots,
            sums,
            config=lambda: self.configuration.values,
            do=self.do,
            later=self.later,
            replace=self.replace,
            busy=lambda: self.renewals.under_way,
            changed=lambda: post(TroubleChanged()),
        )

    def do(self, work: Callable[[], None]) -> None:
        """Call `work` soon, in the thread of the events (any thread)."""
        self._post(Work(work))

    def later(self, seconds: float, work: Callable[[], None]) -> None:
        """Call `work` after `seconds`, in the thread of the events."""
        self._post_at(time.monotonic() + seconds, Work(work))

    # --- one worker ---------------------------------------------------------------------------------------------------

    @property
    def configuration(self) -> Configuration:
        """The configuration in force."""
        return self.renewals.configuration

    def _tell_of_starts(self) -> None:
        """Post that workers are being started: now, and every `_AGAIN` seconds until they are ready or fail."""
        coming = [each.coming for each in self.slots if each.coming is not None]
        if coming:
            left = max(0.0, max(each.late_at for each in self.slots) - time.monotonic())
            self._post(WorkersStart(len(coming), max(each.age for each in coming), left))
        if coming and not self._tells:
            self._tells = True
            self.later(_AGAIN, self._tell_again)

    def _tell_again(self) -> None:
        self._tells = False
        self._tell_of_starts()

    def _launch(self, slot: int, generation: int) -> Handle:
        configuration, path = self.renewals.configuration_of(generation), list(sys.path)
        template = self.templates.of(generation, configuration, os.environ, path)
        worker = self._make(slot, generation)
        worker.configuration = configuration
        begin = say.Begin(
            configuration, slot, generation, self._name, path, self.state, first=generation == 1 and self.starting
        )
        before = self.slots.slots[slot].worker

        def first() -> say.Begin:
            if before is not None:
                self._schedulers.pause(before, worker)
            return begin

        worker.start(
            os.environ,
            first,
            made=lambda worker: self.do(lambda: self.slots.made(worker)),
            heard=lambda worker, message, fds: self.do(lambda: self._heard(worker, message, fds)),
            gone=lambda worker: self.do(lambda: self._gone(worker)),
            template=template,
            early=self._taken_early(generation),
        )
        self._sums.add(worker)
        self.do(self._tell_of_starts)
        return worker

    def _taken_early(self, generation: int) -> Early | None:
        with contextlib.suppress(IndexError):
            return self._early.pop(0) if generation == 1 else None
        return None

    def end(self) -> None:
        """Start no more workers, and end the templates."""
        self.slots.end()
        self.templates.end()
        self.end_early()

    def end_early(self) -> None:
        """End the processes that were forked early and are not workers (any thread)."""
        with contextlib.suppress(IndexError):
            while True:
                self._early.pop().end()

    def _serve(self, worker: Handle) -> None:
        worker.send(say.Serve(self._passed()), [each.socket.fileno() for each in self.listeners])

    def resume(self, worker: Handle) -> None:
        """Have a drained worker serve again, on the present listeners."""
        worker.phase, worker.closed, worker.report = Phase.READY, False, None
        worker.send(say.Resume(self._passed()), [each.socket.fileno() for each in self.listeners])

    def drain(self, worker: Handle) -> None:
        """Tell a serving worker to drain."""
        worker.phase, worker.report = Phase.DRAINING, None
        worker.send(say.DrainNow())

    def _passed(self) -> tuple[say.Passed, ...]:
        return tuple(say.Passed.of(each) for each in self.listeners)

    def _heard(self, worker: Handle, message: Any, descriptors: Sequence[int]) -> None:  # noqa: C901, PLR0912 - cases
        """Deal with a message from a worker."""
        for each in descriptors:  # workers should not send any
            os.close(each)
        match message:
            case say.Loaded(target):
                worker.target = target
                if self.log_level:
                    worker.send(say.LogLevel(self.log_level))
                self.slots.loaded(worker)
            case say.IsReady():
                if self.slots.ready(worker):
                    log.info(f"{worker} is ready after {worker.age:.1f}s")
                    self.renewals.keep_up(worker)
                self._owner.ready()
            case say.NotReady(error):
                worker.error = error
            case say.Closed():
                worker.closed = True
                self.slots.left(worker)
                self._owner.closed(worker)
            case say.DrainOver() if not worker.closed:
                pass  # from a drain that resume has undone: a current one ends after the listeners are closed
            case say.DrainOver(report):
                worker.report = report
                if worker.phase is Phase.DRAINING:
                    worker.phase = Phase.DRAINED
                self._owner.reported(worker, report)
            case say.StepBegins(left, running):
                worker.step_until, worker.running = time.monotonic() + left, running
                if self.slots.ending:
                    self._post(StepBegan())
            case say.StepOver(result):
                worker.results.append(result)
                if self.slots.ending:  # a worker that is replaced logs its own steps
                    self._post(StepEnded(result))
            case say.ExitWaits(what):
                worker.exit_waits_for = what
            case say.Answer(number, value, error):
                worker.answer(number, value, error)
            case say.Wants(what="stop"):
                self._ask_to_stop(message.reason)
            case say.Wants(what="replace"):
                self.replace(worker, message.reason)
            case say.Leaves(reason):
                self._stops_by_itself(worker, reason)
            case say.OpenEndpoint():
                self._open_for(worker, message)
            case say.Ended(account):
                worker.account = account
                self._owner.ended(worker)

    def _stops_by_itself(self, worker: Handle, reason: StopReason) -> None:
        """Fill the slot of a worker that stops without being told to, as if its process had ended."""
        if worker.serves:
            log.warning(f"{worker} stops by itself ({reason}): its slot is filled again")
            why = f"it stopped by itself: {reason}"
            self._sums.note_death(worker, why, ())
            self.slots.lost(worker, why)

    def _open_for(self, worker: Handle, asked: say.OpenEndpoint) -> None:
        """Open a shutdown endpoint for a worker's app, and answer with its address or the error."""
        try:
            there = self._open_endpoint(asked.address, asked.token, asked.allowed_hosts)
        except FlaskdError as error:
            worker.send(say.Answer(asked.number, error=error))
        else:
            worker.send(say.Answer(asked.number, there))

    def _gone(self, worker: Handle) -> None:
        """Deal with the end of a worker's process, which was reaped."""
        how = worker.how = self._deaths.how(worker)
        cut = worker.cut = self._sums.gone(worker, f"its worker is gone: {how}")
        if cut or (worker.ready_at and worker.phase is not Phase.LEAVING):
            self._sums.note_death(worker, how, cut)
            self._deaths.tell(worker, how, cut)
        worker.give_up_questions()
        worker.hang_up()
        served = worker.serves
        self.slots.gone(worker)
        self._schedulers.gone(worker)
        if served and not self.slots.ending and not any(each.serves for each in self.slots.workers):
            log.error("no worker is ready: flaskd is not ready, and clients wait until there is one")
        self._owner.gone(worker, cut)
        self.later(_READERS, worker.close)

    def replace(self, worker: Handle, reason: StopReason, outcome: Outcome = lambda _: None) -> bool:
        """Begin to replace a serving worker, and call `outcome` at the end; returns False if it cannot begin now."""
        slot = self.slots.slots.get(worker.slot)
        if slot is None or slot.worker is not worker or slot.coming is not None or self.slots.ending:
            return False  # it is being replaced already, or has lost its place, or flaskd stops
        log.info(f"{worker} is replaced ({reason})")

        def told(error: FlaskdError | None) -> None:
            if isinstance(error, NotNowError):
                log.info(str(error))
            elif error is not None and not self.slots.ending:
                tell_failure(error)
            outcome(error)

        self.slots.replace(slot, self.slots.generation, reason, told)
        return True

    def _leave(self, worker: Handle, reason: StopReason) -> None:
        """Tell a worker to stop whose slot has another worker now."""
        shutdown = self.configuration.values.shutdown
        within = shutdown.deadline, shutdown.reserve, 0.0  # no announce: the service goes on
        self.stop(worker, say.StopNow(reason, within, leave=True))

    def stop(self, worker: Handle, order: say.StopNow) -> None:
        """Tell a worker to stop; if it has not ended when its time is over, kill it."""
        worker.phase = Phase.LEAVING
        worker.send(order)

        def late() -> None:
            if worker.alive:
                worker.kill("its stop did not end in time")

        self.later(order.within[0] + _KILLED_AFTER, late)
