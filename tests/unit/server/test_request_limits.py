"""Limits of requests: hanging ones are given up, those that wait too long or in too long a queue are refused."""

import contextlib
import http.client
import logging
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from patience import until as patiently
from server_kit import PATIENCE, answers, app, connect, get, no_thread_left, serve, until

import flaskd
from flaskd.server import Limits
from flaskd.server.account import Account, accounts
from flaskd.server.limit_watch import LimitWatch

AFTER = 0.2
"""Seconds; most tests wait that long."""


@pytest.fixture
def limited(no_thread_left, serve):
    """Starts a server with limits."""

    def start(threads=1, **limits):
        server = serve(threads=threads)
        server.limit(Limits(**limits))
        assert server.turns(PATIENCE)
        return server

    return start


def stream(environ, start_response, kind, released):
    start_response("200 OK", [("Content-Type", kind)])
    yield b"first"
    released.wait()
    yield b"last"


# --- what hangs -------------------------------------------------------------------------------------------------------


def test_a_request_that_hangs_is_answered_with_504(limited, connect, app, answers):
    """The client gets 504 in time, its connection is closed, and the access log has a line."""
    server = limited(timeout=AFTER)
    began = time.monotonic()
    client = connect(server).send("/gate")
    response = client.response()
    assert AFTER <= time.monotonic() - began < AFTER + 5
    assert (response.status, response.last) == (504, True)
    assert client.ended()
    assert answers.get(timeout=PATIENCE)["status"] == 504


def test_head_is_answered_without_a_body(limited, connect):
    """A hanging HEAD gets the header of the 504 alone (RFC 9110 §9.3.2)."""
    client = connect(limited(timeout=AFTER)).send(get("/gate", method="HEAD"))
    status, _ = client.head()
    assert status == 504
    assert client.ended()


def test_its_thread_is_replaced(limited, connect, app):
    """With one thread, other requests are served while the given-up one goes on."""
    server = limited(timeout=AFTER)
    assert connect(server).send("/gate").response().status == 504
    assert connect(server).ask("/hello").body == b"hello"
    assert server.short == 0


def test_it_is_told_with_its_stack(limited, connect, caplog):
    """The log has the request, the setting and the stack; the account has it once as cut, and counts the limit."""
    server = limited(timeout=AFTER)
    with caplog.at_level(logging.WARNING, "flaskd.server"):
        connect(server).send("/gate?secret").response()
        until(server, lambda: server.tally().limited["request_timeout"])
        (line,) = [each.getMessage() for each in caplog.records if "cut" in each.getMessage()]
    assert "GET /gate (running for " in line
    assert "the app takes longer than server.request_timeout (200ms) allows" in line
    assert "self.released.wait()" in line
    assert "secret" not in line
    tally = server.tally()
    assert (tally.outcomes["cut"], tally.outcomes["completed"], tally.statuses[5]) == (1, 0, 1)
    assert {limit: count for limit, count in tally.limited.items() if count} == {"request_timeout": 1}
    assert server.requests() == []


def test_what_it_says_later_is_not_sent(limited, connect, app):
    """What the app writes after the 504 is not sent, and its thread serves again."""
    server = limited(timeout=AFTER)
    client = connect(server).send("/gate")
    client.response()
    app.released.set()
    assert client.ended()
    patiently(lambda: not server.left_behind())
    assert connect(server).ask("/hello").status == 200
    assert server.tally().outcomes["cut"] == 1


def test_an_answer_that_has_begun_is_broken_off(limited, connect):
    """If a part of the answer was sent, the connection is closed, so the client sees an incomplete answer."""
    client = connect(limited(timeout=AFTER)).send("/stream")
    with pytest.raises((http.client.IncompleteRead, ValueError)):
        client.response()


def test_an_answer_that_goes_on_is_not_broken_off(limited, connect, serve):
    """Each part of an answer begins the time anew: an answer that moves does not hang."""

    def app(environ, start_response):
        start_response("200 OK", [("Content-Type", "text/plain")])
        for _ in range(6):
            time.sleep(AFTER / 2)
            yield b"x"

    server = serve(app)
    server.limit(Limits(timeout=AFTER))
    assert connect(server).send("/").response().body == b"xxxxxx"


def test_a_client_that_does_not_read_is_not_a_fault_of_the_app(limited, connect):
    """While an answer waits for its client to read, the app is not given up."""
    server = limited(timeout=AFTER)
    client = connect(server, receive_buffer=4096).send("/flood")
    until(server, lambda: server.requests() and server.requests()[0].age > 4 * AFTER)
    assert server.tally().limited["request_timeout"] == 0
    client.reset()


def test_a_stream_does_not_hang(limited, connect, serve, app):
    """A stream never hangs, however far apart its events are."""
    server = serve(lambda environ, start: stream(environ, start, "text/event-stream", app.released))
    server.limit(Limits(timeout=AFTER))
    client = connect(server).send("/")
    client.head()
    until(server, lambda: server.requests()[0].age > 3 * AFTER)
    assert server.in_flight == 1
    app.released.set()


@pytest.mark.parametrize(("path", "given_up"), [
    ("/gate", True), ("/gate/export", False), ("/gate/export/x", False), ("/gate/exports", True),
    ("/gate/export/now", True), ("/gate/%65xport", False),
])  # fmt: skip
def test_a_path_has_a_limit_of_its_own(limited, connect, app, path, given_up):
    """An exact path comes before the longest pattern, and that before the general limit; null is no limit."""
    timeouts = {"/gate/export": None, "/gate/export/*": None, "/gate/export/now": AFTER, "/gate/exp*": AFTER}
    server = limited(timeout=AFTER, timeouts=timeouts)
    client = connect(server).send(path)
    app.entered(1)
    if not given_up:
        until(server, lambda: server.requests()[0].age > 3 * AFTER)
        app.released.set()
    assert client.response().status == (504 if given_up else 200)


def test_pipelined_behind_it(limited, connect, app):
    """A request pipelined behind a given-up one is not begun, and its client sees the end."""
    client = connect(limited(timeout=AFTER)).send("/gate", "/hello")
    assert client.response().status == 504
    assert client.ended()
    assert app.entered(1) == {"/gate"}


def test_so_many_threads_are_replaced(limited, connect):
    """At most as many lost threads are replaced as are configured; readiness shows the others as missing."""
    server = limited(threads=2, timeout=AFTER)
    assert [each.response().status for each in [connect(server).send("/gate") for _ in range(2)]] == [504] * 2
    assert server.short == 0
    assert [each.response().status for each in [connect(server).send("/gate") for _ in range(2)]] == [504] * 2
    until(server, lambda: server.short == 2)
    waiting = connect(server).send("/hello")
    until(server, lambda: server.queued == 1)
    assert waiting.server.in_flight == 1


def test_they_come_back(limited, connect, app):
    """After the hanging requests have ended, all threads are there again."""
    server = limited(timeout=AFTER)
    for _ in range(2):
        connect(server).send("/gate").response()
    until(server, lambda: server.short == 1)
    app.released.set()
    patiently(lambda: not server.short)
    assert connect(server).ask("/hello").status == 200


def test_a_drain_does_not_wait_for_it(limited, connect, app):
    """A drain does not wait for a request that was given up before, and its account does not have it."""
    server = limited(timeout=AFTER)
    connect(server).send("/gate").response()
    report = server.drain(PATIENCE)
    assert (report.clean, report.completed) == (True, 0)
    assert report.took < PATIENCE / 2


def test_given_up_in_a_drain(limited, connect, app):
    """A drain's account has a request that is given up during the drain, once."""
    server = limited(timeout=AFTER)
    client = connect(server).send("/gate")
    app.entered(1)
    report = server.drain(PATIENCE)
    assert [(each.path, "request_timeout" in each.reason) for each in report.cut] == [("/gate", True)]
    assert client.response().status == 504


@pytest.mark.parametrize("where", ["in a call", "while it waits"])
def test_a_process_that_stood_still(where, limited, connect, app, monkeypatch):
    """Time in which the whole process stood still is not counted against requests, whatever the loop was doing."""
    server = limited(timeout=0.5)
    client = connect(server).send("/gate")
    app.entered(1)
    stood = threading.Event()

    def stand_still():  # as SIGSTOP does
        if not stood.is_set():
            time.sleep(1.8)
            stood.set()

    if where == "in a call":
        server.loop.call(stand_still)
    else:
        poller = server.loop.context.poller
        wait = poller.wait
        monkeypatch.setattr(poller, "wait", lambda timeout: (wait(timeout), stand_still()))
        server.loop.call(lambda: None)  # so that the loop waits anew
    assert stood.wait(PATIENCE)
    assert server.turns(PATIENCE)
    assert server.in_flight == 1
    app.released.set()
    assert client.response().status == 200


def test_a_request_that_has_just_begun_when_the_process_stands_still():
    """It is not given up when the process goes on, not even the second time, but when its own time is over."""

    class Connection:
        flushed = total_outbufs_len = 0

        def give_up(self, request, why, sent):
            given_up.append(why)

    given_up, now = [], time.monotonic()
    request = SimpleNamespace(
        id=1, thread=threading.current_thread(), began=now, answered=False, channel=Connection(),
        path="/", starts_at=0, more_until=0.0,
    )  # fmt: skip
    account = SimpleNamespace(streams=set(), in_hand={1: request})
    watch = LimitWatch(SimpleNamespace(context=SimpleNamespace(account=account)), Limits(timeout=AFTER))
    for later, turned in (0.0, 0.0), (60.0, 0.0), (60.0 + AFTER / 2, 60.0 + AFTER / 2), (120.0, 60.0 + AFTER / 2):
        watch.look(now + later, now + turned)
        assert given_up == []
    watch.look(now + 120.0 + AFTER * 0.6, now + 120.0 + AFTER * 0.6)
    assert len(given_up) == 1


def test_what_moves_in_this_moment_is_not_given_up():
    """A request is not given up if its answer has moved since it was looked at."""

    class Connection:
        sent = iter([0, 5])
        total_outbufs_len = 0
        flushed = property(lambda self: next(self.sent))

        def give_up(self, request, why, sent):
            given_up.append(sent)

    given_up = []
    request = SimpleNamespace(
        id=1, thread=threading.current_thread(), began=time.monotonic() - 10, answered=False, channel=Connection(),
        path="/", starts_at=0, more_until=0.0,
    )  # fmt: skip
    account = SimpleNamespace(streams=set(), in_hand={1: request})
    watch = LimitWatch(SimpleNamespace(context=SimpleNamespace(account=account)), Limits(timeout=AFTER))
    watch.look(time.monotonic(), time.monotonic())
    assert given_up == [0]


def test_limits_change(limited, connect, app):
    """Changed limits take effect at once, also for running requests."""
    server = limited()
    client = connect(server).send("/gate")
    app.entered(1)
    server.limit(Limits(timeout=AFTER))
    assert client.response().status == 504


# --- more time --------------------------------------------------------------------------------------------------------


def more(seconds, sleeps):
    def app(environ, start_response):
        told = str(flaskd.more_time(seconds)).encode()
        threading.Event().wait(sleeps)
        start_response("200 OK", [])
        return [told]

    return app


def test_an_app_asks_for_more_time(serve, connect):
    """A request that asks for more time may take longer than its limit."""
    server = serve(more(PATIENCE, 2 * AFTER))
    server.limit(Limits(timeout=AFTER))
    assert connect(server).send("/").response().body == b"True"


def test_more_time_ends(serve, connect):
    """The extra time is the number of seconds asked for, from the call on."""
    server = serve(more(2 * AFTER, PATIENCE / 10))
    server.limit(Limits(timeout=AFTER))
    began = time.monotonic()
    assert connect(server).send("/").response().status == 504
    assert time.monotonic() - began >= 2 * AFTER


def test_less_time_is_not_asked_for(serve, connect):
    """The limit still counts if it allows more than was asked for."""
    server = serve(more(0, 2 * AFTER))
    server.limit(Limits(timeout=4 * AFTER))
    assert connect(server).send("/").response().status == 200


def test_outside_a_request():
    """Outside of a request `more_time` returns False and does not raise: the app may run under another server."""
    assert flaskd.more_time(5) is False


@pytest.fixture
def restless():
    """Runs a function again and again in another thread, which has its turn as often as can be."""
    over, before, threads = threading.Event(), sys.getswitchinterval(), []

    def run(function):
        def loop():
            while not over.is_set():
                function()

        threads.append(threading.Thread(target=loop))
        threads[0].start()

    sys.setswitchinterval(1e-6)
    yield run
    over.set()
    for each in threads:
        each.join()
    sys.setswitchinterval(before)


def test_more_time_while_servers_come_and_go(restless):
    """Another thread that starts one makes no request's wish for more time fail."""
    kept = [Account(SimpleNamespace()) for _ in range(20)]
    restless(lambda: [Account(SimpleNamespace()) for _ in range(5)])
    assert not any(flaskd.more_time(5) for _ in range(2000))
    assert len(kept) <= len(accounts)


@pytest.mark.parametrize("seconds", [-1, float("inf"), float("nan"), "5", None, True])
def test_what_is_no_time(seconds):
    """The ValueError names the value that was given."""
    with pytest.raises(ValueError, match="cannot give a request more time: expected a number of seconds, got"):
        flaskd.more_time(seconds)


# --- requests that wait for a thread ----------------------------------------------------------------------------------


def test_who_waits_too_long_is_refused(limited, connect, app, answers, caplog):
    """The client gets 503 with Retry-After, the app does not run, and the connection is kept."""
    server = limited(queue_timeout=AFTER)
    connect(server).send("/gate")
    app.entered(1)
    waiting = connect(server)
    began = time.monotonic()
    response = waiting.send("/hello").response()
    assert time.monotonic() - began >= AFTER
    assert (response.status, response.headers["Retry-After"], response.last) == (503, "5", False)
    assert b"too many requests wait" in response.body
    assert answers.get(timeout=PATIENCE)["status"] == 503
    tally = server.tally()
    assert (tally.outcomes["rejected"], tally.limited["queue_timeout"]) == (1, 1)
    assert "server.queue_timeout is 200ms" in caplog.text
    app.released.set()
    assert waiting.send("/hello").response().status == 200
    assert app.entered(1) == {"/hello"}


def test_the_oldest_go_first(limited, connect, app):
    """Requests that have waited less are still served."""
    server = limited(queue_timeout=4 * AFTER)
    connect(server).send("/gate")
    app.entered(1)
    early = connect(server).send("/hello/early")
    until(server, lambda: server.queued == 1)
    patiently(lambda: server.requests()[-1].age > 2 * AFTER)
    late = connect(server).send("/hello/late")
    assert early.response().status == 503
    app.released.set()
    assert late.response().status == 200


def test_a_client_that_left_the_queue(limited, connect, app):
    """A request whose client left the queue is not answered, and causes no error."""
    server = limited(queue_timeout=AFTER)
    connect(server).send("/gate")
    app.entered(1)
    connect(server).send("/hello").reset()
    until(server, lambda: server.queued == 0)
    app.released.set()
    assert connect(server).ask("/hello").status == 200


def test_pipelined_requests_wait_since_their_turn(limited, connect, app):
    """A pipelined request waits for a thread only since the answer before it was given."""
    server = limited(queue_timeout=AFTER)
    client = connect(server).send("/gate", "/hello")
    app.entered(1)
    until(server, lambda: server.requests()[0].age > 3 * AFTER)
    app.released.set()
    assert [client.response().status for _ in range(2)] == [200, 200]


def test_so_many_may_wait(limited, connect, app):
    """One request more than `max_queue` is refused at once; those in the queue are served."""
    server = limited(max_queue=1)
    first = connect(server).send("/gate")
    app.entered(1)
    second = connect(server).send("/hello")
    until(server, lambda: server.queued == 1)
    response = connect(server).send("/hello").response()
    assert (response.status, response.headers["Retry-After"]) == (503, "5")
    assert server.tally().limited["max_queue"] == 1
    app.released.set()
    assert [first.response().status, second.response().status] == [200, 200]


def test_nothing_is_refused_while_threads_are_free(limited, connect):
    """With `max_queue` 0, many requests one after the other are all served."""
    server = limited(threads=2, max_queue=0, queue_timeout=0.001)
    client = connect(server)
    assert {client.ask("/hello").status for _ in range(300)} == {200}


def test_a_burst_within_the_threads(limited, connect, app):
    """As many requests at once as there are threads do not count as a queue."""
    server = limited(threads=4, max_queue=0)
    clients = [connect(server).send("/gate") for _ in range(4)]
    app.entered(4)
    app.released.set()
    assert [each.response().status for each in clients] == [200] * 4


def test_a_probe_waits(limited, connect, app):
    """A probe from inside is not refused because of a limit for clients."""
    server = limited(max_queue=0, queue_timeout=AFTER)
    connect(server).send("/gate")
    app.entered(1)
    asked = []
    with contextlib.ExitStack() as stack:
        thread = threading.Thread(target=lambda: asked.append(server.probe("/hello", PATIENCE)))
        thread.start()
        stack.callback(thread.join)
        until(server, lambda: server.queued == 1)
        patiently(lambda: server.requests()[0].age > 3 * AFTER)
        app.released.set()
    assert asked == [200]


def test_health_is_answered_while_all_hang(limited, connect, app):
    """The health path needs neither a thread nor a place in the queue."""
    server = limited(max_queue=0)
    server.answer_health("/healthz", lambda: ("200 OK", "ready"))
    connect(server).send("/gate")
    app.entered(1)
    assert connect(server).send("/healthz").response().status == 200
