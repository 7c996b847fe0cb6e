"""What is said of a plan before it runs."""

import pytest
from cleanup_kit import step

from flaskd.cleanup import Fate, Frame, Plan, overview
from flaskd.cleanup.preview import latest, plan_from, rehearse, simulated
from flaskd.config import Phase
from flaskd.errors import UsageError

FRAME = Frame(deadline=25.0, reserve=3.0, announce=0.0, drain=15.0, max_parallel=8)


def fates(plan, hang, frame=FRAME):
    """Give each step's fate and moments."""
    return {
        each.name: (str(each.fate), each.started, each.started + each.took, each.why)
        for each in rehearse(plan, frame, hang)
    }


PLAN = Plan(
    (
        step("jobs", timeout=4.0),
        step("db", phase=Phase.CLOSE, timeout=2.0, on_failure="skip_dependents"),
        step("files", phase=Phase.CLOSE, timeout=10.0, after=("db",)),
        step("bye", phase=Phase.FINAL, timeout=5.0),
    )
)


def test_a_step_that_hangs_takes_its_time_and_its_dependents():
    """After a drain that uses all of its time, each step begins when those before it are over or abandoned."""
    said = "not done within its timeout of 2s; abandoned"
    assert fates(PLAN, {"db"}) == {
        "jobs": ("ok", 15.0, 15.0, ""),
        "db": ("timed_out", 15.0, 17.0, said),
        "files": ("skipped", 17.0, 17.0, "after db, which timed out"),
        "bye": ("ok", 17.0, 17.0, ""),
    }


def test_what_the_deadline_leaves():
    """When the time is used up, ordinary steps are cut short or skipped, and the others still have the reserve."""
    tight = Frame(deadline=18.0, reserve=2.0, announce=0.0, drain=15.0, max_parallel=8)
    result = fates(PLAN, {"jobs", "bye"}, tight)
    assert result["jobs"] == ("timed_out", 15.0, 16.0, "not done after 1s, when the stop's time was used up; abandoned")
    assert result["db"][0] == "skipped"
    assert result["bye"][:3] == ("timed_out", 16.0, 17.5)


def test_the_drain_is_cut_by_what_is_kept_in_reserve():
    """A drain never uses the reserve, and begins after the announce."""
    frame = Frame(deadline=10.0, reserve=3.0, announce=2.0, drain=15.0, max_parallel=8)
    assert fates(PLAN, set(), frame)["bye"][1] == 9.0
    short = Frame(deadline=10.0, reserve=3.0, announce=2.0, drain=1.0, max_parallel=8)
    assert fates(PLAN, set(), short)["jobs"][1] == 3.0


def test_what_is_said_of_the_drain_is_what_it_may_take():
    """If the deadline leaves less than the drain's timeout, the text says the lower value."""
    assert Frame(6.0, 2.0, 0.0, 15.0, 8).text().endswith("; the drain may take 4s")


def test_the_latest_moments():
    """A step's latest moments are reached if all steps before it use all their time, retries and graces."""
    assert latest(PLAN, FRAME) == {"jobs": (15.0, 19.0), "db": (19.0, 21.0), "files": (21.0, 22.0), "bye": (22.0, 24.5)}
    retried = Plan((step("jobs", timeout=2.0, retries=1), step("db", phase=Phase.CLOSE, timeout=1.0)))
    assert latest(retried, FRAME) == {"jobs": (15.0, 19.0), "db": (19.0, 20.0)}
    one_by_one = Plan((step("a", timeout=4.0), step("b", timeout=4.0), step("c", timeout=4.0)))
    frame = Frame(deadline=25.0, reserve=3.0, announce=0.0, drain=15.0, max_parallel=1)
    assert latest(one_by_one, frame) == {"a": (15.0, 19.0), "b": (19.0, 22.0), "c": None}


def test_conditions_and_aborts_do_not_shorten_the_latest_moments():
    """A step that may be skipped still counts for the latest moments of the others."""
    plan = Plan(
        (
            step("a", timeout=1.0, on_failure="abort"),
            step("b", timeout=1.0, phase=Phase.CLOSE, reasons=("idle",), outcome="degraded"),
        )
    )
    assert latest(plan, FRAME)["b"] == (16.0, 17.0)


def test_the_table_says_what_matters():
    """The table lists the steps in order, with their moments and settings that are no defaults, below the budget."""
    plan = Plan(
        (
            step("a", timeout=1.5),
            step(
                "bee", timeout=60.0, phase=Phase.FINAL, after=("a",), always=True, retries=1, reasons=("idle", "signal")
            ),
            step("c", phase=Phase.FINAL, on_failure="skip_dependents", retries=2, outcome="degraded"),
        )
    )
    answer = overview(plan, FRAME)
    assert answer["text"].splitlines() == [
        "deadline 25s, of which 3s are kept for flush, final and what is marked always; the drain may take 15s",
        "PHASE    POLICY  ACTION  TIMEOUT  BEGINS BY  ENDS BY  NOTES",
        "quiesce  a       test    1.5s     15s        16.5s",
        "final    bee     test    1m       16.5s      24.5s    after a; always; 1 retry; when reason is idle or signal",
        "final    c       test    20s      16.5s      24.5s    on failure skip dependents; 2 retries; when outcome is degraded",
    ]
    assert [(each["begins_by"], each["ends_by"]) for each in answer["policies"]] == [
        (15.0, 16.5),
        (16.5, 24.5),
        (16.5, 24.5),
    ]


def test_an_empty_plan_says_so():
    """Without policies the table is one sentence."""
    frame = Frame(deadline=25.0, reserve=0.0, announce=0.0, drain=15.0, max_parallel=8)
    assert overview(Plan(), frame)["text"] == "deadline 25s; the drain may take 15s\nno cleanup policies"


def test_what_was_described_can_be_rehearsed():
    """A plan that came over the control socket is rehearsed like the original."""
    again = plan_from(overview(PLAN, FRAME)["policies"])
    for hang in (set(), {"db"}, {"jobs", "bye"}):
        assert fates(again, hang) == fates(PLAN, hang)
    results, text = simulated(again, FRAME, ["db"])
    assert [each.fate for each in results] == [Fate.OK, Fate.TIMED_OUT, Fate.SKIPPED, Fate.OK]
    assert text.splitlines()[1:] == [
        "PHASE    POLICY  FATE       BEGINS  ENDS  WHY",
        "quiesce  jobs    ok         15s     15s",
        "close    db      timed_out  15s     17s   not done within its timeout of 2s; abandoned",
        "close    files   skipped    -       -     after db, which timed out",
        "final    bye     ok         17s     17s",
    ]


def test_a_name_that_no_step_has():
    """The fault lists the steps' names, the most similar first."""
    with pytest.raises(UsageError, match=r'there is no step "dbb"; did you mean "db"\?; the plan has db, '):
        simulated(PLAN, FRAME, ["dbb"])
    with pytest.raises(UsageError, match="the plan has no steps"):
        simulated(Plan(), FRAME, ["db"])


def test_what_the_exit_waits_for_is_named():
    """The plan says what the exit waits for, and how long at most; for programs as a list of names."""
    told = overview(Plan(), Frame(25, 3, 0, 15, 8, exit_wait=5), ["thread/mailer", "atexit/shop.bye"])
    assert told["exit"] == ["thread/mailer", "atexit/shop.bye"]
    assert told["budget"]["exit_wait"] == 5
    assert told["text"].splitlines()[-1] == "the exit waits at most 5s for: thread/mailer, atexit/shop.bye"
    assert "the exit waits" not in overview(Plan(), Frame(25, 3, 0, 15, 8))["text"]
