"""Fields of answers as text for people."""

import pytest

from flaskd.present import (
    account_lines,
    as_text,
    outcome,
    record_lines,
    request_lines,
    step_line,
    thread_lines,
    worker_lines,
)
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
    """Lists of text are joined, other lists become their length, seconds become durations, nested values are left out."""
    assert as_text(fields) == text


def test_an_outcome_is_one_line():
    """An outcome is one line of words, values and hint, without gaps for empty ones."""
    assert outcome("OK", "drained", fields={"cut": []}, hint="undo: resume") == "OK drained cut=0 (undo: resume)"
    assert outcome("OK", "", fields={}) == "OK"


def test_stacks_stand_indented_below_their_threads():
    """A stack that was asked for is indented below its thread."""
    idle = {"name": "flaskd-thread-0", "id": 7, "request": None}
    busy = {"name": "flaskd-thread-1", "id": 8, "request": "GET /slow", "stack": "here\nthere\n"}
    assert thread_lines([idle, busy]) == [
        "flaskd-thread-0 (7) idle", "flaskd-thread-1 (8) GET /slow", "    here", "    there",
    ]  # fmt: skip


def test_threads_and_requests_say_which_worker_has_them():
    """With workers each line names the worker; a worker that does not answer is named in place of its threads."""
    thread = {"name": "flaskd-thread-0", "id": 7, "request": None, "worker": 1}
    silent = {"name": "worker 0 (pid 5) does not answer", "id": None, "daemon": False, "request": None, "worker": 0}
    assert thread_lines([thread, silent]) == [
        "flaskd-thread-0 (7) of worker 1 idle",
        "worker 0 (pid 5) does not answer",
    ]
    request = {
        "id": 3, "method": "GET", "path": "/", "client": "::1", "phase": "running", "age": 1.0, "sent": 0,
        "thread": "flaskd-thread-0", "stack": "", "worker": 1,
    }  # fmt: skip
    assert request_lines([request]) == [
        "3: GET / from ::1, running for 1s in flaskd-thread-0 of worker 1, 0 bytes sent"
    ]


def test_what_a_request_is_called_is_shown_with_it():
    """A request's id is shown while it is in flight, and where it was cut: in accounts, records, and of dead workers."""
    cut = {"method": "GET", "path": "/a", "phase": "running", "age": 1.0, "request_id": "4bf9", "reason": "late"}
    request = {**cut, "id": 3, "client": "::1", "sent": 0, "stack": ""}
    assert request_lines([request]) == ["3: GET /a from ::1, running for 1s, 0 bytes sent, request_id=4bf9"]
    told = "cut GET /a (running for 1.0s, request_id=4bf9): late"
    assert account_lines({"cut": [cut]}) == [told]
    assert f"cut: {told.removeprefix('cut ')}" in record_lines({"reason": "x", "cut": [cut]})


def test_that_all_workers_died_is_not_that_there_are_none():
    """If all workers died, the text names them and how many are missing; without workers it says where the app runs."""
    death = {
        "time": "2026-01-01T00:00:00Z", "slot": 0, "pid": 5, "generation": 1, "how": "it was killed by SIGKILL",
        "connections": 0, "cut": [],
    }  # fmt: skip
    first, second = worker_lines([], [death], wanted=2)
    assert first == "no worker is there, of 2 that there are to be"
    assert "(pid 5, generation 1): it was killed by SIGKILL" in second
    assert worker_lines([], [], wanted=0) == [
        "there are no workers: the app runs in the daemon itself (server.workers is 0)"
    ]


def test_workers_that_reached_a_limit_are_counted():
    """Recycled workers are counted by the key of the limit, with what is wrong below; nothing if there are none."""
    recycled = {"max_requests": 2, "max_age": 0, "max_memory": 1}
    lines = worker_lines([], [], wanted=2, recycled=recycled, trouble="worker 0 grows")
    assert lines[1:] == ["3 recycled (2 for max_requests, 1 for max_memory)", "worker 0 grows"]
    assert len(worker_lines([], [], wanted=2, recycled=dict.fromkeys(recycled, 0))) == 1


def test_a_record_that_is_not_whole_is_told_as_it_is():
    """A damaged or empty record is shown as such, and escape sequences in an error's text are removed."""
    assert record_lines({"previous": "died", "damaged": "no JSON"}) == [
        "previous run: died",
        "the record of the last stop cannot be read: no JSON",
    ]
    assert record_lines({"damaged": "no JSON"}) == ["the record of the last stop cannot be read: no JSON"]
    assert record_lines({"reason": "x", "took": None})[1] == "started: unknown, took 0s"
    assert step_line("one", {"fate": "failed", "took": 0.5, "why": "\x1b[31mred"}) == "one: failed in 500ms, ?[31mred"


def test_what_was_not_finished_is_named_in_record_and_account():
    """Unfinished work is named in the record of the last stop, and in the reply to a client that waits."""
    left = [{"name": "thread/mailer\x1b", "stack": "where it was"}]
    record = {"reason": "signal: SIGTERM", "unfinished": left}
    assert damage(record) == ""
    assert damage({"reason": "signal: SIGTERM", "unfinished": [{}]}) == 'unfinished: no "name"'
    assert "not finished: thread/mailer?" in record_lines(record)
    assert account_lines({"unfinished": left}) == ["not finished: thread/mailer?"]
    assert summary(record)["unfinished"] == 1


def test_what_a_record_had_no_room_for_is_counted():
    """The number of cut requests includes those that were left out of the record for size."""
    record = {"reason": "signal: SIGTERM", "cut": [], "omitted": {"cut": 7000}}
    assert summary(record)["cut"] == 7000
    assert "requests: completed=0 rejected=0 cut=7000" in record_lines(record)
