"""The stop of a service with workers: the service's own steps, the stops of all workers, and one account of both."""

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
"""Seconds of the deadline that the supervisor keeps for itself: a worker that has not ended before is killed."""
_LAST = 0.4
"""Seconds in which killed processes are reaped."""
_LOOK = 0.5
"""Seconds after which the wait for workers checks again whether the stop was cut short."""


class ServiceStop:
    """The stop of a service. Methods run in the thread of the daemon's events, except where they say otherwise."""

    def __init__(self, pipeline: Pipeline, crew: Crew, sums: Sums, post: Callable[[ServingEvent], None]) -> None:
        self._pipeline, self._crew, self._sums, self._post = pipeline, crew, sums, post
        self._thread = CleanupThread()
        self._all_gone = threading.Event()
        self._workers_until = self._reserve = self._announce = 0.0
        self._ended: list[Handle] = []
        """The workers that have stopped with the service, or died during its stop."""

    @property
    def workers(self) -> list[Handle]:
        """The workers that have stopped with the service, or died meanwhile (any thread)."""
        return list(self._ended)

    def make_threads(self) -> None:
        """Start the thread of the stop now, because later no thread may be available; raises RuntimeError."""
        self._thread.start()

    def dismiss(self) -> None:
        """Let the thread of the stop end without a stop."""
        self._thread.dismiss()

    @property
    def stop(self) -> Stop:
        """The stop that has begun."""
        stop = self._pipeline.stop
        assert stop is not None
        return stop

    def begin(self, reason: StopReason, configuration: Configuration, plan: Plan, state: Path | None) -> str:
        """Begin the stop; returns the id of its plan."""
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
        """Carry out the stop, in the thread that `make_threads` has started."""

        def run() -> None:
            try:
                self.stop.run()
            finally:
                self._post(CleanupOver())

        self._thread.run(run)

    def _stop_workers(self) -> None:
        """Tell all workers to stop that have not been told yet."""
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
        """Seconds that the workers may still take."""
        return max(0.0, self._workers_until - time.monotonic())

    def _wait_for_workers(self) -> None:
        """Wait for the end of all workers, and kill those that have not ended in time (thread of the stop)."""
        while self._sums.alive and (seconds := self._left - _LAST) > 0:
            self._all_gone.wait(min(seconds, _LOOK))
        for worker in self._sums.alive:
            worker.kill("the stop of the service did not end in time")
        if self._sums.alive:
            self._all_gone.wait(_LAST)
        self.stop.heed([each for worker in self._ended for each in worker.results])

    def gone(self, worker: Handle) -> None:
        """Note that the process of a worker has ended."""
        if self._pipeline.stop is None:
            return
        if worker not in self._ended and (worker.ready_at or worker.cut):  # it ended before its stop was over
            self._ended.append(worker)
        if not self._sums.alive:
            self._all_gone.set()

    def ended(self, worker: Handle) -> None:
        """Note that the stop of a worker is over."""
        if self._pipeline.stop is not None:
            self._ended.append(worker)

    def hurry(self) -> None:
        """Cut the stop short: the workers have one second, and the supervisor `_MARGIN` and `_LAST` after that."""
        others = _MARGIN + _LAST
        self._pipeline.hurry(others=others)
        workers, _ = divided(HURRIED + others, 0.0, later=self.stop.plan.later)
        self._workers_until = min(self._workers_until, time.monotonic() + workers.deadline)
        for worker in self._sums.alive:
            if worker.phase is Phase.LEAVING:  # the others are told together with their stop
                worker.send(Hurry(self.stop.reason))

    @property
    def step_left(self) -> float:
        """Seconds that the drain and the present steps, here and in workers, may still take."""
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
    """The report of the drain, with what workers had to cut since then."""
    accounts = [each.account.report for each in workers if each.account is not None]
    cut = [each for account in accounts for each in account.cut if each not in report.cut]
    last = [each for account in accounts for each in account.background]
    known = {(each.name, each.thread) for each in last}  # work that has gone on since the drain
    before = [each for each in report.background if (each.name, each.thread) not in known]
    return replace(report, cut=(*report.cut, *cut), background=(*before, *last))


def _unfinished(worker: Handle) -> tuple[Unfinished, ...]:
    """What a worker could not finish; for a worker that ended without an account, how it ended."""
    where, code = f"worker {worker.slot}", worker.code
    if worker.account is None:
        return (Unfinished(f"{where}: {worker.how or 'it has not ended'}"),)
    left = worker.account.report.unfinished
    if code is None or code < 0 or code == EX_LATE:  # it ended before its finalizers had run
        left = (*left, Unfinished("finalizers"))
    return tuple(replace(each, name=f"{where}: {each.name}") for each in left)


def _of_worker(worker: Handle) -> dict[str, Any]:
    return {
        "slot": worker.slot, "generation": worker.generation, "pid": worker.pid, "code": worker.code,
        **({"died": worker.how} if worker.account is None else {}),
        **({"killed": worker.killed_for} if worker.killed_for else {}),
    }  # fmt: skip
