"""Fields of an answer, as people read them."""

import pytest

from flaskd.present import account_lines, as_text, outcome, record_lines, step_line, thread_lines
from flaskd.protocol import damage, summary


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, ""),
        ({"in_flight": 3}, "in_flight=3"),
        ({"completed": 12, "cut": [], "took": 4.1}, "completed=12 cut=0 took=4.1s"),
        ({"cut": [{"path": "/a"}, {"path": "/b"}]}, "cut=2"),
        ({"deadline": 30.0, "soon": 0.25, "later": 5400.0, "now": 0.0}, "deadline=30s soon=250ms later=1h30m now=0s"),
        ({"state": "ready", "policies": {"a": {}}}, "state=ready"),
        ({"in_flight": 0, "cleanup": ["close-db", "warm"]}, "in_flight=0 cleanup=close-db,warm"),
        ({"listen": ("127.0.0.1:80",), "ready": True, "reason": None}, "listen=127.0.0.1:80 ready=true"),
    ],
)
def test_fields_as_text(fields, text):
    """Lists of text are joined, others shown as their length, seconds as durations, and nested values not at all."""
    assert as_text(fields) == text


def test_an_outcome_is_one_line():
    """Words, values, and what else there is to know; what is empty leaves no gap."""
    assert outcome("OK", "drained", fields={"cut": []}, hint="undo: resume") == "OK drained cut=0 (undo: resume)"
    assert outcome("OK", "", fields={}) == "OK"


def test_stacks_stand_indented_below_their_threads():
    """Those that were asked for."""
    idle = {"name": "flaskd-thread-0", "id": 7, "request": None}
    busy = {"name": "flaskd-thread-1", "id": 8, "request": "GET /slow", "stack": "here\nthere\n"}
    assert thread_lines([idle, busy]) == [
        "flaskd-thread-0 (7) idle", "flaskd-thread-1 (8) GET /slow", "    here", "    there",
    ]  # fmt: skip


def test_a_record_that_is_not_whole_is_told_as_it_is():
    """Damaged, with nothing in it, or with the escape sequences of an error's text."""
    assert record_lines({"previous": "died", "damaged": "no JSON"}) == [
        "previous run: died",
        "the record of the last stop cannot be read: no JSON",
    ]
    assert record_lines({"damaged": "no JSON"}) == ["the record of the last stop cannot be read: no JSON"]
    assert record_lines({"reason": "x", "took": None})[1] == "started: unknown, took 0s"
    assert step_line("one", {"fate": "failed", "took": 0.5, "why": "\x1b[31mred"}) == "one: failed in 500ms, ?[31mred"


def test_what_was_not_finished_is_named_in_record_and_account():
    """A stop that cut what the app had left to its end says so to who asks for the last stop, and to who waits."""
    left = [{"name": "thread/mailer\x1b", "stack": "where it was"}]
    record = {"reason": "signal: SIGTERM", "unfinished": left}
    assert damage(record) == ""
    assert damage({"reason": "signal: SIGTERM", "unfinished": [{}]}) == 'unfinished: no "name"'
    assert "not finished: thread/mailer?" in record_lines(record)
    assert account_lines({"unfinished": left}) == ["not finished: thread/mailer?"]
    assert summary(record)["unfinished"] == 1


def test_what_a_record_had_no_room_for_is_counted():
    """The number of requests that were cut is the whole one."""
    record = {"reason": "signal: SIGTERM", "cut": [], "omitted": {"cut": 7000}}
    assert summary(record)["cut"] == 7000
    assert "requests: completed=0 rejected=0 cut=7000" in record_lines(record)
