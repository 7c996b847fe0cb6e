import http.client
import queue
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from server_kit import (
    BIG,
    PATIENCE,
    Client,
    answers,
    app,
    app_threads,
    connect,
    descriptors,
    draining,
    get,
    no_thread_left,
    post,
    serve,
    until,
)

from flaskd.errors import AppError, CannotCreateError, FlaskdError
from flaskd.ledger import DrainReport
from flaskd.server import WaitressThread
from flaskd.sockets import Address, Listener

pytestmark = pytest.mark.usefixtures("no_thread_left")


# --- start -------------------------------------------------------------------------------------------------------------


def test_a_started_server_serves(serve, connect):
    """Start returns once requests are answered; port 0 is replaced by a real one, which the URL shows."""
    server = serve()
    assert server.url == f"http://127.0.0.1:{server.addresses[0].port}/"
    assert server.addresses[0].port
    assert server.turns(PATIENCE)
    response = connect(server).ask("/")
    assert (response.status, response.body, response.last) == (200, b"hello", False)


def test_as_a_context_manager(app):
    """Entering starts, leaving stops; any client that knows the URL can use it."""
    with WaitressThread(app) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.addresses[0].port, timeout=PATIENCE)
        connection.request("GET", server.url)
        assert connection.getresponse().read() == b"hello"
        connection.close()
    assert not server.turns(0)
    with pytest.raises(ConnectionRefusedError):
        Client(server.addresses[0])


def test_a_busy_port_raises_at_once(serve, app):
    """If the port is taken, start raises, and leaves nothing open."""
    taken = serve().addresses[0].port
    before = descriptors()
    server = WaitressThread(app, port=taken)
    with pytest.raises(CannotCreateError, match="Address already in use; another process listens there"):
        server.start()
    assert server.stop() == DrainReport()
    assert descriptors() == before


def test_a_second_start_is_refused(serve):
    """A second start of the same server is refused."""
    with pytest.raises(FlaskdError, match="^cannot start: this server has been started before; make a new one$"):
        serve().start()


def test_before_the_start_there_is_nothing(app):
    """A server before its start counts nothing and can be stopped; other calls raise an error that says so."""
    server = WaitressThread(app)
    assert (server.in_flight, server.connections, server.queued, server.completed) == (0, 0, 0, 0)
    assert (server.requests(), server.listeners, server.cut("no reason"), server.turns(0)) == ([], [], (), False)
    for refused in (server.drain, server.resume, lambda: server.set_threads(2), lambda: server.probe("/", 1)):
        with pytest.raises(FlaskdError, match="^cannot do that: this server has not been started$"):
            refused()
    assert server.stop() == DrainReport()
    server.abandon()


def test_stopping_before_the_start_closes_the_listeners(app):
    """A server that never served closes the listeners that it was given."""
    listener = Listener.bind(Address("127.0.0.1"))
    WaitressThread(app, listeners=[listener]).stop()
    assert listener.socket.fileno() == -1


def test_the_serving_threads_own_error_comes_out_of_start(app, monkeypatch):
    """If the serving thread dies at its first step, start raises its error, and leaves nothing open."""

    def fail(*_):
        raise RuntimeError("on purpose")

    before = descriptors()
    monkeypatch.setattr("flaskd.server.poller.EpollMap.wait", fail)
    with pytest.raises(FlaskdError, match="^cannot serve: on purpose$") as raised:
        WaitressThread(app).start()
    assert isinstance(raised.value.__cause__, RuntimeError)
    assert descriptors() == before


def test_a_setting_that_waitress_refuses_leaves_nothing_behind(app):
    """A start that fails before its threads run closes what it had bound."""
    before = descriptors()
    with pytest.raises(ValueError, match="Unknown adjustment"):
        WaitressThread(app, adjustments={"no_such_setting": 1}).start()
    assert descriptors() == before


def test_settings_reach_waitress(serve, connect):
    """Settings for waitress take effect: here its name, and the largest body."""
    server = serve(adjustments={"ident": "shop", "max_request_body_size": 4})
    response = connect(server).ask(post("/echo", b"12345"))
    assert (response.status, response.headers["Server"]) == (413, "shop")


# --- what a drain finishes ---------------------------------------------------------------------------------------------


def test_a_drain_with_nothing_in_hand_is_over_at_once(serve, connect):
    """Idle connections do not delay a drain: they are closed."""
    server = serve()
    client = connect(server)
    client.ask("/")
    report = server.drain()
    assert (report.rejected, report.cut, report.clean) == (0, (), True)
    assert report.took < PATIENCE
    assert client.ended()
    assert server.connections == 0


def test_a_drain_waits_for_a_running_request(serve, app, connect):
    """A running request is answered completely, the answer says that the connection ends, and the server is quiet."""
    server = serve()
    client = connect(server).send("/gate")
    app.entered(1)
    with draining(server, app) as report:
        assert not report.done()
        app.released.set()
        response = client.response()
        assert (response.status, response.body, response.last) == (200, b"/gate", True)
        assert client.ended()
    assert (report.result().completed, report.result().cut) == (1, ())
    assert server.in_flight == 0


def test_a_drain_waits_for_queued_requests(serve, app, connect):
    """Requests that wait for a thread when the drain begins are all answered."""
    server = serve(threads=2)
    clients = [connect(server).send(f"/gate/{number}") for number in range(7)]
    app.entered(2)
    until(server, lambda: server.queued == 5)
    assert sorted(each.phase for each in server.requests()) == ["queued"] * 5 + ["running"] * 2
    with draining(server, app) as report:
        app.released.set()
        for number, client in enumerate(clients):
            response = client.response()
            assert (response.status, response.body, response.last) == (200, f"/gate/{number}".encode(), True)
    assert (report.result().completed, report.result().cut) == (7, ())


@pytest.mark.parametrize("path", ["/big", "/file"])
def test_a_drain_waits_for_unsent_output(path, serve, app, connect):
    """A slow reader gets its response to the last byte, even if the app had finished before the drain."""
    server = serve()
    client = connect(server, receive_buffer=16384).send(path)
    app.entered(1)
    until(server, lambda: [each.phase for each in server.requests()] == ["sending"])
    with draining(server, app) as report:
        assert server.in_flight == 1
        assert not report.done()
        response = client.response()
    assert len(response.body) == BIG
    assert (report.result().completed, report.result().cut) == (1, ())


def test_a_drain_waits_for_a_stream(serve, app, connect):
    """A chunked response that is being sent ends with its last chunk."""
    server = serve()
    client = connect(server).send("/stream")
    app.entered(1)
    with draining(server, app) as report:
        app.released.set()
        assert client.response().body == b"firstlast"
        assert client.ended()
    assert report.result().completed == 1


def test_a_drain_waits_for_a_partial_upload(serve, app, connect, answers):
    """A request whose body is coming is read completely, and answered."""
    server = serve()
    client = connect(server).send("/", post("/echo", b"0123456789")[:-6])
    assert client.response().status == 200  # and so the part after it is read, too
    answers.get(timeout=PATIENCE)
    with draining(server, app) as report:
        assert not report.done()
        client.send(b"456789")
        response = client.response()
        assert (response.status, response.body, response.last) == (200, b"0123456789", True)
    assert (report.result().completed, report.result().cut) == (1, ())


def test_a_drain_waits_for_partial_headers(serve, app, connect, answers):
    """A request of which only some bytes have come is answered."""
    server = serve()
    client = connect(server).send("/", get("/echo")[:-9])
    client.response()
    answers.get(timeout=PATIENCE)
    with draining(server, app) as report:
        client.send(get("/echo")[-9:])
        assert client.response().last
    assert report.result().completed == 1


def test_a_drain_answers_all_pipelined_requests(serve, app, connect):
    """All pipelined requests are answered in order; only the last response ends the connection."""
    server = serve()
    client = connect(server).send("/gate/1", "/gate/2", "/gate/3")
    app.entered(1)
    with draining(server, app) as report:
        app.released.set()
        responses = [client.response() for _ in range(3)]
        assert client.ended()
    assert [each.body for each in responses] == [b"/gate/1", b"/gate/2", b"/gate/3"]
    assert [each.last for each in responses] == [False, False, True]
    assert (report.result().completed, report.result().cut) == (3, ())


def test_a_drain_serves_what_had_connected(serve, connect):
    """Clients in the backlog when the drain begins are answered."""
    server = serve()
    reports, drain_asked = queue.SimpleQueue(), threading.Event()
    server.loop.call(drain_asked.wait)  # meanwhile the serving thread accepts nothing
    late = [connect(server).send("/") for _ in range(5)]
    server.begin_drain(PATIENCE, reports.put)
    drain_asked.set()
    assert [client.response().last for client in late] == [True] * 5
    report = reports.get(timeout=PATIENCE)
    assert (report.completed, report.cut) == (5, ())


def test_connections_are_refused_while_drained(serve, app, connect):
    """A drained server refuses connections."""
    server = serve()
    client = connect(server).send("/gate")
    app.entered(1)
    with draining(server, app):
        with pytest.raises(ConnectionRefusedError):
            connect(server)
        app.released.set()
        client.response()
    with pytest.raises(ConnectionRefusedError):
        connect(server)


def test_an_app_can_see_the_drain(serve, app, connect):
    """An event in the environ is set by a drain, and cleared by a resume."""
    server = serve()
    connect(server).ask("/")
    event = app.draining
    assert not event.is_set()
    server.drain()
    assert event.is_set()
    server.resume()
    assert not event.is_set()


@pytest.mark.parametrize("keep", ["Connection: keep-alive", "Connection: close", "X-Nothing: x"])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_the_last_response_says_so_once(version, keep, serve, app, connect):
    """A drain's last response says once that the connection ends, whatever the client asked for."""
    server = serve()
    client = connect(server).send(get("/gate", keep, version=version))
    app.entered(1)
    with draining(server, app):
        app.released.set()
        assert client.response().headers.get_all("Connection") == ["close"]
        assert client.ended()


def test_a_second_drain_gives_the_same_report(serve, connect):
    """A second drain of a drained server returns the same report."""
    server = serve()
    connect(server).ask("/")
    assert server.drain() is server.drain()


def test_two_who_drain_at_once(serve, app, connect):
    """Two threads can ask for the same drain, and both get its report."""
    server = serve()
    client = connect(server).send("/gate")
    app.entered(1)
    with draining(server, app) as one, draining(server, app) as two:
        app.released.set()
        client.response()
    assert one.result(PATIENCE).completed == two.result(PATIENCE).completed == 1


def test_a_hastened_drain_is_over_sooner(serve, app, connect):
    """A drain's deadline can be brought forward, but not put off."""
    server = serve()
    connect(server).send("/gate")
    app.entered(1)
    reports = queue.SimpleQueue()
    server.begin_drain(3600, reports.put)
    server.hasten_drain(7200)
    assert server.turns(PATIENCE)
    assert reports.empty()
    server.hasten_drain(0)
    assert len(reports.get(timeout=PATIENCE).cut) == 1


# --- resume ------------------------------------------------------------------------------------------------------------


def test_resume_serves_on_the_same_port(serve, connect):
    """After a resume the port is the same, requests are answered, and connections are kept."""
    server = serve()
    url = server.url
    for _ in range(3):
        server.drain()
        server.resume()
        client = connect(server)
        assert [client.ask("/").last for _ in range(2)] == [False, False]
        assert server.url == url
        assert [each.address for each in server.listeners] == server.addresses


def test_resume_of_a_taken_port_stays_drained(serve, connect, app):
    """If the port is taken, resume raises, the server stays drained, and resume can be tried again."""
    server = serve()
    server.drain()
    with WaitressThread(app, port=server.addresses[0].port), pytest.raises(CannotCreateError):
        server.resume()
    server.resume()
    assert connect(server).ask("/").status == 200


def test_resume_while_draining(serve, app, connect):
    """A resume undoes a drain under way: its requests go on, and threads that wait for the drain get an error."""
    server = serve()
    running = connect(server).send("/gate")
    app.entered(1)
    with draining(server, app) as report:
        server.resume()
        assert connect(server).ask("/").last is False
        app.released.set()
        assert running.response().status == 200
        with pytest.raises(FlaskdError, match="^cannot drain: resume undid it$"):
            report.result(PATIENCE)


def test_resume_of_a_server_that_serves_changes_nothing(serve, connect):
    """A resume of a server that serves changes nothing."""
    server = serve()
    client = connect(server)
    client.ask("/")
    server.resume()
    assert client.ask("/").status == connect(server).ask("/").status == 200


# --- the deadline ------------------------------------------------------------------------------------------------------


def test_the_deadline_cuts_and_tells_what(serve, app, connect, caplog):
    """Report and log have method, path, age and stack of a cut request; its client sees an incomplete answer."""
    server = serve()
    client = connect(server).send(get("/gate/export?secret=1", method="PUT"))
    app.entered(1)
    report = server.drain(timeout=0)
    (cut,) = report.cut
    assert not report.clean
    assert (cut.method, cut.path, cut.phase, cut.client) == ("PUT", "/gate/export", "running", "127.0.0.1")
    assert (cut.reason, cut.thread[:14]) == ("the deadline came", "flaskd-thread-")
    assert 0 < cut.age < PATIENCE
    assert "in gate\n    self.released.wait()" in cut.stack
    assert str(cut).startswith("PUT /gate/export (running for ")
    (record,) = (each for each in caplog.records if each.getMessage().startswith("cut "))
    assert record.getMessage() == cut.with_stack()
    told, place, source, *_, last = record.getMessage().splitlines()
    assert told == f"cut {cut}"
    assert (place.partition(", in ")[2], source) == ("gate", "    self.released.wait()")
    assert re.fullmatch(r"  \.\.\. called by \d+ frames of .*flaskd, threading", last)
    assert record.fields["path"] == "/gate/export"
    assert (report.completed, server.in_flight) == (0, 0)
    assert client.ended()


def test_the_deadline_deals_with_every_phase(serve, app, connect):
    """At the deadline requests in every phase are accounted for; those that never began get a 503."""
    server = serve(threads=1)
    sending = connect(server, receive_buffer=16384).send("/big")
    until(server, lambda: [each.phase for each in server.requests()] == ["sending"])
    receiving = connect(server).send("/", post("/echo", b"0123456789")[:-6])
    receiving.response()
    app.entered(2)
    running = connect(server).send("/gate/running")
    app.entered(1)
    queued = connect(server).send("/gate/queued")
    until(server, lambda: server.queued == 1)
    report = server.drain(timeout=0)
    assert {(each.phase, each.method, each.path) for each in report.cut} == {
        ("sending", "GET", "/big"),
        ("running", "GET", "/gate/running"),
        ("receiving", "POST", "/echo"),
    }
    assert report.rejected == 1
    refusal = queued.response()
    assert (refusal.status, refusal.last, int(refusal.headers["Retry-After"]) > 0) == (503, True, True)
    assert all(client.ended() for client in (receiving, running, queued))
    with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
        sending.response()
    app.released.set()
    assert app.arrived.empty()


def test_a_cut_lets_go_of_a_worker_that_waits_for_a_reader(serve, app, connect):
    """A thread that waits for its client to read a large response is freed at once by a cut."""
    server = serve(threads=1, adjustments={"outbuf_high_watermark": 65536})
    client = connect(server, receive_buffer=16384).send("/flood")
    app.entered(1)
    (cut,) = server.drain(timeout=0).cut
    assert (cut.path, cut.phase) == ("/flood", "sending")
    with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
        client.response()
    server.stop()
    assert not app_threads()


def test_after_a_cut_all_threads_are_there_again(serve, app, connect):
    """Threads that hang in cut requests are replaced at a resume; there are not too many when they come back."""
    server = serve(threads=2)
    for _ in range(2):
        connect(server).send("/gate/stuck")
    app.entered(2)
    stuck, app.released = app.released, threading.Event()
    assert len(server.drain(timeout=0).cut) == 2
    server.resume()
    clients = [connect(server).send(f"/gate/{number}") for number in range(2)]
    assert app.entered(2) == {"/gate/0", "/gate/1"}
    assert len(app_threads()) == 5  # one thread leads
    stuck.set()
    until(server, lambda: len(app_threads()) == 3)
    app.released.set()
    assert [client.response().status for client in clients] == [200, 200]
    until(server, lambda: server.in_flight == 0)
    assert server.drain().clean


def test_a_worker_that_never_ends_is_abandoned(serve, app, connect, caplog):
    """A stop does not wait for ever for the thread of a cut request; the log has its stack."""
    server = serve()
    connect(server).send("/gate")
    app.entered(1)
    server.drain(timeout=0)
    (stuck,) = (each for each in server.app_threads() if "in gate\n" in _stack(each))
    server.end(timeout=0)
    (message,) = (each.getMessage() for each in caplog.records if "abandoned" in each.getMessage())
    assert message.startswith(f"{stuck.name} does not end, and is abandoned:\n")
    assert "in gate\n" in message
    assert stuck.is_alive()
    app.released.set()
    stuck.join(PATIENCE)
    assert not stuck.is_alive()
    server.loop.close(PATIENCE)  # only the trigger, which the thread may still use


def _stack(thread):
    from flaskd.stacks import stack_of

    return stack_of(thread)


# --- counting ----------------------------------------------------------------------------------------------------------


def test_in_flight_counts_from_the_last_byte_to_the_last_byte(serve, app, connect, answers):
    """A request is in flight from its last byte until the last byte of its answer is sent, then it is completed."""
    server = serve()
    assert (server.in_flight, server.completed) == (0, 0)
    client = connect(server).send("/gate/a")
    app.entered(1)
    assert (server.in_flight, server.completed, server.connections) == (1, 0, 1)
    (request,) = server.requests()
    assert (request.method, request.path, request.phase) == ("GET", "/gate/a", "running")
    assert request.stack == ""
    (cut,) = server.cut("a reason")
    assert (cut.path, cut.reason) == ("/gate/a", "a reason")
    assert "in gate" in cut.stack
    app.released.set()
    client.response()
    answers.get(timeout=PATIENCE)
    assert (server.in_flight, server.completed, server.requests()) == (0, 1, [])


def test_what_the_access_log_is_told(serve, app, connect, answers):
    """One answer is one record: client, request, status, bytes of the body, and seconds."""
    server = serve()
    began = time.time()
    connect(server).ask(get("/echo?q=%22", "Referer: http://a/", 'User-Agent: me "it"', method="POST"))
    fields = answers.get(timeout=PATIENCE)
    assert began <= fields.pop("time") <= time.time()
    assert 0 < fields.pop("took") < PATIENCE
    assert fields == {
        "id": 1, "client": "127.0.0.1", "method": "POST", "target": "/echo?q=%22", "protocol": "HTTP/1.1",
        "status": 200, "bytes": 0, "referer": "http://a/", "agent": 'me "it"',
    }  # fmt: skip


@pytest.mark.parametrize(
    ("request_bytes", "status", "size"),
    [
        (get("/"), 200, 5),
        (get("/", method="HEAD"), 200, 0),
        (get("/", version="1.0"), 200, 5),
        (post("/echo", b"x" * 70000), 200, 70000),
        (get("/nowhere"), 500, None),
        (get("/odd"), 500, None),
        (get("/boom"), 500, None),
        (b"GARBAGE\r\n\r\n", 400, None),
        (get("/", "Transfer-Encoding: odd, chunked"), 501, None),
    ],
)
def test_every_answer_is_told_with_its_status_and_size(request_bytes, status, size, serve, connect, answers):
    """Every answer is recorded with its status and the size of its body, whether the app made it or not."""
    connect(serve()).send(request_bytes)
    fields = answers.get(timeout=PATIENCE)
    assert fields["status"] == status
    assert fields["bytes"] == size if size is not None else fields["bytes"] > 0


def test_answers_are_told_once(serve, connect, answers):
    """Pipelined requests are recorded once for each answer."""
    paths = [f"/hello/{number}" for number in range(4)]
    client = connect(serve()).send(*paths)
    for _ in paths:
        client.response()
    assert sorted(answers.get(timeout=PATIENCE)["target"] for _ in paths) == paths
    assert answers.empty()


def test_a_probe_is_in_no_count_and_no_record(serve, app, connect, answers):
    """A probe runs the app in a thread, and is in no count and no record."""
    server = serve()
    assert server.probe("/", PATIENCE) == 200
    assert server.probe("/boom", PATIENCE) == 500
    with ThreadPoolExecutor(1) as pool:
        status = pool.submit(server.probe, "/gate", PATIENCE)
        app.entered(3)
        assert (server.in_flight, server.requests()) == (0, [])
        app.released.set()
        assert status.result(PATIENCE) == 200
    connect(server).ask("/")
    assert answers.get(timeout=PATIENCE)["target"] == "/"
    assert answers.empty()
    assert server.completed == 1
    assert server.drain().completed == 0


def test_a_probe_needs_no_listener(serve):
    """A drained server still answers a probe."""
    server = serve()
    server.drain()
    assert server.probe("/", PATIENCE) == 200


def test_a_probe_that_is_not_answered_in_time(serve, app):
    """A probe waits at most its timeout."""
    server = serve()
    with pytest.raises(AppError, match=r"^cannot get ready: /gate did not answer the probe within 0\.05s$"):
        server.probe("/gate", 0.05)


def test_a_probe_that_is_broken_off(serve, monkeypatch):
    """A probe that gets no answer raises an error that says so."""
    server = serve()
    monkeypatch.setattr("flaskd.server.connections.Connections.attach", lambda _, sock, **__: sock.close())
    with pytest.raises(AppError, match="^cannot get ready: the probe of / was broken off"):
        server.probe("/", PATIENCE)


def test_a_probe_whose_answer_trickles_has_one_deadline(serve, monkeypatch):
    """A probe's timeout is for the whole answer, not for each byte of it."""
    held = []

    def trickle(_, sock, **__):
        sock.setblocking(True)
        held.append(sock)
        threading.Thread(target=drip, args=(sock,), daemon=True).start()

    def drip(sock):
        pause = threading.Event()
        try:
            for byte in b"HTTP/1.1 200 OK and a reason that never ends" * 100:
                sock.sendall(bytes([byte]))
                pause.wait(0.05)
        except OSError:
            sock.close()

    server = serve()
    monkeypatch.setattr("flaskd.server.connections.Connections.attach", trickle)
    began = time.monotonic()
    with pytest.raises(AppError, match="did not answer the probe within 0.3s"):
        server.probe("/", 0.3)
    assert time.monotonic() - began < 2
    until(server, lambda: held[0].fileno() == -1)


def test_a_path_is_shown_without_what_could_paint_a_terminal(serve, app, connect):
    """Invisible characters stay percent-encoded as in RFC 3986; raw ones are refused (RFC 9112 §3.2)."""
    server = serve()
    connect(server).send("/gate/%1B[2J%07%0A")
    app.entered(1)
    (request,) = server.requests()
    assert request.path == "/gate/%1B[2J%07%0A"
    assert connect(server).send(get("/gate/").replace(b"/gate/", b"/gate/\x1b[2J\x07")).response().status == 400


def test_connections_are_limited_as_asked(serve, connect):
    """The connection limit is kept; a client that waits is served when another one leaves."""
    server = serve(adjustments={"connection_limit": 2})
    clients = [connect(server).send("/") for _ in range(3)]
    clients[1].response()
    assert clients[0].response().status == 200
    for _ in range(10):
        assert server.turns(PATIENCE)
    assert server.connections == 2
    clients[0].close()
    assert clients[2].response().status == 200


def test_the_number_of_threads_can_change(serve, app, connect):
    """New threads take queued requests at once; when the number is lowered, threads end after their requests."""
    server = serve(threads=1)
    clients = [connect(server).send(f"/gate/{number}") for number in range(3)]
    app.entered(1)
    until(server, lambda: server.queued == 2)
    server.set_threads(3)
    app.entered(2)
    assert len(app_threads()) == 4  # one thread leads
    server.set_threads(1)
    app.released.set()
    assert [client.response().status for client in clients] == [200, 200, 200]
    until(server, lambda: len(app_threads()) == 2)
    assert connect(server).ask("/").status == 200


# --- apps and clients that misbehave -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/boom", "/exit", "/exit?3", "/interrupt"])
def test_whatever_an_app_raises_is_a_500(path, serve, connect, answers, caplog):
    """SystemExit and the like are answered with 500 and logged with a traceback; thread and connection are freed."""
    server = serve(threads=1)
    for _ in range(3):
        client = connect(server)
        assert client.ask(path).status == 500
        assert client.ended()
        assert answers.get(timeout=PATIENCE)["status"] == 500
    assert connect(server).ask("/").status == 200
    report = server.drain()
    assert (server.in_flight, report.cut) == (0, ())
    assert any(each.exc_info for each in caplog.records)


@pytest.mark.parametrize("path", ["/half", "/half_exit", "/short"])
def test_a_response_that_breaks_off_is_seen_to_break_off(path, serve, connect):
    """The client can see that an answer is incomplete, and the request is not in flight any more."""
    server = serve(threads=1)
    for _ in range(3):
        client = connect(server).send(path)
        with pytest.raises(http.client.IncompleteRead):
            client.response()
        assert client.ended()
    assert connect(server).ask("/").status == 200
    assert server.drain().cut == ()


@pytest.mark.parametrize("path", ["/gate", "/stream", "/big"])
def test_a_client_that_went_away_is_not_in_flight(path, serve, app, connect, answers):
    """A client that left before its answer does not delay a drain, and does not count as answered."""
    server = serve(threads=1)
    client = connect(server, receive_buffer=16384).send(path)
    app.entered(1)
    client.reset()
    app.released.set()
    until(server, lambda: server.in_flight == 0)
    assert server.completed == 0
    assert connect(server).ask("/").status == 200
    report = server.drain()
    assert (report.cut, server.completed) == ((), 1)


def test_a_client_that_went_away_while_queued_is_not_in_flight(serve, app, connect):
    """A queued request whose client left is dropped, together with those pipelined behind it."""
    server = serve(threads=1)
    running = connect(server).send("/gate")
    app.entered(1)
    gone = connect(server).send("/", "/", "/")
    until(server, lambda: server.in_flight == 4)
    gone.reset()
    app.released.set()
    running.response()
    assert server.drain().cut == ()


@pytest.mark.parametrize(
    "requests",
    [
        [get("/", "Connection: close"), get("/"), get("/")],
        [get("/", version="1.0"), get("/"), get("/")],
        [get("/boom"), get("/"), get("/")],
        [get("/half"), get("/"), get("/")],
        [get("/exit"), get("/"), get("/")],
        [b"GARBAGE\r\n\r\n", get("/"), get("/")],
    ],
    ids=["close", "1.0", "error", "broken", "exit", "garbage"],
)
def test_what_was_pipelined_behind_the_end_is_not_in_flight(requests, serve, connect):
    """Requests pipelined behind a response that ends the connection are not in flight, and delay nothing."""
    server = serve()
    client = connect(server).send(*requests)
    client.file.read()
    until(server, lambda: server.in_flight == 0)
    report = server.drain()
    assert (report.completed, report.cut) == (0, ())


@pytest.mark.parametrize("more", [b"\r\n", b"\r\n\r\n", b"\r"])
def test_blank_lines_are_no_request(more, serve, connect, answers):
    """Blank lines after a request (RFC 9112 §2.2) do not delay a drain."""
    server = serve()
    client = connect(server).send(get("/") + more)
    client.response()
    answers.get(timeout=PATIENCE)
    report = server.drain()
    assert (report.completed, report.cut) == (0, ())


def test_a_client_that_expects_to_continue(serve, connect):
    """The client gets 100 before it sends the body, and then the answer."""
    client = connect(serve()).send(get("/echo", "Expect: 100-continue", "Content-Length: 5", method="POST"))
    assert client.response().status == 100
    assert client.ask(b"12345").body == b"12345"
    assert client.ask("/").status == 200


@pytest.mark.parametrize("headers", [[], ["Content-Length: 0"]], ids=["no length", "no body"])
def test_an_expectation_without_a_body_is_answered_at_once(headers, serve, connect):
    """A request without a body gets no 100, and is answered at once."""
    server = serve()
    client = connect(server)
    assert client.ask(get("/echo", "Expect: 100-continue", *headers, method="POST")).status == 200
    assert client.ask("/").status == 200
    assert server.drain().cut == ()


def test_an_expectation_that_is_refused_is_refused_at_once(serve, connect):
    """A body that is too large is refused before the client sends it."""
    server = serve(adjustments={"max_request_body_size": 4})
    request = get("/echo", "Expect: 100-continue", "Content-Length: 5", method="POST")
    client = connect(server)
    assert client.ask(request).status == 413
    assert client.ended()
    assert server.drain().cut == ()


def test_an_expectation_is_met_during_a_drain(serve, app, connect):
    """A client that asked for 100 before the drain may send its body during the drain."""
    server = serve()
    client = connect(server)
    client.ask("/")
    client.send(get("/echo", "Expect: 100-continue", "Content-Length: 5", method="POST"))
    assert client.response().status == 100
    with draining(server, app) as report:
        response = client.ask(b"12345")
        assert (response.body, response.last) == (b"12345", True)
    assert report.result().completed == 1


@pytest.mark.parametrize("body", [b"", b"12345"])
def test_http_1_1_without_a_host_is_refused(body, serve, app, connect, answers):
    """HTTP/1.1 without Host gets a 400 (RFC 9112 §3.2), and the app does not run."""
    client = connect(serve())
    assert client.ask(b"POST /echo HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)).status == 400
    assert client.ended()
    assert app.arrived.empty()
    assert answers.get(timeout=PATIENCE)["status"] == 400


def test_http_1_0_needs_no_host(serve, connect):
    """HTTP/1.0 without Host is served."""
    assert connect(serve()).ask(get("/", version="1.0")).status == 200


# --- listeners ---------------------------------------------------------------------------------------------------------


def test_a_unix_listener(serve, connect, answers, tmp_path):
    """A Unix socket is served, drained, resumed and removed like any other."""
    path = tmp_path / "s"
    server = serve(listeners=[Listener.bind(Address(path=str(path)))])
    assert server.url == Address(path=str(path)).url
    assert connect(server).ask("/").body == b"hello"
    assert answers.get(timeout=PATIENCE)["client"] == "unix"
    server.drain()
    assert not path.exists()
    server.resume()
    assert connect(server).ask("/").body == b"hello"
    server.stop()
    assert list(tmp_path.iterdir()) == []


def test_an_ipv6_listener(serve, connect, answers):
    """IPv6 is served like any other."""
    try:
        server = serve(host="::1")
    except CannotCreateError as error:
        pytest.skip(f"this machine has no IPv6 loopback address: {error}")
    assert server.url.startswith("http://[::1]:")
    assert connect(server).ask("/").body == b"hello"
    assert answers.get(timeout=PATIENCE)["client"] == "::1"
    server.drain()
    server.resume()
    assert connect(server).ask("/").body == b"hello"


def test_several_listeners_at_once(serve, app, connect, answers, tmp_path):
    """All listeners serve the same app with the same threads, and drain and resume together."""
    addresses = [Address("127.0.0.1"), Address("127.0.0.1"), Address(path=str(tmp_path / "s"))]
    server = serve(listeners=[Listener.bind(address) for address in addresses])
    for _ in range(2):
        clients = [connect(server, index) for index in range(3)]
        assert [client.ask("/").body for client in clients] == [b"hello"] * 3
        for client in clients:
            answers.get(timeout=PATIENCE)
            client.send("/gate")
        app.entered(6)
        assert (server.in_flight, server.connections) == (3, 3)
        with draining(server, app) as report:
            app.released.set()
            assert [client.response().last for client in clients] == [True] * 3
        assert report.result().completed == 3
        for _ in clients:
            answers.get(timeout=PATIENCE)
        for index in range(3):
            with pytest.raises((ConnectionRefusedError, FileNotFoundError)):
                connect(server, index)
        app.released.clear()
        server.resume()


# --- stop --------------------------------------------------------------------------------------------------------------


def test_stop_answers_what_is_in_flight(app, connect):
    """A stop answers requests in flight, as a drain does."""
    server = WaitressThread(app).start()
    client = connect(server).send("/gate")
    app.entered(1)
    with ThreadPoolExecutor(1) as pool:
        report = pool.submit(server.stop)
        assert app.draining.wait(PATIENCE)
        app.released.set()
        assert client.response().last
    assert report.result().completed == 1
    assert not app_threads()


def test_a_second_stop_gives_the_same_report(app, connect):
    """A second stop returns the same report; after a drain, a stop returns the drain's report."""
    server = WaitressThread(app).start()
    connect(server).ask("/")
    drained = server.drain()
    assert server.stop() is drained
    assert server.stop() is drained
    assert not server.turns(0)


def test_a_stop_cuts_at_its_timeout(app, connect):
    """A stop takes no longer than its timeout, and reports what it cut."""
    server = WaitressThread(app, threads=1).start()
    connect(server).send("/gate")
    app.entered(1)
    (worker,) = (each for each in app_threads() if "in gate\n" in _stack(each))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flaskd.server.server._JOIN_TIMEOUT", 0.01)
        patch.setattr(WaitressThread.end, "__defaults__", (0.01,))
        report = server.stop(timeout=0)
    assert [each.path for each in report.cut] == ["/gate"]
    app.released.set()
    worker.join(PATIENCE)
    server.loop.close(PATIENCE)


def test_stop_leaves_no_thread(app):
    """When stop returns, every thread has ended."""
    before = threading.enumerate()
    server = WaitressThread(app).start()
    assert len(threading.enumerate()) == len(before) + 5
    server.stop()
    assert threading.enumerate() == before


def test_cycles_leave_nothing_behind(app, connect):
    """Twenty starts and stops, each with a connection left open, leave no thread and no descriptor."""
    threads, before = threading.enumerate(), descriptors()
    for _ in range(20):
        with WaitressThread(app, threads=2) as server:
            client = Client(server.addresses[0])
            assert client.ask("/").status == 200
        assert client.ended()
        client.close()
    assert threading.enumerate() == threads
    assert descriptors() == before


def test_an_abandoned_start_leaves_nothing_behind(app, connect):
    """`abandon` ends a server without a drain, and closes open connections."""
    before = descriptors()
    server = WaitressThread(app).start()
    client = Client(server.addresses[0])
    client.ask("/")
    server.abandon()
    assert client.ended()
    client.close()
    server.abandon()
    assert descriptors() == before


def test_an_unstopped_server_keeps_no_interpreter_alive(tmp_path):
    """A script that does not stop its server ends all the same, even while a request hangs."""
    script = """
import socket, threading
from flaskd import ServerThread
entered = threading.Event()

def app(environ, start_response):
    entered.set()
    threading.Event().wait()

server = ServerThread(app).start()
client = socket.create_connection(("127.0.0.1", server.addresses[0].port))
client.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
assert entered.wait(10)
print("over", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (0, "over\n")


# --- the death of the serving thread -----------------------------------------------------------------------------------


def test_a_dead_serving_thread_is_told(app, connect, caplog):
    """The error that killed the serving thread is logged and passed to `on_death`; a drain raises, a stop works."""
    died = queue.SimpleQueue()
    server = WaitressThread(app, on_death=died.put).start()
    error = LookupError("on purpose")

    def die():
        raise error

    server.loop.call(die)
    server.loop.call(die)
    assert died.get(timeout=PATIENCE) is error
    assert not server.turns(0)
    with pytest.raises(FlaskdError, match="^cannot drain: the serving thread died: on purpose$"):
        server.drain()
    assert server.stop() == DrainReport()
    failed = "the serving thread failed, and goes on"
    assert [each.getMessage() for each in caplog.records if each.exc_info] == [failed, "the serving thread died"]


def test_one_error_in_the_serving_thread_is_pardoned(serve, connect, caplog):
    """A first error in the leading thread, which also runs the app, is logged, and another thread leads."""
    server = serve()
    server.loop.call(lambda: 1 / 0)
    until(server, lambda: "the serving thread failed, and goes on" in caplog.messages)
    assert connect(server).ask("/").status == 200
    assert "ZeroDivisionError" in caplog.text
