import logging
import threading

import pytest
from cleanup_kit import Reason, fates, hanging, run, runner, step
from patience import PATIENCE

from flaskd.cleanup import Fate, Spare, StepFailedError, StepTimedOutError, results_as_json
from flaskd.config import Phase
from flaskd.process.threads import waited_for


def raising(error):
    """Give an action that raises."""

    def action(_context):
        raise error

    return action


@pytest.fixture(autouse=True)
def _log_everything(caplog):
    caplog.set_level(logging.DEBUG, logger="flaskd.cleanup")


def test_ok_carries_the_detail(caplog):
    """A step that returns is ok; its text is in the result and in one line of the log."""
    result = run(step("tidy", lambda _context: "3 things"))["tidy"]
    assert (result.fate, result.why, result.detail, result.attempts) == (Fate.OK, "", "3 things", 1)
    assert result.took >= 0
    assert result.started >= 0
    (line,) = (record.getMessage() for record in caplog.records)
    assert line.startswith("cleanup quiesce/tidy: ok in ")
    assert line.endswith(", 3 things")


def test_an_exception_is_a_failure_with_its_traceback(caplog):
    """An exception becomes type and message in the result, and its traceback is logged as an error."""
    result = run(step("tidy", raising(LookupError("no such thing"))))["tidy"]
    assert (result.fate, result.why) == (Fate.FAILED, "LookupError: no such thing")
    assert "raise error" in result.trace
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "Traceback" in record.getMessage()
    assert "LookupError: no such thing" in record.getMessage()


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_nothing_that_a_step_raises_gets_out(error):
    """SystemExit and the like fail the step and end nothing else."""
    results = run(step("a", raising(error)), step("b", phase=Phase.FINAL))
    assert fates(results) == {"a": "failed", "b": "ok"}
    assert type(error).__name__ in results["a"].why


def test_an_exception_that_cannot_be_shown_is_a_failure():
    """An exception whose own text raises is reported all the same."""

    class NastyError(Exception):
        def __str__(self):
            raise SystemExit(1)

    assert "NastyError" in run(step("a", raising(NastyError())))["a"].why


@pytest.mark.parametrize(
    ("error", "fate"), [(StepFailedError("no app"), Fate.FAILED), (StepTimedOutError("too slow"), Fate.TIMED_OUT)]
)
def test_an_action_words_its_own_failure(error, fate):
    """A StepFailedError is reported with its own words, without a traceback."""
    result = run(step("a", raising(error)))["a"]
    assert (result.fate, result.why, result.trace) == (fate, str(error), "")


def test_words_of_many_lines_become_one_line():
    """Details and errors with several lines are logged as one line."""
    results = run(step("a", lambda _context: "x\ny\r\n"), step("b", raising(ValueError("x\n\ny"))))
    assert results["a"].detail == "x | y"
    assert results["b"].why == "ValueError: x | y"


def test_the_step_knows_who_asks():
    """The context has policy, phase, reason and app, and the thread is named after the policy."""
    seen = []

    def look(context):
        seen.append((context.policy, context.phase, context.reason, context.reason_text, context.app))
        seen.append(threading.current_thread().name)
        assert threading.current_thread() not in waited_for()

    app = object()
    assert fates(run(step("look", look), app=app)) == {"look": "ok"}
    assert seen == [("look", Phase.QUIESCE, "signal", "signal: SIGTERM", app), "flaskd-cleanup-look"]


@pytest.mark.parametrize(
    ("more", "fate"),
    [
        ({"reasons": ("signal", "idle")}, "ok"),
        ({"reasons": ("idle",)}, "skipped"),
        ({"outcome": "degraded"}, "ok"),
        ({"outcome": "clean"}, "skipped"),
        ({"reasons": ("idle",), "always": True}, "skipped"),
    ],
)
def test_when_filters(more, fate):
    """A step whose `when` does not fit the reason or the outcome is skipped, even if it is marked always."""
    stop = runner(step("a", **more), reason=Reason("signal"))
    (result,) = stop.run(Phase, "degraded")
    assert (str(result.fate), result.why) == (fate, "" if fate == "ok" else "its `when` does not fit this stop")


def test_phases_and_edges_make_the_order():
    """Steps run by phase, and within a phase by their edges, whatever their order in the file."""
    order = []
    results = run(
        step("last", lambda _context: order.append("last"), phase=Phase.FINAL),
        step("second", lambda _context: order.append("second"), after=("first",)),
        step("first", lambda _context: order.append("first")),
        step("early", lambda _context: order.append("early"), phase=Phase.ANNOUNCE),
    )
    assert order == ["early", "first", "second", "last"]
    assert list(results) == order


def test_steps_of_a_phase_run_in_parallel_up_to_the_bound():
    """With a bound of two, two steps of a phase run at the same time, and never three."""
    meeting = threading.Barrier(2, timeout=PATIENCE)
    lock = threading.Lock()
    inside, most = 0, 0

    def meet(_context):
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        meeting.wait()
        with lock:
            inside -= 1
        meeting.wait()  # both are counted out before either ends and lets another begin

    results = run(*(step(f"s{number}", meet) for number in range(6)), max_parallel=2)
    assert set(fates(results).values()) == {"ok"}
    assert most == 2


def test_continue_lets_dependents_run():
    """With on_failure continue, steps that come after a failed one still run."""
    results = run(step("a", raising(ValueError())), step("b", after=("a",)))
    assert fates(results) == {"a": "failed", "b": "ok"}


def test_skip_dependents_skips_all_that_come_after():
    """All steps that come after the failed one are skipped, also indirectly and in later phases; others run."""
    results = run(
        step("a", raising(ValueError()), on_failure="skip_dependents"),
        step("b", after=("a",)),
        step("c", after=("b",), phase=Phase.FINAL),
        step("d", after=("a",), always=True),
        step("e"),
    )
    assert fates(results) == {"a": "failed", "b": "skipped", "c": "skipped", "d": "ok", "e": "ok"}
    assert {results[name].why for name in "bc"} == {"after a, which failed"}


def test_abort_skips_everything_but_always():
    """After an abort no further step begins, in this or a later phase, unless it is marked always."""
    results = run(
        step("a", raising(ValueError()), on_failure="abort"),
        step("b", after=("a",)),
        step("c", phase=Phase.FINAL),
        step("d", phase=Phase.FINAL, always=True),
    )
    assert fates(results) == {"a": "failed", "b": "skipped", "c": "skipped", "d": "ok"}
    assert {results[name].why for name in "bc"} == {"aborted by a"}


def test_retries_until_it_works(caplog):
    """A failed step is retried as often as `retries` allows, and each failure is logged."""
    attempts = []

    def third_time_lucky(context):
        attempts.append(context.attempt)
        if context.attempt < 3:
            raise ValueError(f"try {context.attempt}")

    result = run(step("a", third_time_lucky, retries=5))["a"]
    assert (result.fate, result.attempts, attempts) == (Fate.OK, 3, [1, 2, 3])
    assert "failed, ValueError: try 1; attempt 2 follows" in caplog.text


def test_retries_end():
    """A step that fails in all its attempts has failed with the reason of the last one."""
    result = run(step("a", lambda context: raising(ValueError(context.attempt))(context), retries=2))["a"]
    assert (result.fate, result.attempts, result.why) == (Fate.FAILED, 3, "ValueError: 3")


def test_runs_in_parts():
    """Several calls of `run` share their results: each step runs once, and an earlier failure still counts."""
    ran = []
    stop = runner(
        step("a", raising(ValueError()), phase=Phase.ANNOUNCE, on_failure="skip_dependents"),
        step("b", phase=Phase.DRAIN, after=("a",)),
        step("c", lambda _context: ran.append("c"), phase=Phase.FINAL),
    )
    assert [result.name for result in stop.run([Phase.ANNOUNCE])] == ["a"]
    assert [result.why for result in stop.run([Phase.DRAIN])] == ["after a, which failed"]
    assert [result.name for result in stop.run(reversed(Phase))] == ["c"]
    assert stop.run(Phase) == []
    assert ran == ["c"]
    assert [result.name for result in stop.results] == ["a", "b", "c"]
    assert stop.finished()


def test_progress_is_told_of_each_result():
    """`on_progress` gets each result once; if it raises, that is logged and does no harm."""
    told = []

    def progress(result):
        told.append(result.name)
        raise ValueError(result.name)

    assert fates(run(step("a"), step("b", after=("a",)), on_progress=progress)) == {"a": "ok", "b": "ok"}
    assert told == ["a", "b"]


def test_progress_that_blocks_holds_nobody_up():
    """An `on_progress` that never returns does not hold up the runner."""
    with hanging() as hang:
        stop = runner(step("a"), step("b", phase=Phase.FINAL), deadline=0.3, on_progress=hang)
        assert [str(result.fate) for result in stop.run(Phase)] == ["ok", "ok"]
        assert hang.entered.is_set()


def test_without_threads_steps_fail_and_the_stop_goes_on(monkeypatch, caplog):
    """If no thread can be started, each step reports that, the log is written, and the run ends."""

    def refuse(_thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        results = run(step("a", on_failure="skip_dependents"), step("b", after=("a",)))
    assert fates(results) == {"a": "failed", "b": "skipped"}
    assert results["a"].why == "no thread can be had to run it"
    assert "cleanup quiesce/b: skipped, after a, which failed" in caplog.text


@pytest.fixture
def spare():
    """A thread that was made in advance."""
    spare = Spare()
    spare.start()
    yield spare
    spare.dismiss()
    spare.thread.join(PATIENCE)
    assert not spare.thread.is_alive()


@pytest.fixture
def no_threads(monkeypatch, spare):
    """From now on no thread can be started."""

    def refuse(_thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        yield


@pytest.mark.usefixtures("no_threads")
def test_without_threads_the_spare_one_runs_them_all(spare):
    """Without new threads, steps run one after the other in the spare thread."""
    seen = []

    def note(_context):
        seen.append(threading.current_thread())

    steps = [step(name, note, phase=phase) for name, phase in zip("abcd", list(Phase)[2:6], strict=True)]
    beside = [step(f"beside-{name}", note) for name in "abc"]
    results = runner(*steps, *beside, spare=spare).run(Phase)
    assert {str(each.fate) for each in results} == {"ok"}
    assert seen == [spare.thread] * 7


@pytest.mark.usefixtures("no_threads")
def test_the_spare_thread_tries_again_and_survives_what_a_step_raises(spare):
    """A retry uses the spare thread again, and SystemExit ends only its step."""
    results = {
        each.name: each
        for each in runner(step("a", raising(SystemExit()), retries=2), step("b", phase=Phase.FINAL), spare=spare).run(
            Phase
        )
    }
    assert (results["a"].fate, results["a"].attempts) == (Fate.FAILED, 3)
    assert results["b"].fate is Fate.OK


@pytest.mark.usefixtures("no_threads")
def test_a_step_that_hangs_in_the_spare_thread_is_abandoned(spare):
    """A step that hangs in the spare thread is abandoned in time; later steps report that they have no thread."""
    with hanging() as hang:
        found = runner(step("a", hang, timeout=0.1), step("b", phase=Phase.FINAL), spare=spare).run(Phase)
        assert [(each.name, str(each.fate)) for each in found] == [("a", "timed_out"), ("b", "failed")]
        assert found[1].why == "no thread can be had to run it"
        spare.dismiss()


def test_results_as_json():
    """In the record all fates have the same plain keys."""
    results = run(step("a", lambda _context: "done"), step("b", reasons=("idle",))).values()
    shown = results_as_json(results)
    assert shown.keys() == {"a", "b"}
    assert shown["a"].keys() == shown["b"].keys()
    assert (shown["a"]["fate"], shown["a"]["detail"], shown["a"]["attempts"]) == ("ok", "done", 1)
    assert (shown["b"]["fate"], shown["b"]["why"], shown["b"]["took"]) == (
        "skipped",
        "its `when` does not fit this stop",
        0.0,
    )


def test_a_detail_that_cannot_be_shown_is_a_failure():
    """A step whose result raises when it is made text has failed, and ends nothing else."""

    class Nasty:
        def __str__(self):
            raise SystemExit(1)

    results = run(step("a", lambda _context: Nasty()), step("b", phase=Phase.FINAL))
    assert fates(results) == {"a": "failed", "b": "ok"}
    assert results["a"].why == "SystemExit"
