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
"""Seconds that all remaining cleanup gets when somebody asks a second time."""
_LAST_RESORT = 0.5
"""Seconds past the deadline at which faulthandler ends the process, even one whose app holds the GIL."""
_FAREWELL = 0.25
"""Seconds before the deadline at which all that the app does is over, for the record and the last log lines."""
_HEAD_START = 0.02
"""Seconds in which the gate is closed, before the search for what the app holds may slow that down."""
_FIRST_LOOK = 0.1
_SECOND_LOOK = 1.0
"""Seconds that a search for what the app holds may keep the stop waiting at its beginning, where one is still going on
just after the start, and once the drain is over."""


class CleanupThread:
    """Waits for the one stop; made before READY, because at the stop there may be no more threads to be had."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._wait, name="flaskd-cleanup", daemon=True)
        self.spare = Spare()
        """For the steps; what waits for a step must not be what runs it."""

    def _wait(self) -> None:
        work = self._work.get()
        with AppCode():
            work()

    def start(self) -> None:
        """Start it, and its spare."""
        self.spare.start()
        try:
            self._thread.start()
        except RuntimeError:
            self.dismiss()
            raise

    def run(self, work: Callable[[], None]) -> None:
        """Give it what to do, from any thread and any signal handler; only what is given first is done."""
        self._work.put(work)

    def dismiss(self) -> None:
        """Let it end without a stop."""
        self._work.put(lambda: None)
        self.join()

    def join(self) -> None:
        """Wait a moment for its end, after its work."""
        self.spare.dismiss()
        for thread, wait in ((self._thread, True), (self.spare.thread, self.spare.free)):
            if thread.ident is not None and wait:
                thread.join(1)


class Serves(Protocol):
    """What serves an app in this process, beside the daemon, and can be asked to stop."""

    def describe_stop(self) -> dict[str, Any]:
        """What a shutdown endpoint's answer tells of the stop to come."""

    def stop_for(self, reason: StopReason, over: Callable[[], None]) -> bool:
        """Begin the stop, or join the one under way, and return at once; `over` is called at its end.

        False when it is over already, and `over` is not called.
        """


_serving: list[tuple[Flask, Serves]] = []


@contextlib.contextmanager
def serving(app: Flask, server: Serves) -> Iterator[None]:
    """While open, that server serves the app, and a shutdown endpoint of the app stops it."""
    _serving.append((app, server))
    try:
        yield
    finally:
        _serving.remove((app, server))


def who_serves(app: Flask) -> Serves | None:
    """The server that serves an app, the last one if there are several; None where nobody has said so."""
    return next((server for each, server in reversed(_serving) if each is app), None)


class Stop:
    """Runs the plan as it stands now, around a drain, in the thread that calls `run`.

    `begin_drain` is called when it is time to drain, and gives the drain that it began, or that was begun or over
    before; `after_drain` when it is over, and may take its time. What breaks the cleanup off is logged, and the drain
    goes on to its end all the same. `on_step` gets each step's result, `on_begin` is called when one has begun.
    `discovery` has what the app was last known to hold; what it holds now is looked for beside the drain, and taken
    into the plan after it. None: it is not asked for. `spare` is a thread for steps where no other can be had.
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
        """Of the policies and registered functions; what the app is found to hold is taken into it on the way."""
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
        """Make sure that the process ends by the deadline, whatever happens from here on."""
        self._armed = True
        try:
            faulthandler.dump_traceback_later(self.left + _LAST_RESORT, exit=True, file=stacks_go_to())
        except (RuntimeError, OSError) as error:  # no thread can be had: the deadline hangs on Python alone
            log.warning(f"cannot arm the last resort: {error}")

    @property
    def left(self) -> float:
        """Seconds until the deadline, never below 0."""
        return max(0.0, self._deadline - time.monotonic())

    def left_for_the_exit(self) -> Callable[[], float]:
        """What gives, from now on, the seconds for what the app has left to the end of its process."""
        until = time.monotonic() + self._shutdown.exit_wait
        return lambda: min(until, self._deadline - _FAREWELL) - time.monotonic()

    def cut_work(self) -> tuple[Unfinished, ...]:
        """The accepted work that its steps had to throw away."""
        return tuple(Unfinished(f"{each.name}: {work}") for each in self._runner.results for work in each.cut)

    @property
    def took(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._began

    @property
    def drain_time(self) -> float:
        """Seconds a drain beginning now may take: its own timeout, what the deadline allows, nothing in a hurry."""
        if self.hurried:
            return 0.0
        return max(0.0, min(self._shutdown.drain.timeout, self.left - self._ending - self._runner.kept))

    @property
    def report(self) -> DrainReport:
        """What became of the requests; nothing before the drain is over."""
        return (self._drain.report if self._drain is not None else None) or DrainReport()

    def account(self, unfinished: tuple[Unfinished, ...]) -> DrainReport:
        """What became of the requests and of other work, and how many seconds the stop has taken until now."""
        return replace(self.report.with_unfinished(unfinished), took=self.took)

    def heed(self, results: Iterable[StepResult]) -> None:
        """Take to heart what became of steps that other processes ran; before the steps after the drain."""
        self._runner.heed(results)

    @property
    def step_left(self) -> float:
        """Seconds that the cleanup steps which run now may still take; 0 when none runs."""
        return self._runner.left

    @property
    def running(self) -> tuple[str, ...]:
        """The cleanup steps that run now."""
        return self._runner.running

    def runs_in(self, thread: threading.Thread) -> bool:
        """Whether that is the thread of one of its cleanup steps."""
        return self._runner.runs_in(thread)

    @property
    def policies(self) -> dict[str, dict[str, Any]]:
        """Each policy's fate so far."""
        return results_as_json(self._runner.results)

    def hurry(self, *, others: float = 0.0) -> None:
        """End the drain now and give all remaining cleanup a second in total, and `others` so many seconds to end."""
        log.warning(f"asked again: the drain ends now, and all remaining cleanup has {HURRIED:g}s")
        self.hurried = True
        self._deadline = min(self._deadline, time.monotonic() + HURRIED + others)
        if self._armed:  # else the process is not the stop's to end
            self.arm()
        self._runner.hurry(HURRIED + others)

    def record(self, report: DrainReport) -> dict[str, Any]:
        """The record of it, with its account; keys are stable."""
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
        """Go through the phases; returns when the last is over, by the deadline at the latest."""
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
        except BaseException as error:  # whatever it was, what is in hand is finished, and the process exits
            log.error(f"cleanup broke off: {error}", exc_info=error)  # noqa: TRY400 - the text is part of the line
            self._finish_drain()

    def _finish_drain(self) -> None:
        """Let a drain end, which the cleanup does not wait for any more; one that cannot begin is told."""
        try:
            drain = self._drain = self._drain or self._begin_drain()
            if drain.wait(self.left) is None:
                drain.give_up("the cleanup broke off")
        except BaseException:  # there is nothing behind this
            log.exception("the drain broke off")

    def _look_around(self, drain: Drain) -> DiscoveryRun:
        """Look for what the app holds, a moment after the drain has begun, for it takes the interpreter's lock."""
        drain.wait(_HEAD_START)
        return DiscoveryRun(self._app)

    def _take(self, discovery: DiscoveryRun | None, patience: float) -> None:
        """Take what it found into the plan for the phases to come; without its word, what was known before stays."""
        if discovery is None:
            return
        found = discovery.found(min(patience, max(0.0, self.left - self._runner.kept) / 2))
        if found is None:
            log.warning("what the app holds is not known yet: the stop goes on with what was found before")
            return
        try:
            self._runner.replan(with_found(self.plan, found, self._cleanup))
        except BaseException:  # the app's own objects were asked; whatever they did, the drain and the cleanup go on
            log.exception("cannot take what the app holds into the plan: the stop goes on with what was planned before")
