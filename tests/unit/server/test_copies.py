"""A listener of which several workers have copies: which worker accepts, and how they drain and resume."""

import http.client
import os
import select
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import patience
import pytest
from server_kit import PATIENCE, App, answers, app, connect, draining, get, no_thread_left, post, serve, until

from flaskd.errors import NotNowError
from flaskd.server import aside
from flaskd.server.poller import EpollMap
from flaskd.sockets import Address, Listener

pytestmark = [
    pytest.mark.usefixtures("no_thread_left"),
    pytest.mark.skipif(not hasattr(select, "epoll"), reason="workers need epoll"),
]
LONG = bool(os.environ.get("FLASKD_LONG"))


@pytest.fixture
def original():
    """The listener as the supervisor holds it."""
    listener = Listener.bind(Address("127.0.0.1", 0))
    listener.listen(128)
    yield listener
    listener.close()


def copy(listener):
    return Listener(listener.address, listener.socket.dup(), copied=True)


@pytest.fixture
def worker(serve, original):
    """Starts servers that accept from copies of the one listener."""
    return lambda app, threads=1, **options: serve(app, listeners=[copy(original)], threads=threads, **options)


@pytest.fixture
def busy(worker, app, connect):
    """A server whose only place is taken until the app is released."""
    server = worker(app)
    connect(server).send("/gate")
    app.entered(1)
    return server


@pytest.fixture
def patient(monkeypatch):
    """A worker that steps aside does so for longer than a test takes."""
    monkeypatch.setattr(aside, "ASIDE", 3600.0)


def test_the_app_is_told_that_other_processes_run_it(worker, serve, connect):
    """`wsgi.multiprocess` (PEP 3333) is true in a worker, and false without workers."""

    def app(environ, start_response):
        start_response("200 OK", [])
        return [str(environ["wsgi.multiprocess"]).encode()]

    assert [connect(each(app)).ask("/").body for each in (worker, serve)] == [b"True", b"False"]


# --- listeners --------------------------------------------------------------------------------------------------------


def test_an_idle_worker_takes_what_comes(patient, busy, worker, connect):
    """A worker whose places are all taken leaves connections to an idle worker."""
    assert busy.turns(PATIENCE)
    idle = worker(App())
    for _ in range(20):
        assert connect(idle).ask("/hello").status == 200
    assert (busy.connections, busy.queued) == (1, 0)


def test_a_place_that_becomes_free_lets_connections_in_at_once(patient, busy, connect, app):
    """As soon as a place becomes free, the worker accepts, without waiting for its time aside to pass."""
    client = connect(busy).send("/hello")
    assert busy.turns(PATIENCE)
    assert (busy.connections, busy.in_flight) == (1, 1)
    app.released.set()
    assert client.response().status == 200


def test_where_all_are_busy_requests_wait_for_a_place(busy, worker, connect, app):
    """Requests soon leave the kernel to wait for a place, none of them is lost, and each worker gets some."""
    other = worker(app)
    connect(other).send("/gate")
    app.entered(1)
    clients = [connect(busy).send("/hello") for _ in range(12)]
    patience.until(lambda: busy.queued + other.queued == 12)
    app.released.set()
    assert [each.response().status for each in clients] == [200] * 12


def test_a_long_backlog_is_taken_soon(busy, connect, app):
    """If all workers are busy and many clients wait, connections do not wait 20 ms each in the kernel."""
    began = time.monotonic()
    clients = [connect(busy).send("/hello") for _ in range(60)]
    patience.until(lambda: busy.queued == len(clients))
    assert time.monotonic() - began < len(clients) * aside.ASIDE
    app.released.set()
    assert {each.response().status for each in clients} == {200}


def test_the_health_path_is_answered_while_all_are_busy(busy, connect):
    """The health path is answered in less time than a probe waits."""
    busy.answer_health("/up", lambda: ("200 OK", "ready"))
    for _ in range(3):
        began = time.monotonic()
        assert connect(busy).ask("/up").status == 200
        assert time.monotonic() - began < 1


def wait_for_its_return(busy):
    """Wait until a busy worker has stepped aside for the first time, and waits for connections again."""
    until(busy, lambda: busy.loop.admission.aside._watches)  # noqa: SLF001 - from outside it looks as before its step
    assert busy.turns(PATIENCE)  # it looks once more for connections that have come meanwhile


def test_a_connection_that_comes_to_a_busy_worker_is_left_to_others_first(monkeypatch, busy, connect):
    """It is left to other workers first, also if no connection came while the worker stepped aside before."""
    wait_for_its_return(busy)
    monkeypatch.setattr(aside, "ASIDE", 3600.0)
    connect(busy).send("/hello")
    until(busy, lambda: busy.loop.admission.aside.next_moment != aside.NEVER)
    assert (busy.connections, busy.in_flight) == (1, 1)


def test_a_busy_worker_to_which_nobody_comes_is_left_asleep(monkeypatch, busy):
    """A busy worker without new connections steps aside once, not again and again."""
    wait_for_its_return(busy)
    waits = []
    wait = EpollMap.wait
    monkeypatch.setattr(EpollMap, "wait", lambda self, timeout: [waits.append(timeout), wait(self, timeout)])
    ended = time.monotonic() + 10 * aside.ASIDE
    threading.Event().wait(10 * aside.ASIDE)
    assert time.monotonic() >= ended
    assert len(waits) <= 2


def test_one_connection_is_accepted_a_turn(monkeypatch, worker, connect, original, app):
    """A worker accepts one connection in a turn, so that idle workers get the next one; an own listener is emptied."""
    server, taken = worker(app, threads=4), []
    [acceptor] = server.loop.context.acceptors
    accept = acceptor.accept_some
    monkeypatch.setattr(acceptor, "accept_some", lambda most: taken.append((most, accept(most))))
    for _ in range(3):
        assert connect(server).ask("/hello").status == 200
    assert taken == [(1, 1)] * 3


def test_a_request_that_has_come_is_read_before_the_next_connection_is_accepted(
    monkeypatch, serve, original, app, connect
):
    """A received request is read first, because it may take the last place; then all listeners have their turn."""
    other = Listener.bind(Address("127.0.0.1", 0))
    server = serve(app, listeners=[copy(original), copy(other)], threads=1)
    client, taken = connect(server), []
    until(server, lambda: server.connections == 1)
    for acceptor in server.loop.context.acceptors:
        accept = acceptor.accept_some
        monkeypatch.setattr(acceptor, "accept_some", lambda most, accept=accept: taken.append(most) or accept(most))
    held, go_on = threading.Event(), threading.Event()

    def hold():
        held.set()
        assert go_on.wait(PATIENCE)

    monkeypatch.setattr(aside, "ASIDE", 3600.0)
    server.loop.call(hold)  # so that all connections come at once
    assert held.wait(PATIENCE)
    new = [connect(server), connect(server, 1)]
    client.send("/gate")
    go_on.set()
    app.entered(1)
    assert server.turns(PATIENCE)
    assert (taken, server.connections) == ([], 1)
    app.released.set()
    for each in new:
        assert each.ask("/hello").status == 200
    other.close()


def test_a_busy_worker_at_its_limit_of_connections_is_not_woken_by_more(monkeypatch, worker, connect, app):
    """At the connection limit, connections wait in the backlog until there is room, even if places become free."""
    server = worker(app, threads=2, adjustments={"connection_limit": 3})
    busy = [connect(server).send("/gate") for _ in range(2)]
    app.entered(2)
    others = [connect(server).send("/hello") for _ in range(4)]
    until(server, lambda: server.loop.admission.paused)
    waits = []
    wait = EpollMap.wait
    monkeypatch.setattr(EpollMap, "wait", lambda self, timeout: [waits.append(timeout), wait(self, timeout)])
    threading.Event().wait(10 * aside.ASIDE)
    assert len(waits) <= 3
    app.released.set()
    assert [each.response().status for each in (*busy, others[0])] == [200] * 3
    del waits[:]
    threading.Event().wait(10 * aside.ASIDE)
    assert len(waits) <= 3
    for each in (*busy, others[0]):
        each.close()
    assert [each.response().status for each in others[1:]] == [200] * 3


def test_quick_requests_do_not_make_busy(worker, connect, app):
    """After the leading thread has run quick requests itself, the worker does not step aside."""
    server = worker(app)
    client = connect(server)
    for _ in range(100):
        assert client.ask("/hello").status == 200
        assert connect(server).ask("/hello").status == 200


# --- drains and resumes -----------------------------------------------------------------------------------------------


def test_each_worker_drains_and_the_last_of_them_leaves_nothing_open(worker, original, connect):
    """New clients are refused as soon as the first worker drains; clients that came before are all answered."""
    apps = [App(), App()]
    servers = [worker(each, threads=2) for each in apps]
    clients = [connect(servers[0]).send("/hello") for _ in range(8)]
    with ThreadPoolExecutor(2) as pool:
        reports = list(pool.map(lambda server: server.drain(PATIENCE), servers))
    assert all(report.clean for report in reports)
    assert [each.response().status for each in clients] == [200] * 8
    with pytest.raises(ConnectionRefusedError):
        connect(servers[0])
    original.close()
    again = Listener.bind(original.address)  # no copy is left
    again.close()


def test_a_drain_that_begins_while_it_steps_aside_takes_the_backlog(patient, busy, connect, app):
    """A drain that begins while the worker steps aside accepts the backlog, which the gate has let in."""
    waiting = [connect(busy).send("/hello") for _ in range(3)]
    assert busy.turns(PATIENCE)
    assert busy.connections == 1
    with draining(busy, app) as report:
        until(busy, lambda: busy.connections == 4)
        app.released.set()
    assert [each.response().status for each in waiting] == [200] * 3
    assert report.result(PATIENCE).clean


def test_closing_a_copy_resets_no_client(monkeypatch, caplog, worker, serve, app):
    """Clients that wait when a copy is closed are accepted by another worker; without copies they count as reset."""
    monkeypatch.setattr(Listener, "waiting", lambda self: 3)
    server = worker(app)
    assert server.drain(PATIENCE).unaccepted == 0
    assert "reset" not in caplog.text
    assert serve().drain(PATIENCE).unaccepted == 3


def test_a_worker_that_is_replaced_leaves_its_listeners_to_the_others(worker, connect, original):
    """The drain of one worker closes no gate: no client is refused, and other workers accept the backlog."""
    old, new = worker(App()), worker(App())
    for listener in old.listeners:
        listener.shared = True
    assert old.drain(PATIENCE).clean
    for _ in range(5):
        assert connect(new).ask("/hello").status == 200
    old.stop()
    assert connect(new).ask("/hello").status == 200


def test_a_resume_with_listeners_accepts_from_them(worker, connect, original):
    """A resume serves on listeners that the supervisor has bound anew, and shares connections as before."""
    app = App()
    server = worker(app)
    server.drain(PATIENCE)
    original.close()
    again = Listener.bind(original.address)
    again.listen(128)
    given = copy(again)
    server.resume([given])
    assert server.listeners == [given]
    assert connect(server).ask("/hello").status == 200
    connect(server).send("/gate")
    app.entered(1)
    until(server, lambda: server.loop.admission.aside.next_moment == aside.NEVER)
    app.released.set()
    again.close()


def test_copies_are_closed_before_the_place_is_bound_anew(busy, connect, app, original):
    """Copies are closed even in the middle of a drain; clients behind the gate are accepted first."""
    client = connect(busy).send("/hello")
    closed = threading.Event()
    busy.loop.context.on_closed = closed.set
    with draining(busy, app):
        busy.close_listeners()
        assert closed.wait(PATIENCE)
        original.close()
        again = Listener.bind(original.address)
        again.listen(128)
        busy.resume([copy(again)])
        app.released.set()
        assert client.response().status == 200
        assert connect(busy).ask("/hello").status == 200
    again.close()


def test_without_a_drain_no_copy_is_closed(worker, app, connect):
    """A request to close copies without a drain does nothing."""
    server = worker(app)
    server.close_listeners()
    assert server.turns(PATIENCE)
    assert connect(server).ask("/hello").status == 200


def test_listeners_that_are_not_needed_are_closed(worker, original, app):
    """A server that serves already closes listeners that it is given; so it does for those that were never closed."""
    server = worker(app)
    server.resume([unused := copy(original)])
    assert unused.socket.fileno() == -1
    server.listeners[0].shared = True
    server.drain(PATIENCE)
    server.resume([unused := copy(original)])
    assert unused.socket.fileno() == -1
    server.drain(PATIENCE)
    with pytest.raises(ValueError, match="zip"):
        server.resume([copy(original), unused := copy(original)])
    assert unused.socket.fileno() == -1


# --- balance ----------------------------------------------------------------------------------------------------------

JOB = 0.01
WORKER = f"""
import os, socket, sys, time, logging
from flaskd.server import WaitressThread
from flaskd.sockets import Address, Listener

def app(environ, start_response):
    time.sleep({JOB})
    body = str(os.getpid()).encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]

logging.disable()
listener = Listener(Address("127.0.0.1", 0), socket.socket(fileno=int(sys.argv[1])), copied=True)
with WaitressThread(app, threads=4, listeners=[listener]):
    print("ready", flush=True)
    sys.stdin.read()
"""
SECONDS = 10.0 if LONG else 1.5


@pytest.fixture
def pool(original):
    """Four workers that are processes, each with four threads."""
    argv = [sys.executable, "-c", WORKER, str(original.socket.fileno())]
    options = {"pass_fds": [original.socket.fileno()], "stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    workers = [subprocess.Popen(argv, **options) for _ in range(4)]
    assert [each.stdout.readline() for each in workers] == [b"ready\n"] * 4
    yield workers
    for each in workers:
        each.communicate()


@pytest.mark.parametrize("keep", [False, True], ids=["a connection each", "kept connections"])
def test_workers_have_equal_shares(pool, original, keep):
    """14 clients and 16 places: no client waits for a place while another worker has a free one."""
    until, address = time.monotonic() + SECONDS, original.address

    def client(_):
        served, times = Counter(), []
        connection = http.client.HTTPConnection(address.host, address.port, timeout=PATIENCE)
        while (began := time.monotonic()) < until:
            connection.request("GET", "/", headers={} if keep else {"Connection": "close"})
            served[connection.getresponse().read()] += 1
            times.append(time.monotonic() - began)
        connection.close()
        return served, times

    with ThreadPoolExecutor(14) as clients:
        results = list(clients.map(client, range(14)))
    served = sum((each for each, _ in results), Counter())
    times = sorted(each for _, some in results for each in some)
    ratio = max(served.values()) / min(served.values())
    p99 = times[len(times) * 99 // 100]
    print(f"{dict(served)}, ratio {ratio:.2f}, p50 {times[len(times) // 2] * 1000:.1f} ms, p99 {p99 * 1000:.1f} ms")
    if LONG:
        # A client that keeps its connection stays with its worker: 14 are 4, 4, 3 and 3.
        assert (len(served), ratio <= (1.4 if keep else 1.2), p99 <= 1.3 * JOB) == (4, True, True)
    elif not keep:  # if other tests use the machine, a worker may come too late for all of the 14 connections
        assert (len(served), ratio <= 4) == (4, True)
