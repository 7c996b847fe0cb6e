"""`ServerThread` on both servers: start, clients, stop, and that nothing is left behind."""

import concurrent.futures
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
import threading
import time
import types
from collections.abc import Mapping
from pathlib import Path

import flask
import pytest
from http_client import Answer, outcome
from patience import PATIENCE

import flaskd
from flaskd.cleanup import BEFORE_THE_DRAIN, BESIDE_THE_DRAIN, Runner, callbacks
from flaskd.errors import CannotCreateError, ConfigError, FlaskdError
from flaskd.server import WaitressThread
from flaskd.server.werkzeug import WerkzeugThread

SERVERS = {"waitress": WaitressThread, "werkzeug": WerkzeugThread}


@pytest.fixture(params=SERVERS)
def kind(request):
    return request.param


@pytest.fixture
def registered(monkeypatch):
    """A registry of functions for this test alone."""
    monkeypatch.setattr(callbacks, "_registered", [])


class Shop:
    """An app with a page that waits until the test releases it."""

    def __init__(self):
        self.entered = threading.Semaphore(0)
        self.released = threading.Event()
        self.flask = app = flask.Flask("shop")
        app.add_url_rule("/", "hello", lambda: "hello\n")
        app.add_url_rule("/wait", view_func=self.wait)
        app.add_url_rule("/fail", view_func=self.fail)
        app.add_url_rule("/leave", view_func=self.leave)
        app.add_url_rule("/stream", view_func=self.stream)
        app.add_url_rule("/upload", "upload", lambda: str(len(flask.request.get_data())), methods=["POST"])

    def wait(self):
        self.entered.release()
        assert self.released.wait(PATIENCE)
        return "waited\n"

    def fail(self):
        raise LookupError("on purpose")

    def leave(self):
        raise SystemExit(3)

    def stream(self):
        def produce():
            yield "data: first\n\n"
            self.entered.release()
            assert flask.request.environ["flaskd.draining"].wait(PATIENCE)
            while True:
                yield "data: more\n\n"
                time.sleep(0.01)  # paces the stream; nothing waits for this

        return flask.Response(flask.stream_with_context(produce()), mimetype="text/event-stream")


@pytest.fixture
def shop():
    shop = Shop()
    yield shop
    shop.released.set()


def ask(server, path, method="GET"):
    """The outcome of one request: (status, body), or the error."""
    return outcome(f"http://127.0.0.1:{server.port}/", path, method)


@pytest.fixture(autouse=True)
def nothing_left():
    """After each test there is no thread and no open socket that was not there before it."""
    before = set(threading.enumerate())
    yield
    left = {each for each in threading.enumerate() if each not in before}
    for each in left:
        each.join(PATIENCE)
    assert not [each.name for each in left if each.is_alive()]
    gc.collect()  # an unclosed socket is a ResourceWarning, and that is an error


def test_it_serves_and_stops_twice_in_a_row(shop, kind):
    """An app can be served by two servers one after the other, and a server can be started again."""
    for _ in range(2):
        with flaskd.ServerThread(shop.flask, server=kind) as server:
            assert server.url == f"http://127.0.0.1:{server.port}/"
            assert ask(server, "/") == (200, b"hello\n")
        assert isinstance(ask(server, "/"), ConnectionRefusedError)
    server.start()
    assert ask(server, "/") == (200, b"hello\n")
    assert server.stop().clean


def test_what_is_in_flight_at_the_stop_is_answered(shop, kind):
    """A stop waits for requests in hand, refuses new ones at once, and counts the answered ones."""
    server = flaskd.ServerThread(shop.flask, server=kind).start()
    clients = [Answer(server.url, "/wait") for _ in range(3)]
    for _ in clients:
        assert shop.entered.acquire(timeout=PATIENCE)
    assert server.in_flight == 3
    assert {each.path for each in server.requests()} == {"/wait"}
    stopping = threading.Thread(target=lambda: reports.append(server.stop()))
    reports = []
    stopping.start()
    while not isinstance(ask(server, "/"), ConnectionRefusedError):
        pass
    shop.released.set()
    assert [each.result() for each in clients] == [(200, b"waited\n")] * 3
    stopping.join(PATIENCE)
    [report] = reports
    assert report.completed >= 3
    assert report.clean
    assert server.in_flight == 0
    assert server.stop() is report


def test_what_is_not_done_in_time_is_cut_and_named(shop, kind, caplog):
    """The report names the request that was cut, and the stop takes no longer than its timeout."""
    server = flaskd.ServerThread(shop.flask, server=kind).start()
    client = Answer(server.url, "/wait")
    assert shop.entered.acquire(timeout=PATIENCE)
    began = time.monotonic()
    report = server.stop(timeout=0.3)
    assert time.monotonic() - began < 5
    [cut] = report.cut
    assert (cut.method, cut.path) == ("GET", "/wait")
    assert "in wait" in cut.stack
    assert isinstance(client.result(), Exception)
    assert any("cut GET /wait" in each.getMessage() for each in caplog.records)


def test_a_drain_reports_and_leaves_the_stop_to_do(shop, kind):
    """`drain` needs no argument and refuses new clients; a stop after it has the same report."""
    server = flaskd.ServerThread(shop.flask, server=kind).start()
    report = server.drain()
    assert report.clean
    assert isinstance(report.took, float)
    assert isinstance(ask(server, "/"), ConnectionRefusedError)
    assert server.stop() == report


def test_resume(shop):
    """Waitress serves again at the same address; Werkzeug's server raises an error that says that it cannot."""
    with flaskd.ServerThread(shop.flask) as server:
        url = server.url
        server.drain()
        server.resume()
        assert server.url == url
        assert ask(server, "/") == (200, b"hello\n")
    with flaskd.ServerThread(shop.flask, server="werkzeug") as server:
        server.drain()
        with pytest.raises(FlaskdError, match="^cannot resume: "):
            server.resume()


def test_a_busy_port_is_an_error_at_once(shop, kind):
    """`start` raises the error of a busy port, and leaves nothing open."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(CannotCreateError, match=f"^cannot listen on 127.0.0.1:{port}: Address already in use"):
            flaskd.ServerThread(shop.flask, port=port, server=kind).start()


def open_files():
    """What the descriptors of this process refer to, without the one that lists them."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append((number, str(Path(f"/proc/self/fd/{number}").readlink())))
    return sorted(found)


@pytest.mark.skipif(sys.platform != "linux", reason="descriptors are counted in /proc")
def test_a_start_without_enough_threads_leaves_nothing(shop, kind, monkeypatch):
    """If any of its threads cannot be started, `start` raises, closes all files, and can be tried again."""
    server, real, left = flaskd.ServerThread(shop.flask, threads=2, server=kind), threading.Thread.start, []

    def start(thread):
        if thread.name.startswith("flaskd-"):
            if not left:
                raise RuntimeError("can't start new thread")
            left.pop()
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    before = open_files()
    for count in range(10):
        left = [None] * count
        try:
            server.start()
        except RuntimeError as error:
            assert str(error) == "can't start new thread"  # noqa: PT017 - at some count there is no error
        else:
            break
        gc.collect()
        assert open_files() == before
    monkeypatch.undo()
    assert 0 < count < 10
    assert ask(server, "/") == (200, b"hello\n")
    assert server.stop().clean


def test_wrong_arguments_are_refused(shop):
    """An unknown server, a wrong configuration and a second start are refused."""
    with pytest.raises(ValueError, match='^cannot serve with \'gevent\': expected "waitress" or "werkzeug"$'):
        flaskd.ServerThread(shop.flask, server="gevent")
    with pytest.raises(ConfigError, match="cleanup.policies.x.use"):
        flaskd.ServerThread(shop.flask, config={"cleanup": {"policies": {"x": {"use": "no.such"}}}})
    with flaskd.ServerThread(shop.flask) as server, pytest.raises(FlaskdError, match="^cannot start: this server is"):
        server.start()
    with pytest.raises(FlaskdError, match="has not been started"):
        flaskd.ServerThread(shop.flask).drain()
    assert flaskd.ServerThread(shop.flask).stop().clean


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"port": -1}, ValueError),
        ({"port": 65536}, ValueError),
        ({"port": "80"}, TypeError),
        ({"threads": 0}, ValueError),
        ({"threads": 1.5}, TypeError),
        ({"threads": True}, TypeError),
        ({"host": None}, TypeError),
    ],
    ids=str,
)
def test_arguments_that_cannot_be_are_told_at_once(shop, wrong, error):
    """Wrong arguments raise at once, and nothing is started, neither a thread nor a process."""
    for make in (lambda: flaskd.ServerThread(shop.flask, **wrong), lambda: flaskd.ServerProcess("shop:app", **wrong)):
        with pytest.raises(error, match=r"^cannot serve .*: expected a .*, got "):
            make()


def test_an_app_that_fails_or_exits_stops_nothing(shop, kind, caplog):
    """If the app fails or exits, its client gets a 500 or the end, the next one is served, and the stop is clean."""
    with flaskd.ServerThread(shop.flask, server=kind) as server:
        assert ask(server, "/fail")[0] == 500
        ask(server, "/leave")
        assert ask(server, "/") == (200, b"hello\n")
    assert server.stop().clean


def test_an_event_stream_ends_in_good_order(shop, kind):
    """A stream learns that a drain began, and ends between two events with a last chunk."""
    server = flaskd.ServerThread(shop.flask, server=kind, config={"shutdown": {"drain": {"stream_grace": "100ms"}}})
    server.start()
    client = Answer(server.url, "/stream")
    assert shop.entered.acquire(timeout=PATIENCE)
    assert server.stop().clean
    status, body = client.result()
    assert status == 200
    assert body.startswith(b"data: first\n\ndata: more\n\n")
    assert body.endswith(b"\n\n")


def test_a_client_that_connected_and_says_nothing_keeps_no_stop_waiting(shop, kind):
    """A silent client does not delay a stop: it gets the end of its connection."""
    server = flaskd.ServerThread(shop.flask, server=kind).start()
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        assert ask(server, "/") == (200, b"hello\n")  # it connected later, so the silent one has been accepted
        assert server.stop(timeout=PATIENCE).took < PATIENCE / 2
        client.settimeout(PATIENCE)
        assert client.recv(1) == b""


def test_a_request_that_is_still_coming_is_read_on(shop, kind):
    """An upload whose second half comes during the stop is answered."""
    server = flaskd.ServerThread(shop.flask, server=kind).start()
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as client:
        client.sendall(b"POST /upload HTTP/1.1\r\nHost: shop\r\nContent-Length: 10\r\n")
        assert ask(server, "/") == (200, b"hello\n")
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        while not isinstance(ask(server, "/"), ConnectionRefusedError):
            pass
        client.sendall(b"\r\n0123456789")
        answer = b"".join(iter(lambda: client.recv(4096), b""))
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert answer.endswith(b"\r\n\r\n10")
        stopping.join(PATIENCE)


def test_cleanup_runs_after_the_drain(shop, kind, registered, tmp_path):
    """Policies and functions run after the last request was answered, in their order, in the app's context."""
    said = []

    @flaskd.on_stop
    def first_registered():
        said.append(("first", flask.current_app.name, server.in_flight))

    @flaskd.on_stop(phase="quiesce", timeout=5)
    def last_registered(context):
        said.append(("last", context.reason, shop.released.is_set()))

    @flaskd.on_stop(phase="announce")
    def early():
        said.append(("early", shop.released.is_set()))
        shop.released.set()

    mark = tmp_path / "mark"
    policy = {"use": "command", "phase": "close", "with": {"argv": ["touch", str(mark)]}}
    server = flaskd.ServerThread(shop.flask, server=kind, config={"cleanup": {"policies": {"mark": policy}}})
    with server:
        client = Answer(server.url, "/wait")
        assert shop.entered.acquire(timeout=PATIENCE)
    assert client.result() == (200, b"waited\n")
    assert said == [("early", False), ("last", "control", True), ("first", "shop", 0)]
    assert mark.exists()
    assert {name: entry["fate"] for name, entry in server.policies.items()} == dict.fromkeys(
        ["early", "last_registered", "first_registered", "mark"], "ok"
    )


def test_functions_for_one_app_run_at_its_stop_alone(shop, registered):
    """A function that a factory registers for its app is not run for another app."""
    other, said = flask.Flask("other"), []
    for app in (shop.flask, other):
        flaskd.on_stop(app=app)(lambda name=app.name: said.append(name))
    with flaskd.ServerThread(other):
        pass
    assert said == ["other"]


def test_functions_that_cannot_be_called_are_refused(registered):
    """A coroutine function, too many arguments, an unknown phase and a timeout of 0 are refused."""

    async def later():
        pass

    with pytest.raises(TypeError, match="^cannot call .* at the stop: expected a plain function"):
        flaskd.on_stop(later)
    with pytest.raises(TypeError, match="of no argument, or of one$"):
        flaskd.on_stop(lambda one, two: None)
    with pytest.raises(ValueError, match="'never' is not a valid Phase"):
        flaskd.on_stop(phase="never")(print)
    for timeout in (0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="expected a timeout above 0 seconds, got "):
            flaskd.on_stop(timeout=timeout)(print)
    with pytest.raises(TypeError, match="^cannot call print after <built-in function abs>: expected the name of a"):
        flaskd.on_stop(after=[abs])(print)


def test_a_later_function_can_wait_for_an_earlier_one(shop, registered, caplog):
    """`after` comes before the usual order (last in, first out), and every function runs."""
    said = []

    @flaskd.on_stop
    def first():
        said.append("first")

    @flaskd.on_stop(after="first")
    def second():
        said.append("second")

    @flaskd.on_stop
    def third():
        said.append("third")

    with flaskd.ServerThread(shop.flask):
        pass
    assert sorted(said) == ["first", "second", "third"]
    assert said.index("first") < said.index("second")
    assert said.index("third") < said.index("second")
    assert "cannot wait" not in caplog.text


class Broken(Mapping):
    """An object that a policy may name, and that raises when it is looked at."""

    def __getitem__(self, key):
        raise LookupError("on purpose")

    def __iter__(self):
        raise LookupError("on purpose")

    def __len__(self):
        return 1


def test_objects_that_cannot_be_looked_at_keep_no_stop_from_draining(shop, registered, monkeypatch):
    """The request in hand is answered, and the policy that names such an object fails."""
    module = types.ModuleType("broken_pools")
    module.pools = Broken()
    monkeypatch.setitem(sys.modules, "broken_pools", module)
    policy = {"use": "executor.stop", "with": {"target": "broken_pools:pools"}}
    config = {"cleanup": {"discovery": "auto", "policies": {"pools": policy}}}
    server = flaskd.ServerThread(shop.flask, config=config).start()
    client = Answer(server.url, "/wait")
    assert shop.entered.acquire(timeout=PATIENCE)
    reports = []
    stopping = threading.Thread(target=lambda: reports.append(server.stop()))
    stopping.start()
    while not isinstance(ask(server, "/"), ConnectionRefusedError):
        pass
    shop.released.set()
    assert client.result() == (200, b"waited\n")
    stopping.join(PATIENCE)
    assert reports[0].clean
    assert server.policies["pools"]["fate"] == "failed"


def test_an_edge_to_nothing_is_told(shop, registered, caplog):
    """A function that is to run after an unknown one runs, and the log names the unknown one."""
    said = []
    flaskd.on_stop(after="close-db")(lambda: said.append("ran"))
    with flaskd.ServerThread(shop.flask):
        pass
    assert said == ["ran"]
    assert 'function cannot wait for "close-db"' in caplog.text


def test_a_cleanup_that_hangs_costs_its_time_and_no_more(shop, registered, caplog):
    """The stop returns at its deadline, the stuck step's stack is logged, and the drain's report is returned."""
    hang = threading.Event()
    flaskd.on_stop(timeout=0.2)(hang.wait)
    server = flaskd.ServerThread(shop.flask).start()
    began = time.monotonic()
    assert server.stop().clean
    assert time.monotonic() - began < 5
    assert server.policies["wait"]["fate"] == "timed_out"
    hang.set()


@pytest.mark.parametrize("phases", [BEFORE_THE_DRAIN, BESIDE_THE_DRAIN])
def test_a_cleanup_that_breaks_off_cuts_no_request(shop, kind, caplog, monkeypatch, phases):
    """If the cleanup fails before or during the drain, the request in hand is answered and reported."""
    run, broken_off, reports = Runner.run, threading.Event(), []

    def broken(self, wanted, outcome="clean"):
        if wanted == phases:
            broken_off.set()
            raise RuntimeError("on purpose")
        return run(self, wanted, outcome)

    def begin_drain(self, timeout, over, **more):
        def look(report):
            reports.append(report)
            over(report)

        real(self, timeout, look, **more)
        threading.Thread(target=lambda: broken_off.wait(PATIENCE) and shop.released.set()).start()

    monkeypatch.setattr(Runner, "run", broken)
    server = flaskd.ServerThread(shop.flask, server=kind).start()
    client = Answer(server.url, "/wait")
    assert shop.entered.acquire(timeout=PATIENCE)
    real = SERVERS[kind].begin_drain
    monkeypatch.setattr(SERVERS[kind], "begin_drain", begin_drain)
    assert server.stop() == reports[0]
    assert reports[0].clean
    assert client.result() == (200, b"waited\n")
    assert "cleanup broke off: on purpose" in caplog.text


def test_a_drain_that_breaks_off_is_not_clean(shop, caplog, monkeypatch):
    """If the drain fails, requests in hand are reported as cut, and the stop ends."""
    server = flaskd.ServerThread(shop.flask).start()
    client = Answer(server.url, "/wait")
    assert shop.entered.acquire(timeout=PATIENCE)

    def broken(*_, **__):
        raise RuntimeError("on purpose")

    monkeypatch.setattr(WaitressThread, "begin_drain", broken)
    report = server.stop()
    shop.released.set()
    client.result()
    assert [(each.path, each.reason) for each in report.cut] == [("/wait", "the drain broke off: on purpose")]
    assert "the drain broke off" in caplog.text


def test_a_stop_can_be_hurried(shop, kind):
    """A second request to stop cuts requests in hand at once."""
    server = flaskd.ServerThread(shop.flask, server=kind).start()
    client = Answer(server.url, "/wait")
    assert shop.entered.acquire(timeout=PATIENCE)
    reports = []
    stopping = threading.Thread(target=lambda: reports.append(server.stop(timeout=PATIENCE * 2)))
    stopping.start()
    while not isinstance(ask(server, "/"), ConnectionRefusedError):
        pass
    server.hurry()
    stopping.join(PATIENCE)
    assert "/wait" in [each.path for each in reports[0].cut]  # and perhaps an answer that its client has read already
    assert isinstance(client.result(), Exception)


def test_a_hurried_stop_is_not_the_end_of_the_process(shop, registered, monkeypatch):
    """Without `own_process`, a hurried stop does not arm the end of the process."""
    armed = []
    monkeypatch.setattr("faulthandler.dump_traceback_later", lambda *args, **options: armed.append(args))
    server = flaskd.ServerThread(shop.flask).start()
    flaskd.on_stop(server.hurry)
    server.stop()
    assert server.policies["hurry"]["fate"] == "ok"
    assert armed == []


def test_a_request_can_stop_the_server_that_it_is_in(shop, kind, registered):
    """A request that stops its own server is answered, and `join` in another thread returns after the cleanup."""
    said = []
    flaskd.on_stop(lambda: said.append("cleaned up"))
    server = flaskd.ServerThread(shop.flask, server=kind)

    @shop.flask.post("/shutdown")
    def shutdown():
        server.stop()
        server.stop()
        assert flask.request.environ["flaskd.draining"].wait(PATIENCE)
        return f"{server.in_flight}"

    for times in (1, 2):
        server.start()
        server.join(0)
        assert ask(server, "/shutdown", "POST") == (200, b"1")
        server.join()
        assert said == ["cleaned up"] * times
        assert (server.report.completed, server.report.cut) == (1, ())
        assert server.stop() is server.report
        assert isinstance(ask(server, "/"), ConnectionRefusedError)


def test_a_request_cannot_wait_for_its_own_drain(shop, kind):
    """`drain` inside of a request raises at once, and the server goes on serving."""

    @shop.flask.post("/drain")
    def drain():
        with pytest.raises(FlaskdError, match="^cannot drain: this is a request that the drain would wait for; call"):
            server.drain()
        return "served"

    with flaskd.ServerThread(shop.flask, server=kind) as server:
        assert ask(server, "/drain", "POST") == (200, b"served")
        assert ask(server, "/") == (200, b"hello\n")


def test_a_cleanup_step_can_call_stop(shop, kind, registered):
    """`stop` inside of a cleanup step returns at once; each step runs once, other threads wait for the end."""
    said = []

    @flaskd.on_stop(phase="close")
    def last():
        said.append(("last", server.stop().completed))

    @flaskd.on_stop(phase="announce")
    def first():
        said.append(("first", server.stop().completed))

    @shop.flask.get("/drained")
    def drained():
        shop.entered.release()
        assert flask.request.environ["flaskd.draining"].wait(PATIENCE)
        return "drained"

    with flaskd.ServerThread(shop.flask, server=kind) as server:
        client = Answer(server.url, "/drained")
        assert shop.entered.acquire(timeout=PATIENCE)
    assert said == [("first", 0), ("last", 1)]
    assert {entry["fate"] for entry in server.policies.values()} == {"ok"}
    assert client.result() == (200, b"drained")


def test_ctrl_c_in_a_stop_cuts_it_short_and_repeats_nothing(shop, kind, registered):
    """Ctrl-C in a stop cuts requests, each cleanup step runs once, and a second stop has the same report."""
    said = []

    @flaskd.on_stop(phase="announce")
    def press():
        said.append("announce")
        if said == ["announce"]:  # only once: a second one would end the tests
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    flaskd.on_stop(phase="close")(lambda: said.append("close"))
    server = flaskd.ServerThread(shop.flask, server=kind).start()
    client = Answer(server.url, "/wait")
    assert shop.entered.acquire(timeout=PATIENCE)
    with pytest.raises(KeyboardInterrupt):
        server.stop(timeout=PATIENCE * 2)
    assert [each.path for each in server.stop().cut] == ["/wait"]
    assert said == ["announce", "close"]
    assert isinstance(client.result(), Exception)


def test_a_signal_can_stop_what_is_stopping(shop, kind, registered):
    """A signal handler that calls `stop` during a stop in the main thread waits for that stop, without a deadlock."""
    reports, ran = [], []

    @flaskd.on_stop
    def terminate():
        ran.append(True)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)

    server = flaskd.ServerThread(shop.flask, server=kind).start()
    before = signal.signal(signal.SIGTERM, lambda *_: reports.append(server.stop()))
    try:
        report = server.stop()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ran == [True]
    assert reports == [report]


def test_a_backlog_is_answered(shop, kind):
    """Clients whose handshake was done when the stop came are answered, not reset."""
    server = flaskd.ServerThread(shop.flask, threads=2, server=kind).start()
    clients = [socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) for _ in range(30)]
    for client in clients:
        client.sendall(b"GET / HTTP/1.1\r\nHost: shop\r\nConnection: close\r\n\r\n")
    report = server.stop()
    for client in clients:
        assert b"".join(iter(lambda: client.recv(4096), b"")).endswith(b"hello\n")  # noqa: B023 - read at once
        client.close()
    assert report.clean


def test_what_a_client_sends_paints_no_terminal(shop, kind, caplog):
    """Control characters in a path or method are percent-encoded where requests are shown and logged."""
    method, shown, path = "GET", "GET", b"/x%1B]0;%07%41"
    if kind == "werkzeug":  # flaskd's parser refuses such a method or path
        method, shown, path = "G\x1b[2J", "G%1B[2J", b"/x\x1b]0;\x07%41"
    shop.flask.add_url_rule("/<path:_>", "any", lambda _: shop.wait(), methods=[method])
    server = flaskd.ServerThread(shop.flask, server=kind).start()
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(method.encode() + b" " + path + b"?secret HTTP/1.1\r\nHost: shop\r\n\r\n")
        assert shop.entered.acquire(timeout=PATIENCE)
        [request] = server.requests()
        [cut] = server.stop(timeout=0.1).cut
    assert (request.method, request.path) == (cut.method, cut.path) == (shown, "/x%1B]0;%07%41")
    assert "\x1b" not in caplog.text
    shop.released.set()


def test_it_works_without_logging(shop, kind, caplog):
    """A run without problems logs nothing above INFO."""
    with flaskd.ServerThread(shop.flask, server=kind) as server:
        ask(server, "/")
    assert [each for each in caplog.records if each.levelno > logging.INFO] == []


@pytest.mark.parametrize(
    ("cleanup", "steps"),
    [
        ({}, []),
        ({"discovery": "report"}, []),
        ({"discovery": "auto"}, ["found:executor.stop"]),
        ({"policies": {"jobs": {"use": "executor.stop"}}}, ["jobs"]),
    ],
)
def test_discovery_is_off_unless_it_is_asked_for(registered, monkeypatch, cleanup, steps):
    """What the app holds is left alone after a server in a thread, unless a policy or the configuration asks for it."""
    from flaskd.cleanup import discovery

    real = discovery.discover
    with concurrent.futures.ThreadPoolExecutor() as executor:
        monkeypatch.setattr(discovery, "discover", lambda app: real(app, [executor]))
        with flaskd.ServerThread(flask.Flask("shop"), config={"cleanup": cleanup}) as server:
            pass
        assert list(server.policies) == steps
        with pytest.raises(RuntimeError, match="after shutdown") if steps else contextlib.nullcontext():
            executor.submit(int)


@pytest.mark.parametrize(
    "late",
    [
        *("flaskd-thread-0", "flaskd-werkzeug-1", "flaskd-server", "flaskd-drain", "flaskd-discovery"),
        *("flaskd-cleanup-pool", "flaskd-cleanup-pool-0", "flaskd-cleanup"),
    ],
)
def test_when_the_stop_returns_its_threads_have_ended(late, shop, kind, registered, monkeypatch):
    """When `stop` has returned, all threads have ended, even one that is late to end."""
    real = threading.Thread.run

    def run(thread):
        real(thread)
        if thread.name == late:
            time.sleep(0.2)

    monkeypatch.setattr(threading.Thread, "run", run)
    before = threading.enumerate()
    flaskd.on_stop(app=shop.flask)(lambda: None)
    shop.flask.extensions["pool"] = concurrent.futures.ThreadPoolExecutor(1)
    config = {"cleanup": {"discovery": "auto", "policies": {"pool": {"use": "executor.stop"}}}}
    with flaskd.ServerThread(shop.flask, config=config, server=kind) as server:
        assert ask(server, "/") == (200, b"hello\n")
    assert {each["fate"] for each in server.policies.values()} == {"ok"}
    assert threading.enumerate() == before


def test_a_hurry_between_a_drain_asked_for_and_begun_counts(shop, kind):
    """A hurry before the serving thread has heard of the drain ends the drain at once."""
    server = flaskd.ServerThread(shop.flask, server=kind).start()
    flaskd.on_stop(app=shop.flask, phase="announce")(server.hurry)
    client = Answer(server.url, "/wait")
    assert shop.entered.acquire(timeout=PATIENCE)
    began = time.monotonic()
    assert [each.path for each in server.stop(timeout=PATIENCE * 2).cut] == ["/wait"]
    assert time.monotonic() - began < PATIENCE
    assert isinstance(client.result(), Exception)
