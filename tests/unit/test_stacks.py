"""Stacks as they are shown to people."""

import threading

import pytest
from patience import PATIENCE

from flaskd.ledger import Cut
from flaskd.present import record_lines, request_lines, thread_lines
from flaskd.stacks import folded, folded_dump, stack_of, together

SITE = "/srv/shop/.venv/lib/python3.12/site-packages"


def _stack(*frames):
    return "\n".join(f'  File "{path}", line {line}, in {name}\n    {name}()' for path, line, name in frames)


OUTER = (
    ("/usr/lib/python3.12/threading.py", 1030, "_bootstrap"),
    (f"{SITE}/flaskd/server/threads.py", 160, "_serve"),
    (f"{SITE}/waitress/task.py", 80, "service"),
    (f"{SITE}/flask/app.py", 1536, "__call__"),
)
VIEW = ("/srv/shop/views.py", 12, "report")


def test_the_apps_innermost_call_is_first():
    """The app's innermost call comes first, then its callers; the frames that call the app are one line."""
    helper = ("/srv/shop/prices.py", 3, "prices")
    assert folded(_stack(*OUTER, VIEW, helper)).splitlines() == [
        '  File "/srv/shop/prices.py", line 3, in prices',
        "    prices()",
        '  File "/srv/shop/views.py", line 12, in report',
        "    report()",
        "  ... called by 4 frames of flask, waitress, flaskd, threading",
    ]


def test_what_the_app_calls_is_folded_below_it():
    """If the app waits for a lock, or reads its request, its own line comes first, and library frames are folded."""
    wrapper = (f"{SITE}/flask_login/utils.py", 290, "decorated_view")
    inner = ("/usr/lib/python3.12/threading.py", 359, "wait")
    between = (f"{SITE}/flask/app.py", 1488, "ensure_sync")
    assert folded(_stack(wrapper, between, VIEW, inner)).splitlines() == [
        '  File "/srv/shop/views.py", line 12, in report',
        "    report()",
        "  ... calls 1 frame of threading",
        "  ... called by 1 frame of flask",
        f'  File "{SITE}/flask_login/utils.py", line 290, in decorated_view',
        "    decorated_view()",
    ]


def test_a_library_that_the_app_calls_is_folded_below_the_apps_line():
    """A request that waits for another server shows the app's line first, and what that waits in."""
    inner = (f"{SITE}/requests/api.py", 73, "get"), ("/usr/lib/python3.12/ssl.py", 1166, "read")
    assert folded(_stack(*OUTER, VIEW, *inner)).splitlines() == [
        '  File "/srv/shop/views.py", line 12, in report',
        "    report()",
        "  ... calls 2 frames of ssl, requests",
        "  ... called by 4 frames of flask, waitress, flaskd, threading",
    ]


def test_several_stacks_are_each_folded_and_equal_ones_shown_once():
    """As those of the threads of an executor that a cleanup step gave up; a traceback stays as it is."""
    other = ("/srv/shop/views.py", 90, "export")
    shown = folded(together([_stack(*OUTER, VIEW), _stack(*OUTER, other), "", _stack(*OUTER, VIEW)]))
    assert shown == f"  2 threads:\n{folded(_stack(*OUTER, VIEW))}\n\n{folded(_stack(*OUTER, other))}"
    chain = "Traceback (most recent call last):\n" + _stack(VIEW) + "\n\nDuring handling\n\nTraceback"
    assert folded(chain) == chain


def test_what_faulthandler_writes_is_folded():
    """Of a worker that hangs: its threads that are at the same place are told with their number."""
    frames = [f'  File "{path}", line {line} in {name}' for path, line, name in (*OUTER, VIEW)][::-1]
    hung = "\n".join(["(most recent call first):", *frames])
    dump = f"Thread 0x00007f01 {hung}\n\nThread 0x00007f02 [shop] {hung}\n\nCurrent thread 0x00007f03 {hung}\n"
    place = f"{frames[0]}\n  ... called by 4 frames of flask, waitress, flaskd, threading"
    assert folded_dump(dump) == f"3 threads:\n{place}"
    assert folded_dump(f"Thread 0x00007f02 [shop] {hung}\n") == f"Thread 0x00007f02 [shop]:\n{place}"
    assert folded_dump("") == ""


def test_of_a_stack_without_the_app_the_innermost_call_stays():
    """Without frames of the app the innermost call stays: an idle thread shows where it waits."""
    assert folded(_stack(*OUTER)).splitlines() == [
        f'  File "{SITE}/flask/app.py", line 1536, in __call__',
        "    __call__()",
        "  ... called by 3 frames of waitress, flaskd, threading",
    ]


@pytest.mark.parametrize(
    "path",
    [
        "/home/flask/shop.py",
        "/srv/flask/app.py",
        "/srv/shop/threading.py",
        f"{SITE}/flask_sqlalchemy/session.py",
        f"{SITE}/flaskd/demo/__init__.py",
    ],
)
def test_what_is_only_called_like_a_package_is_not_folded(path):
    """The app's folder named like a package, an extension of Flask, and the demo app are not folded."""
    frame = (path, 1, "view")
    assert _stack(frame) in folded(_stack(*OUTER, frame, VIEW))


@pytest.mark.parametrize(
    "text", ["", "worker 1 does not answer", "Traceback (most recent call last):\n" + _stack(VIEW)]
)
def test_what_is_no_stack_is_left_as_it_is(text):
    """A text in place of a stack, and a traceback, are left as they are."""
    assert folded(text) == text


def test_a_real_stack_is_folded():
    """The first line of a waiting thread's stack is in this file; a final newline does not matter."""
    may_end, waits = threading.Event(), threading.Event()

    def work():
        waits.set()
        may_end.wait(PATIENCE)

    thread = threading.Thread(target=work)
    thread.start()
    assert waits.wait(PATIENCE)
    stack = stack_of(thread)
    may_end.set()
    thread.join()
    first, _, *more = folded(stack).splitlines()
    assert first.startswith(f'  File "{__file__}"')
    assert more[-1].startswith("  ... called by ")
    assert folded(f"{stack}\n") == folded(stack)


def test_equal_stacks_are_shown_once():
    """Requests with equal stacks stand together with their number; one with another stack, or none, stands alone."""
    request = {"method": "GET", "path": "/", "client": "::1", "phase": "running", "age": 1.0, "sent": 0, "stack": ""}
    stacks = [_stack(*OUTER, VIEW), "", _stack(*OUTER, VIEW), _stack(VIEW), ""]
    told = ": GET / from ::1, running for 1s, 0 bytes sent"
    where = ['      File "/srv/shop/views.py", line 12, in report', "        report()"]
    assert request_lines([{**request, "id": number, "stack": stack} for number, stack in enumerate(stacks)]) == [
        "2 requests:",
        f"  0{told}",
        f"  2{told}",
        *where,
        "      ... called by 4 frames of flask, waitress, flaskd, threading",
        f"1{told}",
        f"3{told}",
        *where,
        f"4{told}",
    ]


def test_threads_at_the_same_place_stand_together():
    """Threads with equal stacks, such as idle ones, stand together."""
    idle = [{"name": f"flaskd-thread-{number}", "id": number, "request": None, "stack": "here"} for number in (1, 2)]
    assert thread_lines(idle) == ["2 threads:", "  flaskd-thread-1 (1) idle", "  flaskd-thread-2 (2) idle", "    here"]


def test_what_was_cut_is_told_with_its_stack_folded():
    """A cut request has its folded stack for people; programs get the whole stack."""
    stack = _stack(*OUTER, VIEW)
    cut = Cut(1, "::1", "GET", "/", 1.0, "running", stack=stack, reason="late")
    assert cut.with_stack() == f"cut {cut}\n{folded(stack)}"
    assert cut.as_json()["stack"] == stack


def test_what_was_cut_at_the_same_place_is_told_with_one_stack():
    """Each request has its entry in the log, and the last of them the stack; in the record they stand together."""
    stacks = [_stack(*OUTER, VIEW), "", _stack(*OUTER, VIEW)]
    first, queued, last = (
        Cut(number, "::1", "GET", "/", 1.0, "running", stack=stack, reason="late")
        for number, stack in enumerate(stacks)
    )
    place = folded(stacks[0])
    assert [*Cut.all_with_stacks([first, queued, last])] == [
        (first, f"cut {first}"),
        (last, f"cut {last}\n  2 requests were here:\n{place}"),
        (queued, f"cut {queued}"),
    ]
    lines = record_lines({"cut": [each.as_json() for each in (first, queued, last)]})
    at = lines.index("2 requests:")
    assert lines[at + 1 : at + 4] == [*["  cut: GET / (running for 1.0s): late"] * 2, f"    {place.splitlines()[0]}"]
