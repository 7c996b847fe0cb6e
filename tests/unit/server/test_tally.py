"""How requests are counted: by outcome, by class of status, and by the time that they took and waited."""

from dataclasses import dataclass

import pytest

from flaskd.server.tally import BOUNDS, Counts


@dataclass
class Request:
    """What is counted of a request."""

    status: str = "200 OK"
    first_byte: float = 0.0
    complete: float = 0.0
    began: float = 0.0


COMMON = {"took": 0.001, "waited": 0.001, "status": "200 OK", "outcome": "completed"}


def counted(*requests):
    counts = Counts()
    for each in requests:
        counts.add(Request(each["status"], began=each["waited"] or 0.0), each["outcome"], each["took"])
    return counts.tally()


@pytest.mark.parametrize(
    "other",
    [
        {},
        {"took": BOUNDS[0]},
        {"took": 0.02},
        {"waited": 0.3},
        {"waited": None},
        {"status": "404 Not Found"},
        {"status": ""},
        {"outcome": "cut"},
        {"took": 100.0, "waited": 100.0, "status": "503 No", "outcome": "rejected"},
    ],
)
def test_each_request_is_counted_once_in_each_respect(other):
    """Whether it is counted the short way, as most are, or not; and copies of the tally do not add up."""
    request = COMMON | other
    tally = counted(COMMON, request, COMMON)
    assert sum(tally.outcomes.values()) == 3
    assert tally.outcomes[request["outcome"]] == (3 if request["outcome"] == "completed" else 1)
    digit = int(request["status"][:1] or 0)
    assert tally.statuses == [(2 if at == 2 else 0) + (at == digit) for at in range(6)]
    bucket = next((at for at, bound in enumerate(BOUNDS) if request["took"] <= bound), len(BOUNDS))
    took = [(2 if at == 0 else 0) + (at == bucket and bool(digit)) for at in range(len(BOUNDS) + 1)]
    assert tally.took.counts == took
    assert tally.took.total == pytest.approx(0.002 + (request["took"] if digit else 0))
    waits = request["waited"]
    bucket = next((at for at, bound in enumerate(BOUNDS) if waits is not None and waits <= bound), len(BOUNDS))
    waited = [(2 if at == 0 else 0) + (at == bucket and waits is not None) for at in range(len(BOUNDS) + 1)]
    assert tally.waited.counts == waited
    assert tally.waited.total == pytest.approx(0.002 + (waits or 0))


def test_a_tally_is_a_copy():
    """What is counted later does not change it."""
    counts = Counts()
    counts.add(Request(), "completed", 0.001)
    before, again = counts.tally(), counts.tally()
    counts.add(Request(), "completed", 0.001)
    assert before == again
    assert (before.outcomes["completed"], counts.tally().outcomes["completed"]) == (1, 2)
