"""The runner: runs the steps of a plan, phase by phase, within one absolute budget of time.

`Runner.run` belongs to one thread; `Runner.hurry` and the properties may be used from any. The thread in `run` calls
nothing that may block (actions, the log, `on_progress`), so that nothing can keep it past the deadline.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from flaskd.cleanup.attempt import Attempt, Spare
from flaskd.cleanup.calls import CallThread, call_in_thread
from flaskd.cleanup.context import ENDING_SLACK, Budget, StepContext
from flaskd.cleanup.model import Fate, StepResult, Verdict
from flaskd.config import REPLACEMENTS, Phase
from flaskd.stacks import folded
from flaskd.units import format_duration

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from flaskd.cleanup.model import Outcome, Reason, Step
    from flaskd.cleanup.plan import Plan

_log = logging.getLogger("flaskd.cleanup")
_LEVELS = {
    Fate.OK: logging.INFO,
    Fate.SKIPPED: logging.INFO,
    Fate.FAILED: logging.ERROR,
    Fate.TIMED_OUT: logging.WARNING,
}
_LONGEST_WAIT = 3600.0
_LONGEST_FAREWELL = 1.0


class Runner:
    """Runs the steps of `plan` for one stop.

    `app` is the Flask app or None. `deadline` is a moment on `clock`. `reserve` is the seconds before it that are kept
    for the phases flush and final and for steps marked `always`, each of which has a share of its own; see `Budget` for
    `kept`. `max_parallel` is how many steps of a phase run at the same time. `state` is the state directory.
    `on_progress` is called with each result, `on_begin` when a step has begun, both in a thread of their own. `spare`
    runs steps if no other thread can be had.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        app: Any,
        reason: Reason,
        deadline: float,
        reserve: float,
        kept: float = 0.0,
        max_parallel: int,
        state: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_progress: Callable[[StepResult], None] | None = None,
        on_begin: Callable[[], None] | None = None,
        spare: Spare | None = None,
    ) -> None:
        self._plan, self._spare = plan, spare
        self._app = app
        self._reason = reason
        always = sum(step.always for step in plan.steps if step.may_be_wanted(reason.kind))
        self._budget = Budget(deadline, reserve, clock, always=always, kept=kept)
        self._max_parallel = max(1, max_parallel)
        self._state = state
        self._on_progress = on_progress
        self._on_begin = on_begin
        self._made_at = clock()
        self._lock = threading.Lock()
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._running: dict[str, Attempt] = {}
        self._begun: dict[str, float] = {}
        self._results: dict[str, StepResult] = {}
        self._attempts: list[Attempt] = []
        self._abandoned: tuple[str, ...] = ()
        self._skip_why: dict[str, str] = {}
        self._aborted = ""

    @property
    def results(self) -> tuple[StepResult, ...]:
        """The results so far, in the order in which they became known."""
        with self._lock:
            return tuple(self._results.values())

    @property
    def running(self) -> tuple[str, ...]:
        """The names of the steps that run now."""
        with self._lock:
            return tuple(self._running)

    @property
    def kept(self) -> float:
        """Seconds before the deadline that neither the drain nor ordinary steps may use."""
        return self._budget.kept(reserved=False, waiting=self._waiting())

    @property
    def left(self) -> float:
        """Seconds until the last of the running steps is abandoned; 0 if none runs."""
        with self._lock:
            running = tuple(self._running.values())
        return max((attempt.given_up_at() - self._budget.now() for attempt in running), default=0.0)

    @property
    def abandoned(self) -> tuple[str, ...]:
        """The names of the steps that were abandoned when their time was up."""
        return self._abandoned

    def runs_in(self, thread: threading.Thread) -> bool:
        """Whether one of the steps runs, or ran, in that thread."""
        with self._lock:
            return any(attempt.thread is thread for attempt in self._attempts)

    def finished(self) -> bool:
        """Whether the threads of all steps have ended."""
        with self._lock:
            return not any(attempt.alive for attempt in self._attempts)

    def hurry(self, seconds: float) -> None:
        """Leave `seconds` from now for all that is still to do, running steps included, without a reserve."""
        self._budget.hurry(seconds)
        self._wake.put(None)
        with self._lock:
            running = tuple(self._running.values())
        for attempt in running:
            if call := attempt.context.on_hurry:
                call_in_thread(call).close(0)

    def replan(self, plan: Plan) -> None:
        """Run the steps of another plan in the phases to come; to be called between two runs."""
        self._plan = plan

    def heed(self, results: Iterable[StepResult]) -> None:
        """Take into account the results of steps that another process ran (`Plan.elsewhere`); call it between two runs.

        If such a step did not succeed, its `on_failure` says what is skipped: nothing, its dependents, or all that
        remains.
        """
        elsewhere = {step.name: step for step in self._plan.elsewhere}
        for result in results:
            if result.broken and result.name in elsewhere:
                self._mark_skipped(elsewhere[result.name], result)

    def run(self, phases: Iterable[Phase], outcome: Outcome = "clean") -> list[StepResult]:
        """Run the steps of `phases`, in the order of the phases.

        Returns their results in the order in which they became known. A step that has run is not run again. Returns at
        the deadline at the latest, whatever the steps do.
        """
        wanted = set(phases)
        known = len(self._results)
        with self._reporting():
            for phase in Phase:
                if phase in wanted:
                    self._run_phase([step for step in self._plan.of(phase) if step.name not in self._results], outcome)
        return list(self._results.values())[known:]

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        self._log = CallThread("flaskd-cleanup-log")
        self._progress = CallThread("flaskd-cleanup-progress") if self._on_progress or self._on_begin else None
        self._call_threads = [each for each in (self._progress, self._log) if each]
        try:
            yield
        finally:
            now = self._budget.now()
            until = max(now + ENDING_SLACK, min(now + _LONGEST_FAREWELL, self._budget.deadline))
            for each in self._call_threads:
                each.close(until - self._budget.now())
            for attempt in self._attempts:
                attempt.join(until - self._budget.now())

    def _run_phase(self, pending: list[Step], outcome: Outcome) -> None:
        while pending or self._running:
            self._start_free(pending, outcome)
            if self._running:
                self._wait()
                self._settle()

    def _start_free(self, pending: list[Step], outcome: Outcome) -> None:
        """Start or skip each step that need not wait for another; one pass is enough because the plan is sorted."""
        waiting = {step.name for step in pending} | self._running.keys()
        for step in tuple(pending):
            if not waiting.isdisjoint(step.after):
                continue
            if why := self._why_not(step, outcome):
                waiting.discard(step.name)
                self._conclude(step, Verdict(Fate.SKIPPED, why), attempts=0)
            elif len(self._running) >= self._max_parallel or not self._start(step, attempt=1):
                continue  # a running step must end first
            pending.remove(step)

    def _why_not(self, step: Step, outcome: Outcome) -> str:
        """Why the step is skipped; empty if it is to run."""
        if not step.wanted(self._reason.kind, outcome):
            if step.at_replacement or self._reason.kind not in REPLACEMENTS:
                return "its `when` does not fit this stop"
            return "it runs only when the service stops"
        if not step.always and (why := self._skip_why.get(step.name) or self._aborted):
            return why
        if self._limit(step) <= self._budget.now():
            return "no time left"
        return ""

    def _limit(self, step: Step) -> float:
        """The last moment at which a step that begins now may run."""
        return self._budget.limit(reserved=step.reserved, waiting=self._waiting(step))

    def _waiting(self, but: Step | None = None) -> int:
        """The number of steps marked `always` that have not begun, `but` left out."""
        return sum(
            step.always
            for step in self._plan.steps
            if step is not but
            and step.name not in {*self._begun, *self._results}
            and step.may_be_wanted(self._reason.kind)
        )

    def _start(self, step: Step, attempt: int) -> bool:
        """Start an attempt at a step; False if it must wait until a running step frees the spare thread."""
        context = StepContext(
            policy=step.name,
            phase=step.phase,
            reason=self._reason.kind,
            reason_text=str(self._reason),
            app=self._app,
            attempt=attempt,
            started=self._budget.now(),
            timeout=step.timeout,
            reserved=step.reserved,
            budget=self._budget,
            waiting=self._waiting(step),
            state=self._state,
            found=step.found,
            redact=step.redact,
        )
        started = Attempt(step, context, over=partial(self._wake.put, None), spare=self._spare)
        with self._lock:  # before it begins, because the step may ask which one it is
            self._running[step.name] = started
            self._attempts = [each for each in self._attempts if each.alive] + [started]
        if not self._begin(started):
            if len(self._running) > 1:
                with self._lock:
                    del self._running[step.name]
                return False
            started.fail("no thread can be had to run it")
        self._begun.setdefault(step.name, context.started)
        if self._progress and self._on_begin:
            self._progress.add(self._on_begin)
        return True

    def _begin(self, attempt: Attempt) -> bool:
        return attempt.start()

    def _wait(self) -> None:
        """Wait until a step is over, the time of one is up, or the stop is hurried."""
        moment = min(attempt.given_up_at() for attempt in self._running.values())
        left = moment - self._budget.now()
        with suppress(queue.Empty):
            if left > 0:
                self._wake.get(timeout=min(left, _LONGEST_WAIT))
            while True:  # `_settle` looks at all steps, so one wake-up is enough
                self._wake.get_nowait()

    def _settle(self) -> None:
        """Conclude each running step that is over or has no time left."""
        for attempt in tuple(self._running.values()):
            if attempt.verdict is not None:
                self._judge(attempt, attempt.verdict)
            elif attempt.given_up_at() <= self._budget.now():
                # It is not retried: it still runs, and two attempts must not run at the same time.
                self._abandoned += (attempt.step.name,)
                if call := attempt.context.last_resort:
                    self._call_threads.append(call_in_thread(call))
                self._conclude(attempt.step, attempt.abandoned(), attempt.context.attempt)

    def _judge(self, attempt: Attempt, verdict: Verdict) -> None:
        """Accept the verdict, or try again if it is no success and retries and time are left."""
        step, count = attempt.step, attempt.context.attempt
        time_left = self._limit(step) > self._budget.now()
        if verdict.fate is Fate.OK or count > step.retries or not time_left:
            self._conclude(step, verdict, count)
            return
        again = f"cleanup {step.phase}/{step.name}: {verdict.fate}, {verdict.why}; attempt {count + 1} follows"
        self._log.add(partial(_log.warning, "%s", again))
        if not self._start(step, count + 1):
            self._conclude(step, verdict, count)

    def _conclude(self, step: Step, verdict: Verdict, attempts: int) -> None:
        now = self._budget.now()
        begun = self._begun.get(step.name, now)
        result = StepResult(
            name=step.name,
            phase=str(step.phase),
            use=step.action.name,
            fate=verdict.fate,
            why=verdict.why,
            started=begun - self._made_at,
            took=now - begun,
            attempts=attempts,
            detail=verdict.detail,
            trace=verdict.trace,
            cut=verdict.cut,
        )
        with self._lock:
            self._running.pop(step.name, None)
            self._results[step.name] = result
        if result.broken:
            self._mark_skipped(step, result)
        if self._progress and self._on_progress:
            self._progress.add(partial(self._on_progress, result))
        self._log.add(partial(_write_line, result))

    def _mark_skipped(self, step: Step, result: StepResult) -> None:
        """Note which steps will be skipped because this one did not succeed."""
        if step.on_failure == "skip_dependents":
            how = "failed" if result.fate is Fate.FAILED else "timed out"
            for name in self._plan.dependents(step.name):
                self._skip_why.setdefault(name, f"after {step.name}, which {how}")
        elif step.on_failure == "abort":
            self._aborted = self._aborted or f"aborted by {step.name}"


def _write_line(result: StepResult) -> None:
    line = f"cleanup {result.phase}/{result.name}: {result.fate}"
    if result.fate is not Fate.SKIPPED:
        line += f" in {format_duration(result.took)}"
    if result.why or result.detail:
        line += f", {result.why or result.detail}"
    if result.attempts > 1:
        line += f" (attempt {result.attempts})"
    if result.trace:
        line += f"\n{folded(result.trace)}"
    fields = {"policy": result.name, "phase": result.phase, "fate": str(result.fate), "took": round(result.took, 3)}
    _log.log(_LEVELS[result.fate], "%s", line, extra={"fields": fields})
