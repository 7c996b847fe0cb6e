"""A client that asks again at once: its worker goes on with it, and the loop takes it back whenever that would matter."""

import contextlib
import select
import threading

import pytest
from server_kit import PATIENCE, answers, app, connect, draining, get, no_thread_left, post, serve, until

from flaskd.server import channel
from flaskd.server.channel import Channel

pytestmark = [
    pytest.mark.usefixtures("no_thread_left", "patient"),
    pytest.mark.skipif(not hasattr(select, "epoll"), reason="a gain on epoll alone"),
]


@pytest.fixture
def start(serve):
    """Starts servers whose threads have nothing to do any more, not even to start."""

    def start(**options):
        server = serve(**options)
        until(server, lambda: server._serving.context.pool.active_count == 0)
        return server

    return start


@pytest.fixture
def patient(monkeypatch):
    """A worker stays with a client as long as it takes."""
    monkeypatch.setattr(channel, "_QUICK", PATIENCE)


@pytest.fixture
def readers(monkeypatch):
    """The names of the threads that read from connections, one for each piece that came."""
    names, receive = [], Channel._receive

    def noted(self):
        data = receive(self)
        if data:
            names.append(threading.current_thread().name)
        return data

    monkeypatch.setattr(Channel, "_receive", noted)
    return names


def by_worker(names):
    return [name.startswith("flaskd-thread-") for name in names]


def test_a_worker_reads_what_its_client_sends_next(start, connect, readers):
    """The loop hears of the first request alone."""
    client = connect(start())
    for _ in range(5):
        assert client.send(post("/echo", b"again")).response().body == b"again"
    assert by_worker(readers) == [False, True, True, True, True]


def test_it_answers_what_is_pipelined(start, connect):
    """One after the other, whoever reads them."""
    client = connect(start())
    for _ in range(3):
        client.send(*[post("/echo", b"%d" % number) for number in range(4)])
        assert [client.response().body for _ in range(4)] == [b"0", b"1", b"2", b"3"]


def test_half_a_request_is_the_loops(start, connect, readers):
    """A worker does not wait for the rest of what has come in part."""
    server = start()
    client = connect(server)
    client.ask("/")
    client.send(post("/echo", b"whole")[:-3])
    until(server, lambda: len(readers) == 2)
    client.send(b"ole")
    assert client.response().body == b"whole"
    assert by_worker(readers) == [False, True, False]


def test_a_client_that_leaves_is_closed(start, connect):
    """Its end is seen by whoever has the connection, in order or not."""
    server = start()
    for leave in (lambda client: client.close(), lambda client: client.reset()):
        client = connect(server)
        client.ask("/")
        leave(client)
        until(server, lambda: server.connections == 0)


def test_a_connection_that_is_closed_under_its_worker(start, connect, caplog):
    """Whatever closes it, such as a deadline, the worker that waits for its next request is not surprised."""
    server = start()
    client = connect(server)
    client.ask("/")
    server._serving.call(lambda: [each.handle_close() for each in server._serving.connections.channels()])
    until(server, lambda: server.connections == 0)
    with contextlib.suppress(OSError):
        client.send("/")
    assert client.ended()
    server.stop(PATIENCE)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_drain_answers_what_a_worker_reads(start, app, connect):
    """A worker that waits for the next request of its client reads and answers it in the drain; it is the last."""
    server = start(keepalive_grace=PATIENCE)
    client = connect(server)
    client.ask("/")
    with draining(server, app) as report:
        response = client.send("/").response()
        assert (response.status, response.last) == (200, True)
        assert (report.result(PATIENCE).completed, report.result().cut) == (1, ())


def test_health_is_the_loops_to_answer(start, app, connect, readers):
    """A worker that has read a request which it is not to answer leaves it, and the connection, to the loop."""
    server = start()
    server.answer_health("/healthz", lambda: ("200 OK", "ready"))
    client = connect(server)
    client.ask("/")
    for _ in range(3):
        assert client.send("/healthz").response().body == b"ready\n"
    assert client.send("/").response().body == b"hello"
    assert by_worker(readers)[:2] == [False, True]


def test_the_last_free_worker_does_not_wait(start, connect, readers):
    """Somebody must be there for whoever comes next."""
    server = start(threads=1)
    first, second = connect(server), connect(server)
    for _ in range(3):
        assert first.ask("/").status == 200
        assert second.ask("/").status == 200
    assert not any(by_worker(readers))


def test_fewer_workers_are_fewer_at_once(start, connect, readers):
    """A worker that is to end goes after the request in hand, however quick its client is."""
    server = start(threads=3)
    client = connect(server)
    client.ask("/")
    server.set_threads(1)
    for _ in range(3):
        client.ask("/")
    assert by_worker(readers)[-1] is False


def test_a_fault_while_a_worker_reads_costs_the_connection_alone(start, connect, monkeypatch):
    """As in the loop: it is logged, and the connection closed."""
    server = start()
    client = connect(server)
    client.ask("/")
    received = Channel.received
    monkeypatch.setattr(Channel, "received", lambda self, data: 1 / 0)
    client.send("/")
    assert client.ended()
    monkeypatch.setattr(Channel, "received", received)
    assert connect(server).ask(get("/")).status == 200
