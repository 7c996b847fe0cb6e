"""One stop: its reason, its deadline, and the phases of its cleanup around the drain."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from flaskd.cleanup import (
    AFTER_THE_DRAIN,
    BEFORE_THE_DRAIN,
    BESIDE_THE_DRAIN,
    DiscoveryRun,
    Plan,
    Runner,
    Spare,
    StepResult,
    Times,
    results_as_json,
    with_found,
)
from flaskd.config import CleanupConfig, ShutdownConfig
from flaskd.ledger import DrainReport
from flaskd.lifecycle import StopReason
from flaskd.process.exit import Unfinished, stacks_go_to
from flaskd.process.forks import AppCode
from flaskd.server import Drain
from flaskd.units import timestamp

if TYPE_CHECKING:
    from flask import Flask

log = logging.getLogger("flaskd.stop")

HURRIED = 1.0
"""Seconds that all remaining cleanup gets after a second request to stop."""
_LAST_RESORT = 0.5
"""Seconds after the deadline at which faulthandler ends the process, even if the app holds the GIL."""
_FAREWELL = 0.25
"""Seconds before the deadline that are kept for the record and the last log lines: the app must have ended before."""
_HEAD_START = 0.02
"""Seconds that the drain has to close the gates, before the search for what the app holds takes the GIL."""
_FIRST_LOOK = 0.1
_SECOND_LOOK = 1.0
"""Seconds for which the stop waits for a search of what the app holds: at its begin, when a search of the start may
still run, and after the drain."""


class CleanupThread:
    """The thread that runs the stop; started before READY, because at the stop no thread may be available."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._wait, name="flaskd-cleanup", daemon=True)
        self.spare = Spare()
        """Another thread, for a step: the thread that waits for a step cannot run it."""

    def _wait(self) -> None:
        work = self._work.get()
        with AppCode():
            work()

    def start(self) -> None:
        """Start the thread and its spare; raises RuntimeError."""
        self.spare.start()
        try:
            self._thread.start()
        except RuntimeError:
            self.dismiss()
            raise

    def run(self, work: Callable[[], None]) -> None:
        """Give the thread its work, from any thread and any signal handler; only the first work given is done."""
        self._work.put(work)

    def dismiss(self) -> None:
        """Let the thread end without a stop."""
        self._work.put(lambda: None)
        self.join()

    def join(self) -> None:
        """Wait at most a second each for the threads to end, after their work."""
        self.spare.dismiss()
        for thread, wait in ((self._thread, True), (self.spare.thread, self.spare.free)):
            if thread.ident is not None and wait:
                thread.join(1)


class Serves(Protocol):
    """A server of an app in this process other than the daemon, which can be asked to stop."""

    def describe_stop(self) -> dict[str, Any]:
        """The answer of a shutdown endpoint: the stop to come or under way."""

    def stop_for(self, reason: StopReason, over: Callable[[], None]) -> bool:
        """Begin the stop, unless it has begun, and return at once; `over` is called at its end.

        Returns False, and does not call `over`, if the stop is over already.
        """


_serving: list[tuple[Flask, Serves]] = []


@contextlib.contextmanager
def serving(app: Flask, server: Serves) -> Iterator[None]:
    """While the block runs, a shutdown endpoint of the app stops this server."""
    _serving.append((app, server))
    try:
        yield
    finally:
        _serving.remove((app, server))


def who_serves(app: Flask) -> Serves | None:
    """The server in whose `serving` block the app is, the last one if there are several; None if there is none."""
    return next((server for each, server in reversed(_serving) if each is app), None)


class Stop:
    """Runs a cleanup plan and a drain, in the thread that calls `run`.

    `begin_drain` is called when it is time to drain; it returns the drain that it began, or one that had begun before.
    `after_drain` is called after the drain, and may wait. If the cleanup fails, that is logged, and the drain goes on
    to its end. `on_step` is called with each step's result, `on_begin` when a step has begun. `discovery` is the last
    search of what the app holds; a new search runs during the drain, and its results are added to the plan after it.
    Without `discovery` there is no search. `spare` is a thread for a step if no other thread is available.
    """

    def __init__(
        self,
        reason: StopReason,
        *,
        plan: Plan,
        app: Flask | None,
        shutdown: ShutdownConfig,
        cleanup: CleanupConfig,
        state: Path | None = None,
        begin_drain: Callable[[], Drain],
        after_drain: Callable[[], None] = lambda: None,
        on_step: Callable[[StepResult], None] | None = None,
        on_begin: Callable[[], None] | None = None,
        discovery: DiscoveryRun | None = None,
        spare: Spare | None = None,
        times: Times | None = None,
    ) -> None:
        self.reason = reason
        self.plan = plan
        """The plan of the policies and registered functions; the runner adds what the app is found to hold."""
        self.hurried = self._armed = False
        self._shutdown = shutdown
        self._discovery, self._app, self._cleanup = discovery, app, cleanup
        self._began = time.monotonic()
        self._deadline = self._began + self._shutdown.deadline
        self._begin_drain, self._after_drain = begin_drain, after_drain
        self._drain: Drain | None = None
        steps = (times or Times(shutdown.deadline, shutdown.reserve)).for_steps()
        self._ending = shutdown.deadline - steps.deadline
        self._runner = Runner(
            plan,
            app=app,
            reason=reason,
            deadline=self._began + steps.deadline,
            reserve=steps.reserve,
            kept=steps.kept,
            max_parallel=cleanup.max_parallel,
            state=state,
            on_progress=on_step,
            on_begin=on_begin,
            spare=spare,
        )

    def arm(self) -> None:
        """Make sure that the process ends `_LAST_RESORT` seconds after the deadline, whatever happens from now on."""
        self._armed = True
        try:
            faulthandler.dump_traceback_later(self.left + _LAST_RESORT, exit=True, file=stacks_go_to())
        except (RuntimeError, OSError) as error:  # no thread can be started: the deadline depends on Python code
            log.warning(f"cannot make sure that the process ends at the deadline: {error}")

    @property
    def left(self) -> float:
        """Seconds until the deadline, never below 0."""
        return max(0.0, self._deadline - time.monotonic())

    def left_for_the_exit(self) -> Callable[[], float]:
        """A function that returns how many seconds are left for what the app has left to the process' end."""
        until = time.monotonic() + self._shutdown.exit_wait
        return lambda: min(until, self._deadline - _FAREWELL) - time.monotonic()

    def cut_work(self) -> tuple[Unfinished, ...]:
        """The accepted work that its steps had to cut."""
        return tuple(Unfinished(f"{each.name}: {work}") for each in self._runner.results for work in each.cut)

    @property
    def took(self) -> float:
        """Seconds since the stop began."""
        return time.monotonic() - self._began

    @property
    def drain_time(self) -> float:
        """Seconds that a drain which begins now may take: its own timeout, at most what the deadline leaves for it.

        0 after `hurry`.
        """
        if self.hurried:
            return 0.0
        return max(0.0, min(self._shutdown.drain.timeout, self.left - self._ending - self._runner.kept))

    @property
    def report(self) -> DrainReport:
        """The report of the drain; an empty one before the drain is over."""
        return (self._drain.report if self._drain is not None else None) or DrainReport()

    def account(self, unfinished: tuple[Unfinished, ...]) -> DrainReport:
        """The report of the drain with other unfinished work, and with the seconds of the whole stop until now."""
        return replace(self.report.with_unfinished(unfinished), took=self.took)

    def heed(self, results: Iterable[StepResult]) -> None:
        """Take the results of steps in other processes into account; call this before the steps after the drain."""
        self._runner.heed(results)

    @property
    def step_left(self) -> float:
        """Seconds that the present cleanup steps may still take; 0 if none runs."""
        return self._runner.left

    @property
    def running(self) -> tuple[str, ...]:
        """The cleanup steps that run now."""
        return self._runner.running

    def runs_in(self, thread: threading.Thread) -> bool:
        """Whether one of its cleanup steps runs in this thread."""
        return self._runner.runs_in(thread)

    @property
    def policies(self) -> dict[str, dict[str, Any]]:
        """The result of each policy so far, by name."""
        return results_as_json(self._runner.results)

    def hurry(self, *, others: float = 0.0) -> None:
        """Give all remaining cleanup one second in total, other processes `others` more; the caller ends the drain."""
        log.warning(f"asked again: the drain ends now, and all remaining cleanup has {HURRIED:g}s")
        self.hurried = True
        self._deadline = min(self._deadline, time.monotonic() + HURRIED + others)
        if self._armed:  # the stop may end the process
            self.arm()
        self._runner.hurry(HURRIED + others)

    def record(self, report: DrainReport) -> dict[str, Any]:
        """The record of the stop, with this report; keys are stable."""
        return {
            "reason": str(self.reason),
            "plan": self.plan.id,
            "completed": report.completed,
            "rejected": report.rejected,
            "cut": [each.as_json() for each in report.cut],
            "background": [each.as_json() for each in report.background],
            **({"unaccepted": report.unaccepted} if report.unaccepted else {}),
            **({"unfinished": [each.as_json() for each in report.unfinished]} if report.unfinished else {}),
            "started": timestamp(time.time() - self.took),
            "took": round(report.took, 3),
            "policies": self.policies,
            "pid": os.getpid(),
        }

    def run(self) -> None:
        """Run all phases; returns when the last one is over, at the deadline at the latest."""
        try:
            self._take(self._discovery, _FIRST_LOOK)
            self._runner.run(BEFORE_THE_DRAIN)
            drain = self._drain = self._begin_drain()
            discovery = self._discovery and self._look_around(drain)
            self._runner.run(BESIDE_THE_DRAIN)
            report = drain.wait()
            assert report is not None
            self._after_drain()
            self._take(discovery, _SECOND_LOOK)
            self._runner.run(AFTER_THE_DRAIN, "clean" if report.clean else "degraded")
        except BaseException as error:  # whatever was raised, requests are finished, and the process exits
            log.error(f"cleanup broke off: {error}", exc_info=error)  # noqa: TRY400 - the text is part of the line
            self._finish_drain()

    def _finish_drain(self) -> None:
        """After a failure of the cleanup, wait for the end of the drain; an error is logged."""
        try:
            drain = self._drain = self._drain or self._begin_drain()
            if drain.wait(self.left) is None:
                drain.give_up("the cleanup broke off")
        except BaseException:  # the last line of defence
            log.exception("the drain broke off")

    def _look_around(self, drain: Drain) -> DiscoveryRun:
        """Begin the search of what the app holds, `_HEAD_START` seconds after the drain, because it takes the GIL."""
        drain.wait(_HEAD_START)
        return DiscoveryRun(self._app)

    def _take(self, discovery: DiscoveryRun | None, patience: float) -> None:
        """Add what a search found to the plan of the remaining phases; if it is not ready, the plan stays."""
        if discovery is None:
            return
        found = discovery.found(min(patience, max(0.0, self.left - self._runner.kept) / 2))
        if found is None:
            log.warning("what the app holds is not known yet: the stop goes on with what was found before")
            return
        try:
            self._runner.replan(with_found(self.plan, found, self._cleanup))
        except BaseException:  # from the app's own objects; the drain and the cleanup go on
            log.exception("cannot take what the app holds into the plan: the stop goes on with what was planned before")
