"""What was answered in the last minute, from counts that only grow."""

from types import SimpleNamespace

import pytest

from flaskd import snapshot
from flaskd.snapshot import Recent


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets, by its `now`."""
    found = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(snapshot, "time", SimpleNamespace(monotonic=lambda: found.now))
    return found


def test_before_a_minute_is_over_it_is_since_the_start(clock):
    """Over as many seconds as there were, with all that was counted."""
    recent = Recent()
    clock.now += 5
    assert recent.since([3, 0, 1]) == {"seconds": 5.0, "counts": [3, 0, 1]}


def test_it_is_of_the_last_minute(clock):
    """What was answered before is not in it, and it covers a minute, or less by the time between two notes."""
    recent, counts = Recent(), [0, 7]
    for _ in range(300):
        clock.now += 1
        counts[0] += 2
        recent.note(lambda: counts)
    found = recent.since(counts)
    assert 50 <= found["seconds"] <= 60
    assert found["counts"] == [2 * found["seconds"], 0]


def test_counts_are_asked_for_once_in_ten_seconds(clock):
    """To have them costs something where there are workers."""
    recent, asked = Recent(), []
    for _ in range(100):
        clock.now += 0.5
        recent.note(lambda: asked.append(clock.now) or [0])
    assert asked == [1010.0, 1020.0, 1030.0, 1040.0, 1050.0]
