"""What a plan means before it runs: the latest moments of each step, and the effect of a step that hangs.

Both are computed by the runner itself, with a clock that is set by hand and steps that end at once or never.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from flaskd.cleanup.attempt import Attempt
from flaskd.cleanup.context import Times, divided
from flaskd.cleanup.found import Found
from flaskd.cleanup.model import Action, Fate, Step, StepResult, Verdict
from flaskd.cleanup.plan import AFTER_THE_DRAIN, BEFORE_THE_DRAIN, BESIDE_THE_DRAIN, Plan
from flaskd.cleanup.runner import Runner
from flaskd.config import Config, Phase, Settings
from flaskd.errors import UsageError
from flaskd.text import did_you_mean, nearest_first, quoted, table
from flaskd.units import format_duration
from flaskd.values import value

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence


@value
class Frame:
    """The time around a plan, in seconds, from the sections `shutdown` and `cleanup`."""

    deadline: float
    reserve: float
    announce: float
    drain: float
    max_parallel: int
    exit_wait: float = 0.0
    workers: bool = False

    @classmethod
    def of(cls, config: Config) -> Frame:
        """The frame of a configuration."""
        shutdown = config.shutdown
        return cls(
            shutdown.deadline,
            shutdown.reserve,
            shutdown.announce,
            shutdown.drain.timeout,
            config.cleanup.max_parallel,
            shutdown.exit_wait,
            workers=config.server.workers != 0,
        )

    def text(self) -> str:
        """The frame as one line for people."""
        said = f"deadline {format_duration(self.deadline)}"
        if self.reserve:
            said += f", of which {format_duration(self.reserve)} are kept for flush, final and what is marked always"
        return f"{said}; the drain may take {format_duration(min(self.drain, self.deadline - self.reserve))}"


@value
class _Reason:
    kind: str = "signal"


class _Clock:
    """A clock that is set by hand: seconds since the stop began."""

    def __init__(self) -> None:
        self.now = 0.0

    def until(self, moment: float) -> None:
        """Move the clock forward to a moment; it never goes back."""
        self.now = max(self.now, moment)

    def __call__(self) -> float:
        return self.now


class _Silent:
    """Takes the place of a thread that logs: a rehearsal logs nothing."""

    def add(self, call: Callable[[], None]) -> None:
        """Drop the call."""


class _Rehearsal(Runner):
    """A runner whose steps end at once, except those that hang; its clock moves only while it waits for those."""

    def __init__(self, plan: Plan, times: Times, frame: Frame, hang: Collection[str], clock: _Clock) -> None:
        self._by_hand = clock
        self._hang = hang
        times = times.for_steps()
        super().__init__(
            plan,
            app=None,
            reason=_Reason(),
            deadline=times.deadline,
            reserve=times.reserve,
            kept=times.kept,
            max_parallel=frame.max_parallel,
            clock=self._by_hand,
        )

    @property
    def drained_by(self) -> float:
        """The moment at which the drain must be over, so that the steps after it have their time."""
        return self._budget.deadline - self.kept

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        self._log = self._progress = _Silent()  # type: ignore[assignment]  # a rehearsal calls no other method of them
        self._call_threads = []
        yield

    def _begin(self, attempt: Attempt) -> bool:
        if attempt.step.name not in self._hang:
            attempt.verdict = Verdict(Fate.OK)
        return True

    def _wait(self) -> None:
        if all(attempt.verdict is None for attempt in self._running.values()):
            self._by_hand.until(min(attempt.given_up_at() for attempt in self._running.values()))


def rehearse(plan: Plan, frame: Frame, hang: Collection[str], *, exit_wait: float = 0.0) -> list[StepResult]:
    """The result of each step if the steps named in `hang` never end, after a drain that uses all of its time.

    All workers count as one, because they run the same steps at the same time. `exit_wait` is how many seconds they
    take from their last step to their end.
    """
    still = Action("rehearsed", Settings, Phase.FINAL, lambda _context, _fields: None)
    plan = Plan(tuple(replace(step, action=replace(still, name=step.action.name)) for step in plan.steps))
    clock = _Clock()
    parts = _parts(plan, frame)
    runners = [_Rehearsal(part, time, frame, hang, clock) for part, time in parts]
    results: list[StepResult] = []

    def run(phases: Sequence[Phase]) -> None:
        """Run these phases in each process; the workers and the service begin them at the same moment."""
        begin, end = clock.now, clock.now
        for runner in runners:
            clock.now = begin
            results.extend(runner.run(phases))
            end = max(end, clock.now)
        clock.now = end
        for runner in runners:
            runner.heed(results)

    run(BEFORE_THE_DRAIN)
    drain = max(0.0, min(frame.drain, min(runner.drained_by for runner in runners) - clock.now))
    drained = max(clock.now, frame.announce) + drain
    run(BESIDE_THE_DRAIN)
    clock.until(min(drained, frame.deadline))
    for place, runner in enumerate(runners):
        if place:  # the service goes on when the workers have ended
            clock.until(min(clock.now + exit_wait, parts[0][1].deadline))
            runner.heed(results)
        results += runner.run(AFTER_THE_DRAIN)
    return results


def _parts(plan: Plan, frame: Frame) -> list[tuple[Plan, Times]]:
    """The part of the plan that each process runs, and its time: first the workers, then the service."""
    if not frame.workers:
        return [(plan, Times(frame.deadline, frame.reserve))]
    workers, service = plan.part("worker"), plan.part("service")
    return list(zip((workers, service), divided(frame.deadline, frame.reserve, later=service.later), strict=True))


def latest(plan: Plan, frame: Frame) -> dict[str, tuple[float, float] | None]:
    """The latest moments at which each step begins and is abandoned, in seconds after the stop began.

    They are reached if all steps before it use all of their time and retries. None: there may be no time left for it.
    """
    slowest = [
        replace(
            step,
            timeout=step.timeout * (1 + step.retries) + (step.action.grace(step.fields) if step.action.grace else 0.0),
            on_failure="continue",
            reasons=(),
            outcome=None,
        )
        for step in plan.steps
    ]
    hang = {step.name for step in slowest}
    results = rehearse(Plan(tuple(slowest)), frame, hang, exit_wait=frame.exit_wait)
    return {
        each.name: None if each.fate is Fate.SKIPPED else (each.started, each.started + each.took) for each in results
    }


def overview(plan: Plan, frame: Frame, at_exit: Sequence[str] = ()) -> dict[str, Any]:
    """A plan under stable keys; `text` is a table for people.

    `at_exit` names the threads and processes that the exit waits for, as far as they are known. `begins_by` and
    `ends_by` of a step are seconds after the stop began, or None if there may be no time for it.
    """
    moments = latest(plan, frame)
    steps = _in_turn(plan.steps) if frame.workers else plan.steps
    policies = []
    for step in steps:
        begins, ends = moments[step.name] or (None, None)
        policies.append({**step.describe(), "begins_by": begins, "ends_by": ends})
    found = {each.name: each for step in steps for each in step.found or ()}
    return {
        "policies": policies,
        "found": [each.describe() for each in (*found.values(), *plan.left)],
        "budget": asdict(frame),
        "exit": list(at_exit),
        "text": "\n".join([*_timetable(steps, frame, moments), *_left(plan.left), *_at_exit(frame, at_exit)]),
    }


def _in_turn(steps: Iterable[Step]) -> list[Step]:
    """The steps in the order in which they run: after the drain the service's steps wait until all workers have ended.

    Before and during the drain the steps of both run at the same time.
    """
    stages = (*BEFORE_THE_DRAIN, *BESIDE_THE_DRAIN)
    return sorted(steps, key=lambda each: (min(each.phase.position, len(stages)), each.scope == "service"))


def _timetable(steps: Sequence[Step], frame: Frame, moments: Mapping[str, tuple[float, float] | None]) -> list[str]:
    if not steps:
        return [frame.text(), "no cleanup policies"]
    rows: list[tuple[str, ...]] = [("PHASE", "POLICY", "ACTION", "TIMEOUT", "BEGINS BY", "ENDS BY", "SCOPE", "NOTES")]
    for each in steps:
        moment = moments[each.name]
        begins, ends = map(format_duration, moment) if moment else ("no time", "-")
        timeout = format_duration(each.timeout)
        rows.append(
            (
                str(each.phase),
                each.name,
                each.action.name,
                timeout,
                begins,
                ends,
                each.scope,
                each.notes(workers=frame.workers),
            )
        )
    if not frame.workers:
        rows = [row[:-2] + row[-1:] for row in rows]
    return [frame.text(), *table(rows)]


def _left(found: Sequence[Found]) -> list[str]:
    rows = [(each.name, each.kind, each.left) for each in found]
    return ["found, and left alone:", *table(rows, indent=2)] if rows else []


def _at_exit(frame: Frame, names: Sequence[str]) -> list[str]:
    return [f"the exit waits at most {format_duration(frame.exit_wait)} for: {', '.join(names)}"] if names else []


def simulated(plan: Plan, frame: Frame, hang: Iterable[str]) -> tuple[list[StepResult], str]:
    """What would become of each step if those named in `hang` hung: the results, and a table for people.

    Raises UsageError for a name that no step has.
    """
    hang, names = tuple(hang), [step.name for step in plan.steps]
    for name in hang:
        if name not in names:
            known = f"; the plan has {nearest_first(name, names)}" if names else "; the plan has no steps"
            raise UsageError(f"cannot simulate: there is no step {quoted(name)}{did_you_mean(name, names)}{known}")
    results = rehearse(plan, frame, hang)
    scopes = {step.name: step.scope for step in plan.steps}
    rows: list[tuple[str, ...]] = [("PHASE", "POLICY", "FATE", "BEGINS", "ENDS", "SCOPE", "WHY")]
    for each in results:
        skipped = each.fate is Fate.SKIPPED
        moments = (each.started, each.started + each.took)
        rows.append(
            (
                each.phase,
                each.name,
                str(each.fate),
                *("-" if skipped else format_duration(m) for m in moments),
                scopes[each.name],
                each.why,
            )
        )
    if not frame.workers:
        rows = [row[:-2] + row[-1:] for row in rows]
    head = f"{frame.text()}, and takes it here; hanging: {', '.join(hang)}"
    return results, "\n".join([head, *table(rows)])


def with_service(workers: Mapping[str, Any], service: Plan, frame: Frame) -> dict[str, Any]:
    """The overview of a service with workers: what a worker says of its plan, and the steps that run once.

    `workers` is the `overview` of one worker.
    """
    found = [Found(**each) for each in workers["found"]]
    plan = plan_from(workers["policies"], found)
    taken = {name for step in workers["policies"] for name in step["found"]}
    left = tuple(each for each in found if each.name not in taken)
    whole = Plan((*plan.steps, *service.steps), left)
    return overview(whole, frame, workers["exit"])


def plan_from(steps: Iterable[Mapping[str, Any]], found: Iterable[Found] = ()) -> Plan:
    """The plan that `overview` described, for rehearsals only: the description has no fields to run it with."""
    known = {each.name: each for each in found}
    return Plan(
        tuple(
            Step(
                name=each["name"],
                action=Action(
                    each["use"],
                    Settings,
                    Phase(each["phase"]),
                    lambda _context, _fields: None,
                    at_replacement=each.get("at_replacement", True),
                ),
                fields=Settings(),
                phase=Phase(each["phase"]),
                timeout=each["timeout"],
                retries=each["retries"],
                on_failure=each["on_failure"],
                after=tuple(each["after"]),
                reasons=tuple(each["when"]["reason"]),
                outcome=each["when"]["outcome"],
                always=each["always"],
                scope=each.get("scope", "worker"),
                found=tuple(known[name] for name in each["found"] if name in known),
            )
            for each in steps
        )
    )
