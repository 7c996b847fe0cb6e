import threading
import time
from dataclasses import replace

from cleanup_kit import hanging, runner, step
from hypothesis import given, settings
from hypothesis import strategies as st

from flaskd.cleanup import Fate, Frame, Plan, Times, for_steps
from flaskd.cleanup.preview import _Clock, _Rehearsal, latest, rehearse
from flaskd.config import Phase

MARGIN = 0.5
PLENTY = 10.0
FOREVER = 100.0
"""Seconds that a hanging step would take if only its own timeout ended it."""


@st.composite
def plans(draw):
    """Give up to seven steps in any file order, with edges that lead to the same or an earlier phase."""
    phases = sorted(draw(st.lists(st.sampled_from(Phase), min_size=1, max_size=7)), key=list(Phase).index)
    drawn = [
        {
            "name": f"s{place}",
            "phase": phase,
            "after": tuple(f"s{before}" for before in draw(st.sets(st.integers(0, place - 1), max_size=2)))
            if place
            else (),
            "always": draw(st.booleans()),
            "on_failure": draw(st.sampled_from(["continue", "skip_dependents", "abort"])),
            "retries": draw(st.integers(0, 2)),
            "does": draw(st.sampled_from(["pass", "pass", "fail", "hang"])),
        }
        for place, phase in enumerate(phases)
    ]
    return draw(st.permutations(drawn))


class Log:
    """Runs the steps of a drawn plan and notes, in one order, when each begins and ends."""

    def __init__(self, hang):
        self.hang = hang
        self.lock = threading.Lock()
        self.inside = 0
        self.most = 0
        self.ran = set()

    def steps(self, drawn, timeout):
        """Steps of which only those that hang have a short timeout, because others may wait long on a busy machine."""
        return [
            step(
                each["name"],
                self.action(each["does"]),
                timeout=timeout if each["does"] == "hang" else PLENTY,
                **{k: each[k] for k in each if k not in {"name", "does"}},
            )
            for each in drawn
        ]

    def action(self, does):
        def act(context):
            with self.lock:
                self.ran.add(context.policy)
                self.inside += does != "hang"  # a hanging step loses its place without ending
                self.most = max(self.most, self.inside)
            try:
                if does == "hang":
                    self.hang(context)
                if does == "fail":
                    raise ValueError
            finally:
                with self.lock:
                    self.inside -= does != "hang"

        return act


@settings(max_examples=60, deadline=None)
@given(drawn=plans(), max_parallel=st.integers(1, 3))
def test_order_and_account(drawn, max_parallel):
    """With enough time each step has one result, phases and edges are kept, `always` runs, and the bound is kept."""
    with hanging() as hang:
        log = Log(hang)
        stop = runner(*log.steps(drawn, timeout=0.02), deadline=PLENTY, max_parallel=max_parallel)
        results = stop.run(Phase)
    assert sorted(result.name for result in results) == sorted(each["name"] for each in drawn)
    assert log.most <= max_parallel
    by_name = {result.name: result for result in results}
    place = {result.name: place for place, result in enumerate(results)}
    assert [Phase(result.phase).position for result in results] == sorted(Phase(r.phase).position for r in results)
    for each in drawn:
        result = by_name[each["name"]]
        for before in each["after"]:
            assert place[before] < place[each["name"]]
            assert by_name[before].started + by_name[before].took <= result.started + 1e-9
        if (
            each["does"] != "hang" or result.fate is Fate.SKIPPED
        ):  # a hanging step may be abandoned before its first line
            assert (each["name"] in log.ran) == (result.fate is not Fate.SKIPPED)
        if each["always"]:
            assert result.fate is not Fate.SKIPPED
        if result.fate is not Fate.SKIPPED:
            expected = {"pass": Fate.OK, "fail": Fate.FAILED, "hang": Fate.TIMED_OUT}[each["does"]]
            assert result.fate is expected
    for result in results:
        later = [r for r in results if Phase(r.phase).position > Phase(result.phase).position]
        assert all(result.started + result.took <= other.started + 1e-9 for other in later)


@settings(max_examples=25, deadline=None)
@given(drawn=plans(), hurried=st.booleans())
def test_never_past_the_deadline(drawn, hurried):
    """With almost no time the run ends by the deadline, with a result for every step."""
    with hanging() as hang:
        stop = runner(*Log(hang).steps(drawn, timeout=FOREVER), deadline=0.15, reserve=0.05, max_parallel=1)
        begun = time.monotonic()
        if hurried:
            stop.hurry(0.01)
        results = stop.run(Phase)
        assert time.monotonic() - begun < 0.15 + MARGIN
    assert len(results) == len(drawn)


@given(drawn=plans())
def test_a_plan_is_ordered(drawn):
    """A plan lists its steps by phase, each after all steps that it comes after, and keeps every edge."""
    with hanging() as hang:
        plan = Plan(tuple(Log(hang).steps(drawn, timeout=1.0)))
    names = [each.name for each in plan.steps]
    phases = [each.phase.position for each in plan.steps]
    assert phases == sorted(phases)
    edges = {each["name"]: set(each["after"]) for each in drawn}
    for each in plan.steps:
        assert set(each.after) == edges[each.name]
        assert all(names.index(before) < names.index(each.name) for before in each.after)


@settings(max_examples=30, deadline=None)
@given(drawn=plans(), max_parallel=st.integers(1, 3))
def test_a_rehearsal_tells_what_would_happen(drawn, max_parallel):
    """The rehearsal of a plan in which steps hang gives the same results as the run."""
    drawn = [{**each, "does": "pass" if each["does"] == "fail" else each["does"]} for each in drawn]
    with hanging() as hang:
        steps = Log(hang).steps(drawn, timeout=0.02)
        real = runner(*steps, deadline=PLENTY, max_parallel=max_parallel).run(Phase)
    frame = Frame(deadline=PLENTY, reserve=0.0, announce=0.0, drain=0.0, max_parallel=max_parallel)
    told = rehearse(Plan(tuple(steps)), frame, {each["name"] for each in drawn if each["does"] == "hang"})
    assert {each.name: (each.fate, each.why) for each in told} == {each.name: (each.fate, each.why) for each in real}


@given(
    drawn=plans(),
    hangs=st.sets(st.integers(0, 6)),
    timeout=st.floats(0.1, 30.0),
    deadline=st.floats(1.0, 30.0),
    reserve=st.just(0.0) | st.floats(0.01, 0.9),
    drain=st.floats(0.0, 30.0),
    max_parallel=st.integers(1, 3),
)
def test_budgets_never_exceed_the_deadline(drawn, hangs, timeout, deadline, reserve, drain, max_parallel):
    """Whatever hangs, no step exceeds its limit or its latest moments, and `always` always runs."""
    with hanging() as hang:
        plan = Plan(tuple(Log(hang).steps([{**each, "does": "hang"} for each in drawn], timeout)))
    frame = Frame(deadline, reserve, announce=0.0, drain=drain, max_parallel=max_parallel)
    moments = latest(plan, frame)
    steps = {each.name: each for each in plan.steps}
    assert moments.keys() == steps.keys()
    for result in rehearse(plan, frame, {f"s{place}" for place in hangs}):
        step = steps[result.name]
        limit = deadline if step.reserved else deadline - reserve
        assert result.started + result.took <= limit + 1e-9 or result.fate is Fate.SKIPPED
        if moment := moments[result.name]:
            assert result.started <= moment[0] + 1e-9
            assert moment[1] <= limit + 1e-9
        if step.always:
            assert result.fate is not Fate.SKIPPED
    ends, kept = for_steps(deadline, reserve)
    assert_always_ran(rehearse(plan, frame, steps), plan, kept or ends / 5)


@given(
    drawn=plans(),
    services=st.sets(st.integers(0, 6)),
    hangs=st.sets(st.integers(0, 6)),
    timeout=st.floats(0.1, 30.0),
    deadline=st.floats(1.0, 30.0),
    reserve=st.just(0.0) | st.floats(0.01, 0.9),
    exit_wait=st.floats(0.0, 30.0),
    max_parallel=st.integers(1, 3),
)
def test_workers_leave_time_for_what_runs_after_them(
    drawn, services, hangs, timeout, deadline, reserve, exit_wait, max_parallel
):
    """Whatever hangs, steps marked `always` run in the workers and after them, before the common deadline.

    Those that run once, before the drain, may take time from the workers as from all others.
    """
    before = {Phase.ANNOUNCE, Phase.DRAIN}
    drawn = [
        {**each, "always": each["always"] and not (place in services and each["phase"] in before)}
        for place, each in enumerate(drawn)
    ]
    with hanging() as hang:
        steps = Log(hang).steps([{**each, "does": "hang"} for each in drawn], timeout)
    scopes = [("service" if place in services else "worker") for place in range(len(steps))]
    plan = Plan(tuple(replace(each, scope=scope) for each, scope in zip(steps, scopes, strict=True)))
    frame = Frame(deadline, deadline * reserve, 0.0, 30.0, max_parallel, exit_wait, workers=True)
    moments = latest(plan, frame)
    ends = for_steps(deadline, 0.0)[0] + 1e-9
    for result in rehearse(plan, frame, {f"s{place}" for place in hangs}, exit_wait=exit_wait):
        assert result.started + result.took <= ends or result.fate is Fate.SKIPPED
        if moment := moments[result.name]:
            assert result.started <= moment[0] + 1e-9
            assert moment[1] <= ends
    always = {each.name for each in plan.steps if each.always}
    every = rehearse(plan, frame, {each.name for each in plan.steps}, exit_wait=exit_wait)
    assert all(each.fate is not Fate.SKIPPED and each.took > 0 for each in every if each.name in always)


def assert_always_ran(results, plan, pot):
    """Check that each `always` step had its timeout, or at least its share of the time kept for all of them."""
    always = {each.name: each for each in plan.steps if each.always}
    for result in results:
        if step := always.get(result.name):
            assert result.fate is not Fate.SKIPPED, result
            assert result.took >= min(step.timeout, pot / (len(always) + 1)) - 1e-9


class Hurried(_Rehearsal):
    """A rehearsal that is hurried when it waits for the n-th time."""

    def __init__(self, *args, at, seconds):
        super().__init__(*args)
        self.at, self.seconds = at, seconds

    def _wait(self):
        if self.at == 0:
            self.hurry(self.seconds)
        self.at -= 1
        super()._wait()


@given(
    drawn=plans(),
    timeout=st.floats(0.1, 30.0),
    reserve=st.just(0.0) | st.floats(0.01, 0.9),
    max_parallel=st.integers(1, 3),
    at=st.integers(-1, 3),
)
def test_always_has_time_in_a_hurry(drawn, timeout, reserve, max_parallel, at):
    """Each `always` step that is left when the stop is hurried begins, and has a share of the remaining time."""
    with hanging() as hang:
        plan = Plan(tuple(Log(hang).steps([{**each, "does": "hang"} for each in drawn], timeout)))
    names = {each.name for each in plan.steps}
    frame, clock = Frame(20.0, reserve, 0.0, 0.0, max_parallel), _Clock()
    runner = Hurried(plan, Times(20.0, reserve), frame, names, clock, at=at, seconds=1.0)
    results = runner.run(Phase)
    always = {each.name for each in plan.steps if each.always}
    assert all(each.fate is not Fate.SKIPPED for each in results if each.name in always)
    assert clock.now <= 20.0 + 1e-9
