import ast
import itertools
import time
from pathlib import Path

import pytest

from flaskd import lifecycle
from flaskd.errors import NotNowError
from flaskd.lifecycle import TABLE, Event, Lifecycle, State, StopReason

PACKAGE = Path(lifecycle.__file__).parent
STARTING, READY, RELOADING, DRAINING, DRAINED, STOPPING, STOPPED, FAILED = State


def in_state(state):
    life = Lifecycle()
    life.state = state
    return life


@pytest.fixture
def clock(monkeypatch):
    """A wall clock that moves on by a second each time it is read."""
    seconds = itertools.count(1_000_000)
    monkeypatch.setattr(lifecycle.time, "time", lambda: float(next(seconds)))


@pytest.mark.parametrize("event", Event)
@pytest.mark.parametrize("state", State)
def test_every_event_in_every_state(state, event, clock):
    """In each state an event leads where the table says, or is refused and changes nothing; `since` follows the state."""
    life = in_state(state)
    since = life.since
    if (state, event) in TABLE:
        following = TABLE[state, event]
        assert life.check(event) is following
        assert (life.state, life.since) == (state, since)
        assert life.handle(event) is following
        assert life.state is following
        assert (life.since != since) is (following is not state)
    else:
        for refuse in (life.check, life.handle):
            with pytest.raises(NotNowError) as refused:
                refuse(event)
            assert str(refused.value) == f"cannot {event}: flaskd is {state}"
        assert (life.state, life.since) == (state, since)


def test_every_state_is_reached():
    """Every state can be reached."""
    reached = {Lifecycle().state}
    while more := {after for (before, _), after in TABLE.items() if before in reached} - reached:
        reached |= more
    assert reached == set(State)


def test_every_event_leads_somewhere():
    """Every event is accepted in at least one state."""
    assert {event for _, event in TABLE} == set(Event)


@pytest.mark.parametrize("state", [STOPPED, FAILED])
def test_the_end_is_the_end(state):
    """No event leads out of stopped and failed."""
    assert not [event for before, event in TABLE if before is state]


@pytest.mark.parametrize("state", [STARTING, READY, DRAINING, DRAINED, STOPPING])
def test_a_stop_is_taken_wherever_events_are_handled(state):
    """A stop is accepted in every state before the end in which events are handled."""
    assert in_state(state).handle(Event.STOP) is STOPPING


def test_resume_while_stopping_is_refused_by_its_words():
    """A resume during a stop is refused with words that say so."""
    with pytest.raises(NotNowError, match=r"^cannot resume: flaskd is stopping$"):
        in_state(STOPPING).handle(Event.RESUME)


@pytest.mark.parametrize(
    "way",
    [
        [(Event.STARTED, READY), (Event.DRAIN, DRAINING), (Event.DRAIN_OVER, DRAINED), (Event.RESUME, READY)],
        [(Event.STARTED, READY), (Event.DRAIN, DRAINING), (Event.DRAIN, DRAINING), (Event.RESUME, READY)],
        [(Event.STARTED, READY), (Event.RELOAD, RELOADING), (Event.RELOADED, READY)],
        [(Event.STARTED, READY), (Event.STOP, STOPPING), (Event.STOP, STOPPING), (Event.STOP_OVER, STOPPED)],
        [(Event.STOP, STOPPING), (Event.DRAIN_OVER, STOPPING), (Event.STOP_OVER, STOPPED)],
        [(Event.START_FAILED, FAILED)],
    ],
    ids=lambda way: ", ".join(event for event, _ in way),
)
def test_a_life(way):
    """The usual sequences of states are possible."""
    life = Lifecycle()
    assert life.state is STARTING
    assert [(event, life.handle(event)) for event, _ in way] == way


def test_a_clock_that_is_set_back_makes_no_age_negative(monkeypatch):
    """Ages come from the monotonic clock and are never negative; only `since` is a date."""
    life = Lifecycle()
    before, now = time.monotonic(), time.time()
    monkeypatch.setattr(lifecycle.time, "time", lambda: now - 3600)
    life.handle(Event.STARTED)
    assert life.since == now - 3600
    assert 0 <= life.age <= life.uptime < time.monotonic() - before + 5


def test_no_length_of_time_is_computed_from_the_wall_clock():
    """No code computes a length of time from `time.time()`, unless the begin outlives the process."""
    found = {
        str(path.relative_to(PACKAGE)): ast.unparse(node)
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub) and "time.time()" in ast.unparse(node)
    }
    assert found == {
        "cleanup/actions/cache.py": "time.time() - index['saved']",  # written by an earlier process
        "demo/__init__.py": "time.time() - created",  # in a cache that is kept over a restart
        "server/request.py": "time.time() - age",  # a date
        "serving/stop.py": "time.time() - self.took",  # a date
    }


def test_a_stop_reason_reads_as_kind_and_detail():
    """The reason of a stop is one line."""
    assert str(StopReason("signal", "SIGTERM")) == "signal: SIGTERM"
