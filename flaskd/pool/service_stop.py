"""The stop of a service with workers: its own steps around the stops of all workers, and one account of both."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flaskd.cleanup import Plan, divided
from flaskd.config import Configuration
from flaskd.ledger import DrainReport
from flaskd.lifecycle import StopReason
from flaskd.pool.crew import Crew
from flaskd.pool.handle import Handle, Phase
from flaskd.pool.messages import Hurry, StopNow
from flaskd.pool.spawn import EX_LATE
from flaskd.pool.sums import Sums, all_steps
from flaskd.process.exit import Unfinished
from flaskd.serving.api import Account, CleanupOver, ServingEvent, StepBegan, StepEnded
from flaskd.serving.pipeline import Pipeline
from flaskd.serving.stop import HURRIED, CleanupThread, Stop

_MARGIN = 0.7
"""Seconds of the deadline that are the supervisor's own: a worker that has not ended by then is killed."""
_LAST = 0.4
"""Seconds that killed processes have to be reaped."""
_LOOK = 0.5
"""Seconds after which a wait looks whether the stop is in a hurry."""


class ServiceStop:
    """The one stop of a service, in the thread of the daemon's events except where it says otherwise."""

    def __init__(self, pipeline: Pipeline, crew: Crew, sums: Sums, post: Callable[[ServingEvent], None]) -> None:
        self._pipeline, self._crew, self._sums, self._post = pipeline, crew, sums, post
        self._thread = CleanupThread()
        self._all_gone = threading.Event()
        self._workers_until = self._reserve = self._announce = 0.0
        self._ended: list[Handle] = []
        """The workers that have stopped with the service, or died meanwhile."""

    def make_threads(self) -> None:
        """Start the thread of the stop while one can be had; raises RuntimeError."""
        self._thread.start()

    def dismiss(self) -> None:
        """Let the thread end without a stop."""
        self._thread.dismiss()

    @property
    def stop(self) -> Stop:
        """The stop that has begun."""
        stop = self._pipeline.stop
        assert stop is not None
        return stop

    def begin(self, reason: StopReason, configuration: Configuration, plan: Plan, state: Path | None) -> str:
        """Make the stop, and give the id of its plan."""
        config = configuration.values
        workers, own = divided(config.shutdown.deadline, config.shutdown.reserve, later=plan.later)
        self._workers_until, self._reserve = time.monotonic() + workers.deadline, workers.reserve
        self._announce = config.shutdown.announce

        stop = self._pipeline.begin_stop(
            reason,
            plan=plan,
            app=None,
            shutdown=config.shutdown,
            cleanup=config.cleanup,
            announce=config.shutdown.announce,
            state=state,
            spare=self._thread.spare,
            on_step=lambda result: self._post(StepEnded(result)),
            on_begin=lambda: self._post(StepBegan()),
            drain_began=lambda: self._crew.do(self._stop_workers),
            after_drain=self._wait_for_workers,
            times=own,
        )
        stop.arm()
        return stop.plan.id

    def run(self) -> None:
        """Carry it out in the thread that was made in time."""

        def run() -> None:
            try:
                self.stop.run()
            finally:
                self._post(CleanupOver())

        self._thread.run(run)

    def _stop_workers(self) -> None:
        """Tell all workers to stop that were not told yet."""
        for worker in self._crew.slots.workers:
            if worker.phase is not Phase.LEAVING:
                stop = self.stop
                deadline = max(0.0, self._left - _MARGIN)
                announce = 0.0 if stop.hurried else max(0.0, self._announce - stop.took)
                self._crew.stop(worker, StopNow(stop.reason, (deadline, self._reserve, announce), leave=False))
                if stop.hurried:
                    worker.send(Hurry(stop.reason))

    @property
    def _left(self) -> float:
        """Seconds that workers may still take."""
        return max(0.0, self._workers_until - time.monotonic())

    def _wait_for_workers(self) -> None:
        """Wait for the end of all workers (the thread of the stop); those that have not ended in time are killed."""
        while self._sums.alive and (seconds := self._left - _LAST) > 0:
            self._all_gone.wait(min(seconds, _LOOK))
        for worker in self._sums.alive:
            worker.kill("the stop of the service did not end in time")
        if self._sums.alive:
            self._all_gone.wait(_LAST)
        self.stop.heed([each for worker in self._ended for each in worker.results])

    def gone(self, worker: Handle) -> None:
        """The process of a worker has ended."""
        if self._pipeline.stop is None:
            return
        if worker not in self._ended and (worker.ready_at or worker.cut):  # it was killed, or died
            self._ended.append(worker)
        if not self._sums.alive:
            self._all_gone.set()

    def ended(self, worker: Handle) -> None:
        """The stop of a worker is over."""
        if self._pipeline.stop is not None:
            self._ended.append(worker)

    def hurry(self) -> None:
        """Cut it short."""
        others = _MARGIN + _LAST  # workers have the second
        self._pipeline.hurry(others=others)
        workers, _ = divided(HURRIED + others, 0.0, later=self.stop.plan.later)
        self._workers_until = min(self._workers_until, time.monotonic() + workers.deadline)
        for worker in self._sums.alive:
            if worker.phase is Phase.LEAVING:  # the others hear it when they are told to stop
                worker.send(Hurry(self.stop.reason))

    @property
    def step_left(self) -> float:
        """Seconds that the drain and the steps that run now, here and in workers, may still take."""
        drain, now = self._pipeline.drain, time.monotonic()
        steps = max((each.step_until - now for each in self._sums.alive), default=0.0)
        return max(drain.left if drain is not None else 0.0, self.stop.step_left, steps)

    def account(self, unfinished: tuple[Unfinished, ...]) -> Account:
        """The account of the whole stop."""
        workers, stop = sorted(self._ended, key=lambda each: (each.slot, each.generation)), self.stop
        left = tuple(each for worker in workers for each in _unfinished(worker))
        report = _whole(stop.account(left + stop.cut_work() + unfinished), workers)
        late = report.with_unfinished((Unfinished("finalizers"),))
        steps = {**all_steps(workers), **stop.policies}
        more = {"policies": steps, "workers": [_of_worker(each) for each in workers]}
        record, late_record = ({**stop.record(each), **more} for each in (report, late))
        return Account(report, record, late_record, steps)


def _whole(report: DrainReport, workers: Sequence[Handle]) -> DrainReport:
    """The report of a drain that was over before the stop, with what workers had to leave since then."""
    accounts = [each.account.report for each in workers if each.account is not None]
    cut = [each for account in accounts for each in account.cut if each not in report.cut]
    last = [each for account in accounts for each in account.background]
    known = {(each.name, each.thread) for each in last}  # it has gone on since the drain
    before = [each for each in report.background if (each.name, each.thread) not in known]
    return replace(report, cut=(*report.cut, *cut), background=(*before, *last))


def _unfinished(worker: Handle) -> tuple[Unfinished, ...]:
    """What a worker could not finish; one that is gone without an account may have had anything."""
    where, code = f"worker {worker.slot}", worker.code
    if worker.account is None:
        return (Unfinished(f"{where}: {worker.how or 'it has not ended'}"),)
    left = worker.account.report.unfinished
    if code is None or code < 0 or code == EX_LATE:  # it was gone before the interpreter's end was over
        left = (*left, Unfinished("finalizers"))
    return tuple(replace(each, name=f"{where}: {each.name}") for each in left)


def _of_worker(worker: Handle) -> dict[str, Any]:
    return {
        "slot": worker.slot, "generation": worker.generation, "pid": worker.pid, "code": worker.code,
        **({"died": worker.how} if worker.account is None else {}),
        **({"killed": worker.killed_for} if worker.killed_for else {}),
    }  # fmt: skip
