"""The end of connections and of drains: what is waited for, the bytes at the end, and what a resume undoes."""

import queue
import socket
import sys
import threading
import time

import pytest
from server_kit import HAS_IPV6, PATIENCE, answers, app, connect, draining, get, no_thread_left, post, serve, until
from stock_waitress import busy, fate, turn

from flaskd.server import draining as draining_module
from flaskd.server import output as output_module
from flaskd.sockets import Address, Listener

pytestmark = pytest.mark.usefixtures("no_thread_left")


# --- resume ------------------------------------------------------------------------------------------------------------


def test_a_drain_that_was_undone_while_it_was_announced_does_not_begin(serve, connect):
    """A drain that was undone while it was announced does not begin later: the server goes on serving."""
    server, over = serve(), []
    server.begin_drain(PATIENCE, over.append, announce=0.1)
    begins = time.monotonic() + 0.1
    server.resume()
    until(server, lambda: time.monotonic() > begins)
    assert server.turns(PATIENCE)
    assert connect(server).ask("/").status == 200
    assert over == []


def test_resume_takes_an_announcement_back(serve, connect):
    """After a resume connections are kept again, whether the announced drain had begun or not."""
    server = serve()
    server.announce()
    assert turn(server) or connect(server).ask("/").last
    server.resume()
    client = connect(server)
    assert [client.ask("/").last for _ in range(3)] == [False] * 3


def test_resume_right_after_a_drain_resets_nobody(serve, connect):
    """Clients in the backlog when a drain began are answered, even if the drain is undone at once."""
    server = serve()
    resumed = threading.Thread(target=server.resume)
    with busy(server.loop) as release:
        clients = [connect(server).send("/") for _ in range(10)]
        server.begin_drain(PATIENCE, lambda _: None)
        posted, call = threading.Event(), server.loop.call
        server.loop.call = lambda function: (call(function), posted.set())
        resumed.start()
        assert posted.wait(PATIENCE)
        release()
        resumed.join(PATIENCE)
    assert [fate(client) for client in clients] == [200] * 10
    assert connect(server).ask("/").status == 200


# --- the backlog -------------------------------------------------------------------------------------------------------


def test_a_deadline_that_has_come_refuses_the_backlog_in_words(serve, connect):
    """A drain without time resets no client in the backlog: each gets a 503, and is counted."""
    server, reports = serve(), queue.SimpleQueue()
    with busy(server.loop) as release:
        clients = [connect(server).send("/") for _ in range(10)]
        server.begin_drain(0, reports.put)
        release()
        report = reports.get(timeout=PATIENCE)
    assert [fate(client) for client in clients] == [503] * 10
    assert (report.completed, report.rejected, report.cut) == (0, 10, ())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how long a backlog is")
def test_who_is_left_in_a_backlog_without_a_gate_is_counted(serve, connect, monkeypatch):
    """Without a gate a bounded number of clients is accepted; the others are reset, and the report has their number."""
    monkeypatch.setattr(Listener, "gate", lambda _: False)
    monkeypatch.setattr(draining_module, "BACKLOG", 3)
    server, reports = serve(), queue.SimpleQueue()
    with busy(server.loop) as release:
        clients = [connect(server).send("/") for _ in range(5)]
        server.begin_drain(PATIENCE, reports.put)
        release()
        report = reports.get(timeout=PATIENCE)
    assert sorted(map(str, map(fate, clients))) == ["200", "200", "200", "reset", "reset"]
    assert (report.completed, report.unaccepted, report.clean) == (3, 2, False)
    assert report.as_json()["unaccepted"] == 2


@pytest.mark.parametrize("kind", ["tcp", "unix"])
def test_a_backlog_beyond_the_limit_of_connections_is_served(kind, serve, app, connect, tmp_path):
    """In a drain at the connection limit, waiting clients are accepted as others leave."""
    address = Address("127.0.0.1") if kind == "tcp" else Address(path=str(tmp_path / "s"))
    server = serve(listeners=[Listener.bind(address)], adjustments={"connection_limit": 2})
    running = [connect(server).send("/gate") for _ in range(2)]
    app.entered(2)
    waiting = [connect(server).send("/") for _ in range(5)]
    turn(server)
    with draining(server, app) as report:
        app.released.set()
        assert [each.response().status for each in [*running, *waiting]] == [200] * 7
        assert (report.result(PATIENCE).completed, report.result().cut) == (7, ())


def test_a_backlog_beyond_the_limit_of_connections_is_served_by_a_resume(serve, app, connect):
    """A resume closes the old listener, so it first accepts all clients that wait there, however many."""
    server = serve(adjustments={"connection_limit": 2}, keepalive_grace=PATIENCE)
    running = [connect(server).send("/gate") for _ in range(2)]
    app.entered(2)
    waiting = [connect(server).send("/") for _ in range(5)]
    turn(server)
    server.begin_drain(PATIENCE, lambda _: None)
    server.resume()
    assert server.connections == 7
    late = connect(server).send("/")
    turn(server)
    assert server.connections == 7  # for others the limit holds
    app.released.set()
    assert [each.response().status for each in [*running, *waiting]] == [200] * 7
    for each in [*running, *waiting]:
        each.close()
    assert late.response().status == 200


def test_room_for_connections_does_not_open_a_shared_listener_in_a_drain(serve, app, connect):
    """A draining server below its connection limit still leaves clients of a shared listener to its next owner."""
    with socket.create_server(("127.0.0.1", 0)) as kept:
        shared = Listener(Address(*kept.getsockname()), kept.dup(), shared=True)
        server = serve(listeners=[shared], adjustments={"connection_limit": 1})
        running = connect(server).send("/gate")
        app.entered(1)
        late = connect(server).send("/")
        turn(server)
        with draining(server, app) as report:
            app.released.set()
            assert running.response().status == 200
            assert report.result(PATIENCE).completed == 1
        turn(server)
        assert server.connections == 0
        server.resume()
        assert late.response().status == 200


# --- listeners ---------------------------------------------------------------------------------------------------------


def test_listeners_of_all_kinds_at_once(serve, app, connect, tmp_path):
    """TCP, IPv6, Unix and inherited listeners drain together: own ones close, shared ones stay, a resume opens all."""
    kept = socket.create_server(("127.0.0.1", 0))
    shared = Listener(Address(*kept.getsockname()), kept.dup(), shared=True)
    path = Address(path=str(tmp_path / "s"))
    ours = [Listener.bind(each) for each in (Address("127.0.0.1"), Address("::1" if HAS_IPV6 else "127.0.0.1"), path)]
    with kept:
        server = serve(listeners=[*ours, shared])
        for _ in range(2):
            clients = [connect(server, index).send("/gate") for index in range(4)]
            assert app.entered(4) == {"/gate"}
            with draining(server, app) as report:
                late = connect(server, 3).send("/")  # waits for the next process that accepts
                until(server, lambda: all(not each.accepting for each in server.loop.context.acceptors[:3]))
                for index in range(3):
                    with pytest.raises((ConnectionRefusedError, FileNotFoundError)):
                        connect(server, index)
                app.released.set()
                assert [each.response().last for each in clients] == [True] * 4
            assert (report.result(PATIENCE).completed, report.result().cut) == (4, ())
            app.released.clear()
            server.resume()
            assert late.response().status == 200
            assert app.entered(1) == {"/"}


def test_the_backlog_of_a_unix_listener_is_served(serve, connect, tmp_path):
    """A Unix listener's node is removed first, so that no new client comes; then all waiting clients are accepted."""
    server = serve(listeners=[Listener.bind(Address(path=str(tmp_path / "s")))])
    with busy(server.loop) as release:
        clients = [connect(server).send("/") for _ in range(10)]
        server.begin_drain(PATIENCE, lambda _: None)
        release()
        turn(server)
    assert [fate(client) for client in clients] == [200] * 10
    assert list(tmp_path.iterdir()) == []


# --- graces ------------------------------------------------------------------------------------------------------------


def test_who_has_just_connected_may_still_ask(serve, app, connect):
    """The grace of a connection without a request counts from when it was opened."""
    server = serve(keepalive_grace=PATIENCE)
    fresh, gate = connect(server), connect(server).send("/gate")
    app.entered(1)
    until(server, lambda: server.connections == 2)
    with draining(server, app):
        response = fresh.ask("/")
        assert (response.status, response.last) == (200, True)
        app.released.set()
        assert gate.response().status == 200


def test_the_grace_of_a_chunked_answer_counts_from_its_end(serve, app, connect):
    """After a chunked answer that promised to keep the connection, the client has its grace."""
    server = serve(keepalive_grace=PATIENCE)
    client = connect(server).send("/stream")
    app.entered(1)
    client.file.peek(1)
    with draining(server, app) as report:
        app.released.set()
        assert not client.response().last
        assert client.ask("/").last
        assert report.result(PATIENCE).completed == 2


# --- the wire ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [[], ["/"]], ids=["fresh", "kept"])
def test_an_idle_connection_ends_in_order(before, serve, connect):
    """The client of an idle connection reads its end, not a reset; what it sends meanwhile is thrown away."""
    server = serve(keepalive_grace=0)
    client = connect(server)
    for path in before:
        client.ask(path)
    until(server, lambda: server.connections == 1)
    server.begin_drain(PATIENCE, lambda _: None)
    assert client.socket.recv(1) == b""
    client.send("/")
    turn(server)
    assert client.socket.recv(1) == b""


def test_a_keepalive_client_of_http_1_0_is_told(serve, app, connect):
    """An HTTP/1.0 client whose connection ends in a drain is not told that it is kept."""
    server = serve(keepalive_grace=PATIENCE)
    client = connect(server)
    request = get("/", "Connection: keep-alive", version="1.0")
    assert client.ask(request).headers["Connection"].lower() == "keep-alive"
    gate = connect(server).send("/gate")
    app.entered(2)
    with draining(server, app):
        assert client.ask(request).headers.get_all("Connection") == ["close"]
        app.released.set()
        assert gate.response().status == 200


def linger(server, monkeypatch, unacknowledged, **clock):
    """Let a connection end whose client acknowledges as given; returns how often the server looked."""
    looks = []

    def look(sock):
        looks.append(sock)
        return unacknowledged(len(looks))

    monkeypatch.setattr(output_module, "unacknowledged", look)
    for name, value in clock.items():
        monkeypatch.setattr(output_module, name, value)
    assert server.drain(timeout=PATIENCE).cut == ()
    return len(looks)


def test_output_that_is_still_being_acknowledged_is_waited_for(serve, connect, monkeypatch):
    """A drain waits as long as the client acknowledges more bytes, however slowly."""
    server = serve(keepalive_grace=0)
    connect(server).ask("/")
    clock = {"_LINGER": 0, "_LINGER_LOOK": 0.001, "_LINGER_MOST": 0.0001}
    assert linger(server, monkeypatch, lambda looks: max(0, 20 - looks), **clock) == 20


def test_a_client_that_acknowledges_nothing_more_is_not_waited_for(serve, connect, monkeypatch):
    """A client that acknowledges nothing more delays a drain by a bounded time."""
    server = serve(keepalive_grace=0)
    connect(server).ask("/")
    assert linger(server, monkeypatch, lambda _: 1000, _LINGER=0, _LINGER_LOOK=0.001, _LINGER_MOST=0.1) > 2


# --- answers that end by themselves -------------------------------------------------------------------------------------


def brief(environ, start_response):
    status = environ["PATH_INFO"].strip("/") or "200 OK"
    kind = "text/event-stream" if "stream" in environ["QUERY_STRING"] else "text/plain"
    start_response(status, [("Content-Type", kind)])
    return iter([b"a", b"b"] if status.startswith("200") else [])


def test_requests_behind_a_chunked_answer_are_answered(serve, connect):
    """A chunked answer does not end the connection, and requests that were pipelined behind it are served."""
    client = connect(serve(brief)).send("/", "/", "/")
    assert [(each.body, each.last) for each in (client.response() for _ in range(3))] == [(b"ab", False)] * 3


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
def test_requests_behind_an_answer_without_a_body_are_answered(status, serve, connect):
    """An answer without a body does not end the connection, and requests behind it are answered."""
    client = connect(serve(brief)).send(f"/{status.replace(' ', '%20')}", "/")
    response = client.response()
    assert (response.status, response.headers["Connection"], response.headers["Transfer-Encoding"]) == (
        int(status[:3]),
        None,
        None,
    )
    assert client.response().body == b"ab"


@pytest.mark.parametrize(
    "request_bytes",
    [get("/", "Connection: close"), get("/", version="1.0"), get("/?stream")],
    ids=["asked for", "1.0", "stream"],
)
def test_what_ends_with_its_connection(request_bytes, serve, connect):
    """An answer of unknown length, one whose client asked for it, and a stream end the connection."""
    client = connect(serve(brief)).send(request_bytes)
    assert b"Connection: close\r\n" in client.file.read()


# --- odd clients in a drain --------------------------------------------------------------------------------------------


def test_a_slow_upload_is_read_on_byte_by_byte(serve, app, connect):
    """However small its pieces, a request that has begun is served, and so is one that waits behind it."""
    server = serve(keepalive_grace=0)
    client = connect(server).send(b"P")
    connect(server).ask("/")
    turn(server)
    with draining(server, app) as report:
        for byte in post("/echo", b"slowly")[1:]:
            client.socket.sendall(bytes([byte]))
            assert server.turns(PATIENCE)
        response = client.response()
        assert (response.body, response.last) == (b"slowly", True)
        assert report.result(PATIENCE).cut == ()
