"""What a drain does for each connection: graces, half-closes, refusals, ended streams, shared listeners."""

import errno
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from server_kit import (
    BIG,
    HAS_IPV6,
    PATIENCE,
    Client,
    answers,
    app,
    connect,
    descriptors,
    draining,
    get,
    looks_at_the_gate,
    needs_handshakes,
    no_thread_left,
    post,
    serve,
    until,
)
from stock_waitress import busy, later, turn

from flaskd.server import WaitressThread
from flaskd.server import draining as draining_module
from flaskd.server.channel import Channel
from flaskd.server.poller import PollMap
from flaskd.server.request import Request
from flaskd.sockets import Address, Listener

pytestmark = pytest.mark.usefixtures("no_thread_left")


def test_a_busy_keepalive_client_gets_its_next_request_answered(serve, app, connect):
    """Within its grace a kept connection may send one more request; the answer says that it is the last one."""
    server = serve(keepalive_grace=PATIENCE)
    client = connect(server)
    client.ask("/")
    until(server, lambda: server.in_flight == 0)
    with draining(server, app) as report:
        response = client.ask("/")
        assert (response.status, response.last) == (200, True)
        assert client.ended()
        assert report.result(PATIENCE).completed == 1


def test_a_connection_that_is_idle_longer_than_its_grace_is_closed_at_once(serve, app, connect):
    """Idle connections whose grace is over do not delay a drain."""
    server = serve(keepalive_grace=0)
    clients = [connect(server) for _ in range(20)]
    for client in clients:
        client.ask("/")
    until(server, lambda: server.in_flight == 0)
    began = time.monotonic()
    report = server.drain(timeout=PATIENCE)
    assert time.monotonic() - began < 1
    assert (report.completed, report.cut) == (0, ())
    assert all(client.ended() for client in clients)


def test_the_half_close_waits_for_the_client_and_never_resets(serve, app, connect):
    """A client that is still sending reads all of its answer, and is not reset."""
    server = serve()
    client = connect(server)
    client.send(post("/echo", b"x" * 100, "Connection: close"))
    client.socket.sendall(b"y" * 50_000)  # more than the Content-Length: a plain close would reset unread input
    response = client.response()
    assert response.body == b"x" * 100
    assert client.ended()


def test_a_refused_upload_reads_its_refusal(serve, connect):
    """A body that is too large is refused before it is read, and the client that goes on sending reads the 413."""
    server = serve(adjustments={"max_request_body_size": 1000})
    client = connect(server)
    client.send(get("/echo", "Content-Length: 1000000", method="POST"))
    for _ in range(20):
        client.socket.sendall(b"x" * 10_000)
    assert client.response().status == 413
    assert client.ended()


def test_what_waits_in_the_queue_at_the_deadline_is_refused_in_words(serve, app, connect):
    """At the deadline each request that no thread has begun gets 503 with Retry-After, and counts as rejected."""
    server = serve(threads=1)
    running = connect(server).send("/gate")
    app.entered(1)
    waiting = [connect(server).send("/") for _ in range(5)]
    until(server, lambda: server.queued == 5)
    report = server.drain(timeout=0)
    for client in waiting:
        response = client.response()
        assert (response.status, response.last) == (503, True)
        assert int(response.headers["Retry-After"]) > 0
    assert (report.completed, report.rejected, [each.path for each in report.cut]) == (0, 5, ["/gate"])
    assert running.ended()


def test_expect_within_the_grace_is_served_and_after_it_refused(serve, app, connect):
    """100-continue is sent within the grace; after it, a client gets a 503 before it sends the body."""
    server = serve(keepalive_grace=PATIENCE)
    client, late = connect(server), connect(server)
    client.ask("/")
    late.ask("/")
    until(server, lambda: server.in_flight == 0)
    with draining(server, app) as report:
        client.send(get("/echo", "Content-Length: 4", "Expect: 100-continue", method="POST"))
        assert client.response().status == 100
        assert client.send(b"body").response().body == b"body"
        head = get("/echo", "Content-Length: 4", "Expect: 100-continue", method="POST")
        late.send(head[:-2])  # an idle connection would be closed once its grace is over
        until(server, lambda: any(channel.arriving for channel in server.loop.connections.channels()))
        server.set_graces(0, 0)
        late.send(head[-2:])
        response = late.response()
        assert (response.status, response.last) == (503, True)
        account = report.result(PATIENCE)
        assert (account.completed, account.rejected) == (1, 1)


def test_whoever_closes_an_answered_connection_first_the_answer_was_whole(serve, app, connect, monkeypatch):
    """The answer counts as completed, even if the client leaves before the thread notes that it has finished."""
    monkeypatch.setattr("flaskd.server.context.make_poller", PollMap)
    server = serve()
    real = Request.close

    def close(request):
        channel = request.channel
        if threading.current_thread() is request.thread:  # after that, waitress forgets the request
            until(server, lambda: not channel.connected)
        real(request)

    client = connect(server).send("/gate")
    app.entered(1)
    monkeypatch.setattr(Request, "close", close)
    with draining(server, app) as report:
        app.released.set()
        assert client.response().body == b"/gate"
        client.close()
        account = report.result(PATIENCE)
    assert (account.completed, account.rejected, account.cut) == (1, 0, ())


def events(environ, start_response, entered=threading.Event(), release=threading.Event()):  # noqa: B008 - shared
    start_response("200 OK", [("Content-Type", "text/event-stream")])
    yield b"data: 1\n\n"
    entered.set()
    release.wait(PATIENCE)
    yield b"data: 2\n\n"


@pytest.mark.parametrize("grace", [0, 0.1])
def test_an_event_stream_ends_between_two_events_after_its_grace(grace, serve, connect):
    """A stream whose generator sleeps ends with a last chunk, counts as completed, and does not delay the drain."""
    entered, release = threading.Event(), threading.Event()
    server = serve(lambda environ, start: events(environ, start, entered, release), stream_grace=grace)
    client = connect(server).send("/")
    assert entered.wait(PATIENCE)
    report = server.drain(timeout=PATIENCE)
    assert client.response().body == b"data: 1\n\n"
    assert client.ended()
    assert (report.completed, report.cut) == (1, ())
    assert report.took < PATIENCE / 2
    release.set()


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_stream_that_has_sent_nothing_yet_is_ended_too(version, serve, connect):
    """The client reads the app's header and an empty stream, not a reset; the drain does not wait for an event."""
    entered, release = threading.Event(), threading.Event()

    def silent(environ, start_response):
        def nothing():
            entered.set()
            release.wait(PATIENCE)
            yield b"data: too late"

        start_response("200 OK", [("Content-Type", "text/event-stream"), ("X-Own", "header")])
        return nothing()

    server = serve(silent, stream_grace=0.1)
    client = connect(server).send(get("/", version=version))
    assert entered.wait(PATIENCE)
    report = server.drain(timeout=PATIENCE)
    release.set()
    head, _, body = client.file.read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/%s 200 OK\r\n" % version.encode())
    assert b"\r\nX-Own: header" in head
    assert b"\r\nConnection: close" in head
    assert body == b""
    assert (report.completed, report.cut) == (1, ())
    assert report.took < PATIENCE / 2


def test_what_waits_in_a_pipeline_at_the_deadline_is_refused_whole(serve, app, connect):
    """Each pipelined request gets a 503 of its own; only the last of them closes the connection."""
    server = serve(threads=1)
    running = connect(server).send("/gate")
    app.entered(1)
    client = connect(server).send("/1", "/2", "/3")
    until(server, lambda: server.queued == 1)
    report = server.drain(timeout=0)
    assert [(answer.status, answer.last) for answer in (client.response() for _ in range(3))] == [
        (503, False),
        (503, False),
        (503, True),
    ]
    assert client.ended()
    assert (report.completed, report.rejected, [each.path for each in report.cut]) == (0, 3, ["/gate"])
    assert running.ended()


def test_while_drained_a_pipeline_is_refused_whole(serve, connect):
    """On a drained server each pipelined request gets a 503."""
    listener, kept = shared_listener()
    with kept:
        server = serve(listeners=[listener])
        server.drain(timeout=PATIENCE)
        server.refuse(on=True)
        client = connect(server).send("/1", "/2")
        assert [client.response().status for _ in range(2)] == [503, 503]
        assert client.ended()
        until(server, lambda: server.in_flight == 0)
        assert server.counted[1] == 2


def test_a_chunked_download_is_not_ended_early(serve, app, connect):
    """A chunked response that is not a stream is sent to its end or cut: it never looks complete too early."""
    server = serve(stream_grace=0)
    client = connect(server).send("/stream")
    app.entered(1)
    with draining(server, app) as report:
        assert not report.done()
        app.released.set()
        assert client.response().body == b"firstlast"
        assert report.result(PATIENCE).completed == 1


def test_a_reset_client_is_not_waited_for(serve, app, connect):
    """A drain does not wait for a client that has reset its connection."""
    server = serve()
    client = connect(server).send("/gate")
    app.entered(1)
    with draining(server, app) as report:
        client.reset()
        account = report.result(PATIENCE)
        assert (account.completed, account.cut) == (0, ())


def test_a_half_closing_client_gets_its_answer(serve, app, connect):
    """A client that has half-closed its connection gets its answer, during a drain, too."""
    server = serve()
    client = connect(server).send("/gate")
    app.entered(1)
    client.socket.shutdown(socket.SHUT_WR)
    with draining(server, app):
        app.released.set()
        assert client.response().status == 200


def test_new_clients_are_refused_while_handshakes_complete(serve, app, connect):
    """The gate: connections made before are served, new ones are refused while the listener drains."""
    server = serve(threads=1)
    early = connect(server).send("/gate")
    app.entered(1)
    waiting = [connect(server).send("/") for _ in range(10)]
    with draining(server, app) as report:
        with pytest.raises(ConnectionRefusedError):
            connect(server)
        app.released.set()
        assert {client.response().status for client in [early, *waiting]} == {200}
        assert report.result(PATIENCE).completed == 11


needs_ipv6 = pytest.mark.skipif(not HAS_IPV6, reason="this machine has no ::1")


@needs_handshakes
@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("::1", marks=needs_ipv6), "0.0.0.0"])
def test_a_handshake_that_takes_long_is_waited_for(host, serve, app, connect):
    """A drain waits for a handshake under way before it closes the listener; the client is answered."""
    with looks_at_the_gate() as looked_twice:
        server = serve(host=host, keepalive_grace=PATIENCE)
        first = connect(server).send("/gate")
        app.entered(1)
        far = connect(server, slow=True)
        with draining(server, app) as report:
            app.released.set()
            assert first.response().status == 200
            looked_twice()
            assert far.send("/").response().status == 200
            account = report.result(PATIENCE)
            assert (account.completed, account.unaccepted) == (2, 0)


@needs_handshakes
def test_a_handshake_that_takes_long_is_waited_for_by_a_resume(serve, connect):
    """A client in a handshake when a drain began is served, even if the drain is undone at once."""
    server = serve()
    with busy(server.loop) as release, looks_at_the_gate() as looked_twice, ThreadPoolExecutor(1) as pool:
        far = connect(server, slow=True)
        server.begin_drain(PATIENCE, lambda _: None)
        posted, call = threading.Event(), server.loop.call
        server.loop.call = lambda function: (call(function), posted.set())
        resumed = pool.submit(server.resume)
        assert posted.wait(PATIENCE)
        release()
        looked_twice()
        assert far.send("/").response().status == 200
        resumed.result(PATIENCE)


def test_a_handshake_that_is_never_done_ends_no_drain_late(serve, monkeypatch):
    """A handshake that never completes delays a drain for a bounded time, and not beyond its deadline."""
    monkeypatch.setattr(Listener, "handshakes", lambda _: 1)
    monkeypatch.setattr(draining_module, "GATE_MOST", PATIENCE)
    assert serve().drain(0.1).took < PATIENCE / 2
    monkeypatch.setattr(draining_module, "GATE_MOST", 0.1)
    assert 0.1 <= serve().drain(PATIENCE).took < PATIENCE / 2


def test_a_gate_is_passed_where_nothing_tells_of_handshakes(serve, app, connect, monkeypatch):
    """Without netlink, as in some sandboxes, waiting clients are served after a moment, and the listener is closed."""
    before = socket.socket

    def sandboxed(family=-1, *args, **options):
        if family == getattr(socket, "AF_NETLINK", None):
            raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")
        return before(family, *args, **options)

    server = serve()
    with busy(server.loop) as release:
        waiting = connect(server).send("/")
        monkeypatch.setattr("flaskd.sockets.handshakes.socket.socket", sandboxed)
        with ThreadPoolExecutor(1) as pool:
            report = pool.submit(server.drain, PATIENCE)
            release()
            assert waiting.response().status == 200
            assert report.result(PATIENCE).completed == 1


def shared_listener():
    sock = socket.create_server(("127.0.0.1", 0))
    host, port = sock.getsockname()
    return Listener(Address(host, port), sock.dup(), shared=True), sock


def test_a_shared_listener_is_left_to_its_next_owner(serve, app, connect):
    """A drain does not accept from a shared listener; its next owner answers the clients in the backlog."""
    listener, kept = shared_listener()
    with kept:
        first = serve(listeners=[listener])
        assert connect(first).ask("/").status == 200
        first.drain(timeout=PATIENCE)
        waiting = connect(first).send("/")
        first.stop(PATIENCE)
        second = serve(listeners=[Listener(listener.address, kept.dup(), shared=True)])
        assert waiting.response().status == 200
        assert connect(second).ask("/").status == 200


def test_a_listener_that_nobody_shares_any_more_is_gated_in_the_drain(serve, app, connect):
    """Clients that connected before are served; none can connect after that."""
    listener, kept = shared_listener()
    with kept:
        server = serve(listeners=[listener])
        held = connect(server)
        held.send(get("/gate"))
        app.entered(1)
        with draining(server, app) as report:
            waiting = connect(server)
            waiting.send(get("/"))
            listener.shared = False
            server.close_gates()
            assert server.turns(PATIENCE)
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(kept.getsockname())
            assert waiting.response().status == 200
            assert not report.done()
        assert held.response().status == 200


def test_the_last_batch_is_served_at_the_end_of_a_drain(serve, app, connect):
    """If it is not known whether a next owner comes, the backlog is served at the end of the drain."""
    listener, kept = shared_listener()
    with kept:
        server = serve(listeners=[listener])
        listener.last_batch = True
        connect(server).send(get("/gate"))
        app.entered(1)
        with draining(server, app) as report:
            waiting = [connect(server) for _ in range(3)]
            for client in waiting:
                client.send(get("/"))
            assert server.turns(PATIENCE)
            assert server.connections == 1
        assert [client.response().status for client in waiting] == [200, 200, 200]
        assert report.result(PATIENCE).completed == 4


def test_while_drained_a_shared_listener_answers_503(serve, app, connect):
    """Clients of a drained server get a 503 until it resumes."""
    listener, kept = shared_listener()
    with kept:
        server = serve(listeners=[listener])
        server.drain(timeout=PATIENCE)
        server.refuse(on=True)
        response = connect(server).ask("/")
        assert (response.status, response.last) == (503, True)
        assert int(response.headers["Retry-After"]) > 0
        server.resume()
        assert connect(server).ask("/").status == 200


def test_announcing_closes_each_connection_after_its_answer(serve, app, connect):
    """While a drain is announced, requests are served, and each response is the last one of its connection."""
    server = serve()
    client = connect(server)
    assert not client.ask("/").last
    server.announce()
    assert server.turns(PATIENCE)
    assert client.ask("/").last
    assert connect(server).ask("/").last


def test_health_is_answered_by_the_loop(serve, app, answers, connect):
    """While every thread is stuck, the loop answers the health path, without the app."""
    server = serve(threads=1)
    server.answer_health("/healthz", lambda: ("503 Service Unavailable", "draining"))
    stuck = connect(server).send("/gate")
    app.entered(1)
    response = connect(server).ask("/healthz")
    assert (response.status, response.body) == (503, b"draining\n")
    head = connect(server).send(get("/healthz", "Connection: close", method="HEAD"))
    assert head.socket.recv(100).startswith(b"HTTP/1.1 503 ")
    app.released.set()
    assert stuck.response().status == 200


def test_a_request_that_takes_long_is_not_idle(serve, app, connect):
    """A connection with a running request is not closed as idle, however long that takes."""
    server = serve(adjustments={"cleanup_interval": 0})
    client = connect(server).send("/gate")
    app.entered(1)
    with later(1800, "time", "monotonic"):
        turn(server)
    app.released.set()
    assert client.response().status == 200


def test_the_limit_counts_connections_and_accepting_goes_on_below_it(serve, app, connect):
    """At the connection limit new connections wait in the backlog; when one ends, the next is accepted."""
    server = serve(adjustments={"connection_limit": 2})
    first, second = connect(server), connect(server)
    assert first.ask("/").status == second.ask("/").status == 200
    third = connect(server).send("/")
    until(server, lambda: server.connections == 2)
    first.close()
    assert third.response().status == 200


def test_the_same_on_waitress_own_loop(serve, app, connect, monkeypatch):
    """Without epoll and without the gate, serving, draining, cutting and resuming work in the same way."""
    monkeypatch.delattr("select.epoll")
    monkeypatch.setattr(Listener, "gate", lambda _: False)
    server = serve(threads=1)
    running = connect(server).send("/gate")
    app.entered(1)
    waiting = connect(server).send("/", "/")
    idle = connect(server)
    with draining(server, app) as report:
        app.released.set()
        assert running.response().status == 200
        assert waiting.response().status == 200
        assert waiting.response().last
        assert idle.ended()
        assert (report.result(PATIENCE).completed, report.result().cut) == (3, ())
    server.resume()
    assert connect(server).ask("/big").body == b"x" * BIG


def test_thousands_of_idle_connections_cost_nothing(serve, app, connect, monkeypatch):
    """Idle connections are never asked what they wait for; only those with an event are."""
    server = serve()
    for _ in range(200):
        connect(server)
    until(server, lambda: server.connections == 200)
    asked = []
    busy = connect(server)
    before = Channel.readable
    monkeypatch.setattr(Channel, "readable", lambda self: asked.append(self) or before(self))
    for _ in range(10):
        busy.send(b"GET / HTTP/1.1\r\n")
        until(server, lambda: any(each.arriving for each in server.loop.connections.channels()))
        busy.send(b"Host: test\r\n\r\n")
        assert busy.response().status == 200
    assert len(set(asked)) == 1
