import logging
import threading
import time
from dataclasses import replace

import pytest
from cleanup_kit import fates, hanging, in_background, run, runner, step
from patience import PATIENCE

from flaskd.cleanup import Fate, StepContext
from flaskd.cleanup.context import Budget
from flaskd.config import Phase

MARGIN = 0.5
"""Seconds by which a run may be late on a busy machine; what it must not do would hang for ever."""


@pytest.fixture(autouse=True)
def _log_everything(caplog):
    caplog.set_level(logging.DEBUG, logger="flaskd.cleanup")


def at(moment):
    """Give a clock that stands still."""
    return lambda: moment


def test_a_hanging_step_is_abandoned_and_its_stack_logged(caplog):
    """A step past its timeout is abandoned; the log and the result show where its thread hangs."""
    with hanging() as hang:
        stop = runner(step("stuck", hang, timeout=0.05), step("next", after=("stuck",)))
        stuck, following = stop.run(Phase)
        assert (stuck.fate, following.fate) == (Fate.TIMED_OUT, Fate.OK)
        assert stuck.why == "not done within its timeout of 50ms; abandoned"
        assert "self.released.wait()" in stuck.trace
        assert "self.released.wait()" in caplog.text
        assert [record.levelno for record in caplog.records] == [logging.WARNING, logging.INFO]
        assert stop.abandoned == ("stuck",)
        assert not stop.finished()
    assert stop.finished()


@pytest.mark.parametrize(("policy", "fate"), [("skip_dependents", "skipped"), ("abort", "skipped"), ("continue", "ok")])
def test_a_timeout_is_a_failure_to_others(policy, fate):
    """`on_failure` applies to a step that timed out as to one that failed."""
    with hanging() as hang:
        results = run(step("a", hang, timeout=0.02, on_failure=policy), step("b", after=("a",)))
    assert fates(results) == {"a": "timed_out", "b": fate}


def test_an_abandoned_attempt_is_not_repeated():
    """A step that still runs in its thread is not started again, whatever its retries are."""
    with hanging() as hang:
        result = run(step("a", hang, timeout=0.02, retries=3))["a"]
    assert (result.fate, result.attempts) == (Fate.TIMED_OUT, 1)


def test_an_abandoned_step_makes_room():
    """A hanging step does not hold its place under the bound once it is abandoned."""
    with hanging() as hang:
        results = run(step("a", hang, timeout=0.02), step("b"), max_parallel=1)
    assert fates(results) == {"a": "timed_out", "b": "ok"}


def test_a_late_end_changes_nothing():
    """The result of a step that was abandoned before does not change."""
    with hanging() as hang:
        stop = runner(step("a", hang, timeout=0.02, phase=Phase.CLOSE), step("b", phase=Phase.FINAL))
        stop.run([Phase.CLOSE])
    assert [str(result.fate) for result in stop.run(Phase)] == ["ok"]
    assert [str(result.fate) for result in stop.results] == ["timed_out", "ok"]


def test_the_reserve_is_kept_for_those_it_is_for():
    """Within the reserve ordinary steps find no time left, while flush, final and always still run."""
    results = run(
        step("ordinary"),
        step("always", always=True),
        *(step(str(phase), phase=phase) for phase in Phase),
        deadline=2.0,
        reserve=3.0,
        clock=at(100.0),
    )
    ran = {name for name, result in results.items() if result.fate is Fate.OK}
    assert ran == {"always", "flush", "final"}
    assert {result.why for result in results.values() if result.name not in ran} == {"no time left"}


def test_a_hanging_flush_leaves_always_its_share():
    """A step of flush that hangs may use the reserve, except the shares of `always` steps, which may use it as well."""
    limits = {}

    def look(context):
        limits[context.policy] = context.limit

    run(
        step("telemetry", look, phase=Phase.FLUSH),
        step("lease", look, phase=Phase.FINAL, always=True),
        step("bye", look, phase=Phase.FINAL, always=True, after=("lease",)),
        deadline=10.0,
        reserve=3.0,
        clock=at(100.0),
    )
    assert limits == {"telemetry": 108.0, "lease": 109.0, "bye": 110.0}


def test_past_the_deadline_nothing_begins():
    """After the deadline not even a step marked always begins."""
    results = run(step("a", always=True), step("b", phase=Phase.FINAL), deadline=0.0, clock=at(100.0))
    assert {result.why for result in results.values()} == {"no time left"}


def test_a_hanging_step_leaves_the_reserve_alone():
    """An ordinary step with a long timeout ends where the reserve begins, so final has all of the reserve."""
    left = []
    with hanging() as hang:
        results = run(
            step("stuck", hang),
            step("bye", lambda context: left.append(context.remaining()), phase=Phase.FINAL),
            deadline=PATIENCE + 0.1,
            reserve=PATIENCE,
        )
    assert fates(results) == {"stuck": "timed_out", "bye": "ok"}
    assert "when the stop's time was used up" in results["stuck"].why
    assert PATIENCE - MARGIN < left[0] <= PATIENCE


def test_nothing_is_retried_without_time():
    """A step that fails when the time is up is not retried."""
    clock = [100.0]

    def fail_late(_context):
        clock[0] += 5.0
        raise ValueError

    late = step("a", fail_late, retries=3)
    late = replace(late, action=replace(late.action, grace=lambda _fields: 1.0))
    result = run(late, deadline=5.0, clock=lambda: clock[0])["a"]
    assert (result.fate, result.attempts) == (Fate.FAILED, 1)


def test_hurry_ends_what_hangs():
    """A hurried stop abandons a running step at once; the remaining steps share the remaining time."""
    with hanging() as hang:
        stop = runner(step("stuck", hang), step("bye", phase=Phase.FINAL), reserve=5.0)
        begun = time.monotonic()
        with in_background(lambda: stop.run(Phase)) as results:
            assert hang.entered.wait(PATIENCE)
            assert stop.running == ("stuck",)
            stop.hurry(0.05)
        assert time.monotonic() - begun < 0.05 + MARGIN
        (stuck, bye) = results[0]
    assert (stuck.fate, bye.fate, bye.why) == (Fate.TIMED_OUT, Fate.SKIPPED, "no time left")


def test_hurry_shrinks_what_a_step_has_left():
    """The remaining time of a running step shrinks when the stop is hurried."""
    entered, hurried, left = threading.Event(), threading.Event(), []

    def look(context):
        left.append(context.remaining())
        entered.set()
        hurried.wait(PATIENCE)
        left.append(context.remaining())

    stop = runner(step("a", look, timeout=15.0))
    with in_background(lambda: stop.run(Phase)):
        assert entered.wait(PATIENCE)
        stop.hurry(5.0)
        hurried.set()
    assert left[0] > 10.0
    assert left[1] <= 5.0


def test_hurry_never_gives_more_time():
    """A deadline that is nearer than the hurry stays; the reserve is given up."""
    stop = runner(step("a"), deadline=2.0, reserve=3.0, clock=at(100.0))
    stop.hurry(60.0)
    assert [result.why for result in stop.run(Phase)] == [""]
    stop = runner(step("a"), deadline=2.0, clock=at(100.0))
    stop.hurry(0.0)
    stop.hurry(60.0)
    assert [result.why for result in stop.run(Phase)] == ["no time left"]


def test_the_lock_of_the_log_is_no_way_to_stay():
    """A step that hangs while it holds the lock of the log does not delay the run past the deadline."""
    logger = logging.getLogger("flaskd.cleanup")
    output = logging.Handler()
    output.emit = lambda _record: None
    logger.addHandler(output)
    try:
        with hanging() as hang:

            def hold(context):
                with output.lock:
                    hang(context)

            begun = time.monotonic()
            results = run(step("a", hold), step("b", phase=Phase.FINAL), deadline=0.3, reserve=0.1)
            assert time.monotonic() - begun < 0.3 + MARGIN
        assert fates(results) == {"a": "timed_out", "b": "ok"}
    finally:
        logger.removeHandler(output)


def test_a_stray_thread_of_a_step_is_not_waited_for():
    """A step that leaves a non-daemon thread running is over when it returns."""
    with hanging() as hang:
        stray = threading.Thread(target=hang, args=(None,), daemon=False)
        stop = runner(step("a", lambda _context: stray.start()))
        (result,) = stop.run(Phase)
        assert result.fate is Fate.OK
        assert stop.finished()
        assert stray.is_alive()
    stray.join(PATIENCE)


def test_everything_hangs_and_the_run_returns():
    """With a hanging step in every phase the run ends at the deadline, with a result for every step."""
    with hanging() as hang:
        begun = time.monotonic()
        steps = [step(str(phase), hang, phase=phase, timeout=0.1, always=phase is Phase.CLOSE) for phase in Phase]
        results = run(*steps, deadline=0.35, reserve=0.1)
        assert time.monotonic() - begun < 0.35 + MARGIN
    assert len(results) == len(Phase)
    assert {result.fate for result in results.values()} <= {Fate.TIMED_OUT, Fate.SKIPPED}


def test_what_a_step_leaves_to_be_called_holds_nobody_up():
    """A step's `on_hurry` and `last_resort` are called, and delay neither hurry nor run if they block."""
    with hanging() as hang:
        asked = threading.Semaphore(0)

        def block():
            asked.release()
            hang.released.wait()

        def stay(context):
            context.on_hurry = context.last_resort = block
            hang(context)

        stop = runner(step("a", stay))
        with in_background(lambda: stop.run(Phase)) as results:
            assert hang.entered.wait(PATIENCE)
            begun = time.monotonic()
            stop.hurry(0.05)
            assert asked.acquire(timeout=PATIENCE)
        assert time.monotonic() - begun < 0.05 + MARGIN
        assert asked.acquire(timeout=PATIENCE)
        assert results[0][0].fate is Fate.TIMED_OUT


def context_of(clock, *, started=100.0, timeout=5.0, reserved=False, deadline=110.0, reserve=2.0, waiting=0):
    """Give the context of a step that began at `started`, its budget made then."""
    clock[0] = started
    budget = Budget(deadline, reserve, lambda: clock[0], always=waiting)
    return StepContext("a", Phase.FINAL, "idle", "idle: 30m", None, 1, started, timeout, reserved, budget, waiting)


@pytest.mark.parametrize(
    ("more", "grace", "ends", "ending_begins", "given_up"),
    [
        ({}, 1.0, 105.0, 105.0, 107.0),  # its own timeout, and room for the ending after it
        ({"timeout": 20.0}, 1.0, 108.0, 107.0, 108.1),  # the reserve: the ending begins earlier, so that it fits
        ({"timeout": 20.0, "reserved": True}, 1.0, 110.0, 109.0, 110.1),
        ({"timeout": 20.0}, 60.0, 108.0, 104.0, 108.1),  # a long grace leaves half of the time for the work
        ({"timeout": 7.5}, 2.0, 107.5, 106.0, 108.1),
        ({}, 0.0, 105.0, 105.0, 106.0),
        # Other steps wait for shares of 1 s and of 0.02 s: a late ending leaves them at least half.
        ({"timeout": 20.0, "reserved": True, "waiting": 1}, 1.0, 109.0, 108.0, 109.1),
        ({"timeout": 20.0, "reserved": True, "waiting": 99}, 0.0, 108.02, 108.02, 108.03),
    ],
)
def test_the_moments_of_a_step(more, grace, ends, ending_begins, given_up):
    """The moments at which a step times out, an ending with a grace begins, and the runner abandons it."""
    context = context_of([0.0], **more)
    assert context.ends == pytest.approx(ends)
    assert context.ends_with(grace) == pytest.approx(ending_begins)
    assert context.given_up_at(grace) == pytest.approx(given_up)
    assert context.given_up_at(None) == context.ends


def test_the_moments_after_a_hurry():
    """After a hurry half of the remaining time is for the work, and the rest for the ending."""
    clock = [0.0]
    context = context_of(clock, timeout=60.0)
    clock[0] = 104.0
    context.budget.hurry(1.0)
    assert (context.ends, context.ends_with(2.0)) == (105.0, 104.5)
    assert context.remaining() == 1.0
    clock[0] = 106.0
    assert context.remaining() == 0.0
