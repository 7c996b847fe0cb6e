"""The order in which functions that an app registers run at the stop."""

import itertools

import pytest
from cleanup_kit import run, step
from flask import Flask
from patience import PATIENCE

from flaskd.cleanup import Plan, on_stop, with_callbacks
from flaskd.config import Config, Phase
from flaskd.serving.forecast import Forecast
from flaskd.serving.loading import LoadedApp


@pytest.fixture
def app():
    return Flask("shop")


def registered(app, *wishes):
    """Register a function for each wish: its name, then maybe what it comes after and its phase."""
    for wish in wishes:
        register(app, *wish)


def register(app, name, after=(), phase=Phase.QUIESCE):
    def function():
        pass

    function.__name__ = name
    on_stop(phase=phase, after=after, app=app)(function)


def order(app, *policies):
    """Run the registered functions and give their names in the order in which they began."""
    plan = with_callbacks(Plan(policies), app, timeout=PATIENCE)
    results = run(*plan.steps).values()
    return [each.name for each in sorted(results, key=lambda each: each.started)]


@pytest.mark.parametrize(
    ("wishes", "expected"),
    [
        ([("a",), ("b",), ("c",)], "c b a"),
        ([("a",), ("b", "a"), ("c",)], "c a b"),
        # only a later phase waits for a: that is no reason to change a's own order
        ([("a",), ("b",), ("z", "b", "close")], "b a z"),
        # through another: d waits for b and so for a, while c stays where it was
        ([("a",), ("b", "a"), ("c",), ("d", "b")], "c a b d"),
        ([("a",), ("b",), ("c", ["a", "b"]), ("d",)], "d b a c"),
        ([("a", (), "close"), ("b", (), "close"), ("c",)], "c b a"),
    ],
)
def test_last_in_first_out_but_for_what_somebody_said(app, caplog, wishes, expected):
    """What `after` says is kept; of all others the last registered runs first, one at a time."""
    registered(app, *wishes)
    assert order(app) == expected.split()
    assert caplog.messages == []
    plan = with_callbacks(Plan(), app, timeout=1.0)
    same = [each for each in plan.steps if each.phase is plan.steps[0].phase]
    assert all(before.name in each.after for before, each in itertools.pairwise(same))


@pytest.mark.parametrize(
    ("wishes", "expected", "words"),
    [
        ([("a", "b"), ("b", "a")], "b a", ["b does not wait for a: b after a after b is a circle"]),
        ([("a", "a")], "a", ["a does not wait for a: a after a is a circle"]),
        (
            [("a", "c"), ("b", "a"), ("c", ["b", "a"]), ("d", "c")],
            "c d a b",
            [f"c does not wait for {other}: c after b after a after c is a circle" for other in "ba"],
        ),
        (
            [("a", "nope")],
            "a",
            ['a cannot wait for "nope": no policy or function of its phase or before has that name'],
        ),
        (
            [("a", "b"), ("b", (), "close")],
            "a b",
            ['a cannot wait for "b": no policy or function of its phase or before has that name'],
        ),
    ],
)
def test_what_cannot_be_kept_is_told_as_what_it_is(app, caplog, wishes, expected, words):
    """A circle is reported as a circle and broken at one place; an unknown name is reported as unknown."""
    registered(app, *wishes)
    assert order(app) == expected.split()
    assert caplog.messages == words


def test_functions_come_after_policies(app, caplog):
    """A function can wait for a policy of its phase; if a policy and a function have the same name, the policy is meant."""
    registered(app, ("a", "jobs"), ("jobs", ()))
    assert order(app, step("jobs")) == ["jobs", "jobs-2", "a"]
    assert caplog.messages == []


def test_a_wish_that_cannot_be_kept_is_told_once(app, caplog):
    """A wish that cannot be kept is reported only once, however often the plan is asked for."""
    registered(app, ("a", "nope"))
    outlook = Forecast()
    outlook.set(Plan(), Config.model_validate({}).cleanup, LoadedApp(app, app, "shop"))
    assert [len(outlook.plan.steps) for _ in range(3)] == [1, 1, 1]
    assert len(caplog.messages) == 1
