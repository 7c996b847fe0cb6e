"""The threads: one leads, others run the app, and one thread reads, runs and answers a request."""

import contextlib
import select
import threading
import time

import pytest
from patience import until as wait_until
from server_kit import PATIENCE, answers, app, connect, draining, get, no_thread_left, post, serve, until

from flaskd.server.channel import Channel
from flaskd.server.lead import Lead
from flaskd.server.threads import ThreadPool

pytestmark = pytest.mark.usefixtures("no_thread_left")


class Task:
    """A task that notes in which thread it ran, and may wait or raise."""

    def __init__(self, *, waits=False, error=None):
        self.begun, self.ran, self.may_end = threading.Event(), threading.Event(), threading.Event()
        self.waits, self.error = waits, error

    def service(self):
        self.thread = threading.current_thread()
        self.begun.set()
        assert not self.waits or self.may_end.wait(PATIENCE)
        self.ran.set()
        if self.error:
            raise self.error


@pytest.fixture
def pool_of():
    """Starts pools whose leading thread only looks for tasks when it is woken."""
    pools = []

    def start(size):
        pool, woken = ThreadPool(size), threading.Semaphore(0)

        def lead():
            while True:
                if (task := pool.take()) is not None:
                    return task
                if pool.surplus:
                    return None
                woken.acquire()

        pool.start(lead, woken.release, "lonely")
        pools.append(pool)
        return pool

    yield start
    for pool in pools:
        pool.end()
        assert pool.join(PATIENCE) == []


def run(pool, *tasks):
    for task in tasks:
        pool.run(task.service)


def alive(pool):
    return sum(thread.is_alive() for thread in pool.started)


def test_there_is_one_thread_more_than_places(pool_of):
    """There is one more thread than places, to lead; without places there is one, with a name of its own."""
    assert [len(pool_of(size).started) for size in (1, 4)] == [2, 5]
    assert [each.name for each in pool_of(0).started] == ["lonely"]


def test_no_more_run_than_there_are_places(pool_of):
    """Tasks without a place wait, the oldest first."""
    pool, order = pool_of(2), []
    held = [Task(waits=True), Task(waits=True)]
    run(pool, *held)
    assert all(task.begun.wait(PATIENCE) for task in held)
    last = Task()
    for number in range(5):
        pool.run(lambda number=number: order.append(number))
    run(pool, last)
    assert (pool.busy, len(pool.queue), order) == (2, 6, [])
    held[0].may_end.set()
    assert last.ran.wait(PATIENCE)
    assert order == [0, 1, 2, 3, 4]
    held[1].may_end.set()


def test_a_place_that_is_left_is_taken_by_another(pool_of):
    """Meanwhile there is one more thread; afterwards it waits for a free place, before tasks that came later."""
    pool, left, may_return, back = pool_of(1), threading.Event(), threading.Event(), Task(waits=True)

    def leave():
        with pool.without_place():
            left.set()
            may_return.wait(PATIENCE)
        back.service()

    other, last = Task(waits=True), Task()
    pool.run(leave)
    assert left.wait(PATIENCE)
    run(pool, other)
    assert other.begun.wait(PATIENCE)
    assert (pool.busy, alive(pool)) == (1, 3)
    run(pool, last)
    may_return.set()
    assert not back.begun.wait(0.1)
    other.may_end.set()
    assert back.begun.wait(PATIENCE)
    assert (pool.busy, last.begun.is_set()) == (1, False)
    back.may_end.set()
    assert last.ran.wait(PATIENCE)
    wait_until(lambda: alive(pool) == 2)


def test_the_first_request_of_a_life_is_no_reason_to_warn(pool_of, caplog):
    """The first request causes no warning; a request without a free place does, as in waitress."""
    pool = pool_of(2)
    held = [Task(waits=True), Task(waits=True)]
    run(pool, *held)
    assert all(task.begun.wait(PATIENCE) for task in held)
    assert caplog.messages == []
    last = Task()
    run(pool, last)
    assert caplog.messages == ["Task queue depth is 1"]
    for task in held:
        task.may_end.set()
    assert last.ran.wait(PATIENCE)


def test_a_task_that_raises_ends_no_thread(pool_of, caplog):
    """A task that raises does not end its thread, so the number of places stays the same."""
    pool = pool_of(1)
    threads = set(pool.started)
    for error in (ValueError("on purpose"), SystemExit(1)):
        task = Task(error=error)
        run(pool, task)
        assert task.ran.wait(PATIENCE)
    last = Task()
    run(pool, last)
    assert last.ran.wait(PATIENCE)
    assert set(pool.started) == threads
    assert all(each.is_alive() for each in threads)
    assert caplog.text.count("on purpose") == 1


def test_places_come_and_go(pool_of):
    """New places take waiting tasks at once; when there are fewer, threads end after their tasks."""
    pool = pool_of(1)
    held = [Task(waits=True) for _ in range(3)]
    run(pool, *held)
    assert held[0].begun.wait(PATIENCE)
    pool.resize(3)
    assert all(task.begun.wait(PATIENCE) for task in held)
    assert len(pool.started) == 4
    pool.resize(1)
    before = list(pool.started)
    for task in held:
        task.may_end.set()
    while sum(each.is_alive() for each in before) > 2:
        for each in before:
            each.join(0.01)
    last = Task()
    run(pool, last)
    assert last.ran.wait(PATIENCE)


def test_only_those_end_that_are_too_many(pool_of, monkeypatch):
    """A thread that ends is not counted when it passes the lead on, so that the next one does not end, too."""
    pool, real, seen = pool_of(4), Lead.pass_on, []
    monkeypatch.setattr(Lead, "pass_on", lambda self: seen.append(pool.surplus) or real(self))
    before = list(pool.started)
    pool.resize(1)
    while sum(each.is_alive() for each in before) > 2:
        for each in before:
            each.join(0.01)
    assert seen == [True, True, False]


def test_places_can_change_before_the_start():
    """If the number of places changes before the start, no thread is started."""
    pool = ThreadPool(4)
    pool.resize(2)
    assert (pool.started, pool.size) == ([], 2)
    pool.start(lambda: None, lambda: None, "")
    assert len(pool.started) == 3
    pool.end()
    assert pool.join(PATIENCE) == []


def test_a_request_changes_no_thread(serve, connect, monkeypatch):
    """The thread that reads a request runs the app."""
    names, ran, real = [], [], Channel.read
    monkeypatch.setattr(Channel, "read", lambda self: names.append(threading.current_thread().name) or real(self))

    def app(environ, start_response):
        ran.append(threading.current_thread().name)
        start_response("200 OK", [("Content-Length", "2")])
        return [b"ok"]

    server = serve(app)
    client = connect(server)
    for _ in range(20):
        until(server, lambda: server.loop.context.pool.busy == 0)  # else the thread of the request before may take it
        client.send("/").response()
    assert names == ran


def test_another_thread_leads_while_the_app_runs(serve, app, connect):
    """Another thread leads while the app runs, so other clients are served."""
    server = serve(threads=2)
    slow = connect(server).send("/gate")
    app.entered(1)
    quick = connect(server)
    assert [quick.ask("/").status for _ in range(20)] == [200] * 20
    app.released.set()
    assert slow.response().status == 200


def test_the_loop_goes_on_while_all_threads_are_busy(serve, app, connect):
    """While all threads are busy, connections are accepted, health is answered, timers run, and requests queue."""
    server = serve(threads=2)
    server.answer_health("/healthz", lambda: ("200 OK", "ready"))
    held = [connect(server).send("/gate") for _ in range(2)]
    app.entered(2)
    waiting = connect(server).send("/")
    until(server, lambda: server.queued == 1)
    assert connect(server).ask("/healthz").body == b"ready\n"
    assert server.answers(PATIENCE)
    app.released.set()
    assert [client.response().status for client in (*held, waiting)] == [200] * 3


def test_who_waits_longest_is_served_first(serve, app, connect):
    """Requests without a place are run in the order in which they came."""
    seen = []

    def ordered(environ, start_response):
        seen.append(environ["QUERY_STRING"])
        return app(environ, start_response)

    server = serve(ordered, threads=1)
    clients = [connect(server) for _ in range(6)]
    clients[0].send("/gate")
    app.entered(1)
    for number, client in enumerate(clients[1:], 1):
        client.send(f"/?{number}" if number % 2 else post(f"/echo?{number}", b"x"))
        until(server, lambda number=number: server.queued == number)
    app.released.set()
    assert [client.response().status for client in clients] == [200] * 6
    assert seen == ["", "1", "2", "3", "4", "5"]


@pytest.mark.parametrize("behind", [1, 400], ids=["one", "more than is read at once"])
def test_what_comes_while_the_app_runs_is_answered_behind_it(behind, serve, app, connect):
    """Although epoll, which tells of it once, told of it while a thread had the connection."""
    server = serve(threads=2)
    client = connect(server)
    assert client.ask("/").status == client.ask("/").status == 200
    [channel] = server.loop.connections.channels()
    assert channel.stays_armed
    client.send("/gate")
    app.entered(1)
    client.send(*["/"] * behind)
    until(server, lambda: channel.missed)
    app.released.set()
    assert [client.response().status for _ in range(behind + 1)] == [200] * (behind + 1)


def test_what_is_pipelined_is_answered_in_order(serve, connect):
    """Pipelined requests are answered in order, whichever threads run them."""
    client = connect(serve())
    for _ in range(3):
        client.send(*[post("/echo", b"%d" % number) for number in range(4)])
        assert [client.response().body for _ in range(4)] == [b"0", b"1", b"2", b"3"]


def test_a_client_that_leaves_is_closed(serve, connect):
    """The leading thread notices that a client left, with a FIN or a reset."""
    server = serve()
    for leave in (lambda client: client.close(), lambda client: client.reset()):
        client = connect(server)
        client.ask("/")
        leave(client)
        until(server, lambda: server.connections == 0)


def test_a_connection_that_is_closed_under_its_client(serve, connect, caplog):
    """If the server closes a connection, nothing of the client's next request is logged."""
    server = serve()
    client = connect(server)
    client.ask("/")
    server.loop.call(lambda: [each.handle_close() for each in server.loop.connections.channels()])
    until(server, lambda: server.connections == 0)
    with contextlib.suppress(OSError):
        client.send("/")
    assert client.ended()
    server.stop(PATIENCE)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_drain_answers_a_kept_connections_next_request(serve, app, connect):
    """In a drain, a kept connection's next request is answered within its grace; it is the last one."""
    server = serve(keepalive_grace=PATIENCE)
    client = connect(server)
    client.ask("/")
    with draining(server, app) as report:
        response = client.send("/").response()
        assert (response.status, response.last) == (200, True)
        assert (report.result(PATIENCE).completed, report.result().cut) == (1, ())


def test_a_fault_while_reading_costs_the_connection_alone(serve, connect, monkeypatch):
    """An error while reading is logged, and closes that connection alone."""
    server = serve()
    client = connect(server)
    client.ask("/")
    received = Channel.received
    monkeypatch.setattr(Channel, "received", lambda self, data: 1 / 0)
    client.send("/")
    assert client.ended()
    monkeypatch.setattr(Channel, "received", received)
    assert connect(server).ask(get("/")).status == 200


@pytest.mark.skipif(not hasattr(select, "epoll"), reason="a gain on epoll alone")
def test_a_kept_connection_asks_the_loop_for_nothing(serve, connect, monkeypatch):
    """Between two requests of a quick client, the loop is not woken, and the connection is not asked again."""
    server = serve()
    client = connect(server)
    client.ask("/")
    asked = []
    monkeypatch.setattr(Channel, "readable", lambda self: asked.append(self) or True)
    monkeypatch.setattr(server.loop.context.poller, "wake", lambda: asked.append("wake"))
    for _ in range(10):
        client.ask("/")
    assert asked == []


# --- keeping the lead -------------------------------------------------------------------------------------------------


@pytest.fixture
def lead():
    """A lead that this thread has taken."""
    made = Lead(threading.Lock())
    made.take()
    yield made
    made.end()
    made.join(PATIENCE)


def quick(lead, times=16, kind="GET /", *, kept=False):
    for _ in range(times):
        lead.note(kind, 0.0, kept=kept)


def slow(lead, times=1, kind="GET /", *, kept=False):
    for _ in range(times):
        lead.note(kind, 1.0, kept=kept)


def kept(lead, kind="GET /"):
    """Ask until the lead may be kept, as under load, when the watching thread is awake."""
    end = time.monotonic() + PATIENCE
    while not lead.keep(kind):
        assert time.monotonic() < end
    return True


def test_the_lead_is_kept_for_what_has_been_quick(lead):
    """The lead is kept after sixteen quick requests of a kind, under a load that wakes the watching thread."""
    quick(lead, 15)
    assert not lead.keep("GET /")
    quick(lead, 1)
    assert kept(lead)
    assert lead.still_kept("GET /", 0.0)
    slow(lead, kept=True)
    assert not lead.keep("GET /")
    assert not lead.keep("GET /other")


def test_one_slow_request_in_many_is_pardoned(lead):
    """One slow request in many is forgiven; a second one within sixteen is not, because other requests waited."""
    quick(lead, 1000)
    slow(lead, kept=True)
    assert kept(lead)
    slow(lead, kept=True)
    assert not lead.keep("GET /")


def test_a_request_that_had_to_share_the_interpreter_is_hardly_held_to_be_slow(lead):
    """Without the lead kept, a slow request counts for little, because threads share the GIL."""
    for _ in range(16):
        quick(lead, 4)
        slow(lead)
    assert kept(lead)
    for _ in range(16):
        quick(lead, 1)
        slow(lead)
    assert not lead.keep("GET /")


def test_one_request_now_and_then_is_not_watched(lead, monkeypatch):
    """For rare requests the lead is passed on, and the watching thread is not started."""
    quick(lead)
    monkeypatch.setattr("flaskd.server.lead._BUSY", -1.0)
    assert not any(lead.keep("GET /") for _ in range(100))
    assert "flaskd-watch" not in {each.name for each in threading.enumerate()}


def test_what_takes_long_after_all_loses_the_lead(lead):
    """If a request takes long after all, another thread takes the lead."""
    quick(lead)
    assert kept(lead)
    other = threading.Thread(target=lead.take)
    other.start()
    other.join(PATIENCE)
    assert not other.is_alive()
    assert not lead.still_kept("GET /", 0.0)


def test_an_end_leaves_the_lead_with_no_request(lead):
    """After `end`, another thread can lead whatever runs, and the running thread learns that it lost the lead."""
    quick(lead)
    assert kept(lead)
    lead.end()
    lead.join(PATIENCE)
    lead.take()
    assert not lead.still_kept("GET /", 0.0)
    assert not lead.keep("GET /")


def test_kinds_are_remembered_up_to_a_number(lead):
    """The number of kinds is bounded, because clients choose the paths."""
    for number in range(5000):
        lead.note(f"GET /{number}", 0.0, kept=False)
    quick(lead)
    assert kept(lead)


def test_no_request_waits_for_one_that_was_expected_to_be_quick(serve, connect):
    """When a page that was always quick hangs, other requests are served, and it is answered later."""
    hangs, entered, go_on = threading.Event(), threading.Semaphore(0), threading.Event()

    def app(environ, start_response):
        if hangs.is_set() and environ["PATH_INFO"] == "/page":
            entered.release()
            assert go_on.wait(PATIENCE)
        start_response("200 OK", [("Content-Length", "2")])
        return [b"ok"]

    server = serve(app, threads=4)
    client, other = connect(server), connect(server)
    watched = False
    end = time.monotonic() + PATIENCE
    while not watched and time.monotonic() < end:
        client.ask("/page")
        watched = "flaskd-watch" in {each.name for each in threading.enumerate()}
    assert watched
    for _ in range(300):
        client.ask("/page")
    hangs.set()
    client.send("/page")
    assert entered.acquire(timeout=PATIENCE)
    assert other.ask("/other").status == 200
    held = [connect(server).send("/page") for _ in range(3)]
    assert all(entered.acquire(timeout=PATIENCE) for _ in held)
    assert server.turns(PATIENCE)
    go_on.set()
    assert [each.response().status for each in (client, *held)] == [200] * 4
