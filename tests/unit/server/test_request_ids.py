"""What a request is called: the ids of a trusted proxy, those that are made, and who is told them."""

import logging
import os
import random
import re
import threading
from pathlib import Path

import http_client
import pytest
from flask import Flask
from server_kit import PATIENCE, answers, app, connect, get, no_thread_left, serve, until

from flaskd import ServerThread
from flaskd.config import ServerConfig
from flaskd.server import BehindProxies, Limits
from flaskd.server.request_ids import Ids, IdSource, read_ids

pytestmark = pytest.mark.usefixtures("no_thread_left")

ROOT = Path(__file__).parents[3]
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"
MADE = re.compile("[0-9a-f]{32}")


def behind(app, *trusted):
    return BehindProxies(app, ServerConfig(trusted_proxy=list(trusted)))


@pytest.fixture
def told():
    """What the apps of `telling` were told of their requests."""
    return []


@pytest.fixture
def telling(told):
    def run(environ, start_response):
        told.append(environ.get("flaskd.request_id"))
        start_response("200 OK", [("Content-Length", "0")])
        return []

    return run


# --- what is taken ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["a", "A-z_0.9", "x" * 128, "-", "4bf92f35-77b3-4da6-a3ce-929d0e0e4736"])
def test_an_id_is_taken_as_it_is(given):
    """Up to 128 letters, digits, dots, hyphens and underscores."""
    assert read_ids({"HTTP_X_REQUEST_ID": given}) == Ids(given)


@pytest.mark.parametrize(
    "given", ["", "x" * 129, "a b", "a,b", "a, b", "a/b", "\xe4", "a\n", 'a"', "a=b", "a;b", "a:b"]
)
def test_no_other_id_is_taken(given):
    """Nothing that could mean more than a name in a log, and not two ids at once."""
    assert read_ids({"HTTP_X_REQUEST_ID": given, "HTTP_TRACEPARENT": TRACEPARENT}) == Ids("", TRACEPARENT)


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (TRACEPARENT, TRACEPARENT),
        (f"00-{TRACE}-{PARENT}-ff", f"00-{TRACE}-{PARENT}-ff"),
        (f"01-{TRACE}-{PARENT}-01", f"01-{TRACE}-{PARENT}-01"),
        (f"cc-{TRACE}-{PARENT}-01-what.will_be-Like-this", f"cc-{TRACE}-{PARENT}-01"),
        (f"cc-{TRACE}-{PARENT}-01-{'x' * 72}", f"cc-{TRACE}-{PARENT}-01"),
        (f"cc-{TRACE}-{PARENT}-01-{'x' * 73}", ""),
        (f"cc-{TRACE}-{PARENT}-01.x", ""),
        (f"cc-{TRACE}-{PARENT}-01-a b", ""),
        (f"00-{TRACE}-{PARENT}-01-more", ""),
        (f"00-{TRACE}-{PARENT}-01-", ""),
        (f"ff-{TRACE}-{PARENT}-01", ""),
        (f"00-{'0' * 32}-{PARENT}-01", ""),
        (f"00-{TRACE}-{'0' * 16}-01", ""),
        (f"00-{TRACE.upper()}-{PARENT}-01", ""),
        (f"00-{TRACE}-{PARENT}-0A", ""),
        (f"00-{TRACE[1:]}-{PARENT}-01", ""),
        (f"00-{TRACE}-{PARENT}", ""),
        (f"{TRACEPARENT}, {TRACEPARENT}", ""),
        (f" {TRACEPARENT}", ""),
        ("", ""),
    ],
)
def test_a_traceparent_is_taken_by_its_own_grammar(given, taken):
    """W3C Trace Context: lower-case hex, no ids of zeros, no version ff; of later versions what all have in common."""
    assert read_ids({"HTTP_TRACEPARENT": given}) == Ids("", taken)


@pytest.mark.parametrize(
    ("trusted", "taken"),
    [(["127.0.0.1"], True), (["localhost"], True), (["*"], True), (["192.0.2.1"], False), ([], False)],
)
def test_only_a_trusted_proxy_names_requests(serve, connect, answers, telling, trusted, taken):
    """What anybody else says is left out of the log, though nothing is made."""
    server = serve(behind(telling, *trusted))
    connect(server).ask(get("/", "X-Request-ID: abc", f"traceparent: {TRACEPARENT}"))
    line = answers.get(timeout=PATIENCE)
    shown = {key: line[key] for key in ("request_id", "traceparent") if key in line}
    assert shown == ({"request_id": "abc", "traceparent": TRACEPARENT} if taken else {})


# --- what is made -----------------------------------------------------------------------------------------------------


def test_nothing_is_made_unless_it_is_asked_for(serve, connect, answers, telling, told):
    """Then the app and the client are told no id, not even that of a trusted proxy, and the log has no field for it."""
    server = serve(behind(telling, "*"))
    for header in ("X-Request-ID: abc", "X-Other: 1"):
        assert connect(server).ask(get("/", header)).headers["X-Request-ID"] is None
    assert told == [None, None]
    assert [answers.get(timeout=PATIENCE).get("request_id") for _ in range(2)] == ["abc", None]


@pytest.mark.parametrize(
    ("trusted", "headers", "taken"),
    [
        ("*", ["X-Request-ID: abc"], True),
        ("*", ["X-Request-ID: abc", "Connection: close"], True),
        ("192.0.2.1", ["X-Request-ID: abc"], False),
        ("*", [], False),
        ("*", ["X-Request-ID:"], False),
        ("*", ["X-Request-ID: a b"], False),
        ("*", ["X-Request-ID: abc", "X-Request-ID: abc"], False),
        ("*", ["X-Request-ID: abc, abc"], False),
        ("*", ["X_Request_ID: abc"], False),
        ("*", [f"traceparent: {TRACEPARENT}"], False),
    ],
)
def test_app_client_and_log_are_told_the_same(serve, connect, answers, telling, told, trusted, headers, taken):
    """A trusted proxy's id, or a new one where there is none that is well-formed."""
    server = serve(behind(telling, trusted), ids=True)
    answer = connect(server).ask(get("/", *headers))
    [name] = told
    assert name == "abc" if taken else MADE.fullmatch(name)
    assert answer.headers.get_all("X-Request-ID") == [name]
    assert answers.get(timeout=PATIENCE)["request_id"] == name


def test_ids_are_made_without_proxies_too(serve, connect, telling, told):
    """Each request has its own, those on one connection too."""
    server = serve(telling, ids=True)
    client = connect(server)
    names = [client.ask("/").headers["X-Request-ID"] for _ in range(3)]
    assert names == told
    assert len(set(names)) == 3


def test_a_probe_has_an_id(serve, telling, told):
    """An app that relies on it is asked by `health.probe` as by anybody."""
    assert serve(telling, ids=True).probe("/", PATIENCE) == 200
    assert MADE.fullmatch(told[0])


def test_an_id_of_the_apps_own_stays(serve, connect):
    """What the app says of its answer is not said twice; its own is written as other headers are."""

    def own(environ, start_response):
        start_response("200 OK", [("x-request-id", "mine"), ("Content-Length", "0")])
        return []

    assert connect(serve(own, ids=True)).ask("/").headers.get_all("X-Request-ID") == ["mine"]


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (get("/hello", method="HEAD"), 200),
        (get("/empty"), 204),
        (get("/chunks"), 200),
        (get("/boom"), 500),
        (get("/odd"), 500),
        (get("/healthz"), 200),
        (get("/", version="2.0"), 505),
        (b"\x16\x03\x01\0\r\n", 400),
        (b"GET / HTTP/1.1\r\nX-Request-ID: abc\r\n\r\n", 400),
        (get("/", "Content-Length: 99999999999"), 413),
    ],
)
def test_every_answer_has_it(serve, app, connect, answers, request_, status):
    """Those that the app does not give, too, and those for what is no request; it is the one in the log."""
    server = serve(behind(app, "192.0.2.1"), ids=True)
    server.answer_health("/healthz", lambda: ("200 OK", "ready"))
    found, headers = connect(server).send(request_).head()
    assert found == status
    line = answers.get(timeout=PATIENCE)
    assert MADE.fullmatch(line["request_id"])
    assert headers.get_all("X-Request-ID") == [line["request_id"]]


def test_a_refusal_has_the_proxys_id(serve, app, connect):
    """Where its head could be read, a request is refused under the id by which the proxy knows it."""
    server = serve(behind(app, "*"), ids=True)
    _, headers = connect(server).send(get("/", "X-Request-ID: abc", "Content-Length: 99999999999")).head()
    assert headers["X-Request-ID"] == "abc"


def test_a_503_has_it(serve, app, connect):
    """What was never begun is rejected under its id, so that it can be asked for."""
    server = serve(behind(app, "*"), threads=1, ids=True)
    connect(server).send("/gate")
    app.entered(1)
    client = connect(server).send(get("/", "X-Request-ID: abc"))
    until(server, lambda: server.queued == 1)
    server.drain(0)
    status, headers = client.head()
    assert (status, headers["X-Request-ID"]) == (503, "abc")


@pytest.mark.parametrize(
    ("limits", "request_", "status"), [(Limits(timeout=0.1), "/gate", 504), (Limits(max_queue=0), "/hello", 503)]
)
def test_what_a_limit_refuses_or_gives_up_has_it(serve, app, connect, answers, limits, request_, status):
    """The app does not answer, and the client is told under which id it is in the log all the same."""
    server = serve(behind(app, "*"), threads=1, ids=True)
    if status == 503:
        connect(server).send("/gate")
        app.entered(1)
    server.limit(limits)
    assert server.turns(PATIENCE)
    found, headers = connect(server).send(get(request_, "X-Request-ID: abc")).head()
    assert (found, headers.get_all("X-Request-ID")) == (status, ["abc"])
    line = answers.get(timeout=PATIENCE)
    assert (line["status"], line["request_id"]) == (status, "abc")


def test_a_stream_that_is_ended_before_it_began_has_it(serve, connect):
    """A drain ends it with a header of its own."""
    entered, release = threading.Event(), threading.Event()

    def silent(environ, start_response):
        def nothing():
            entered.set()
            release.wait(PATIENCE)
            yield b"too late"

        start_response("200 OK", [("Content-Type", "text/event-stream")])
        return nothing()

    server = serve(behind(silent, "*"), ids=True, stream_grace=0.1)
    client = connect(server).send(get("/", "X-Request-ID: abc"))
    assert entered.wait(PATIENCE)
    server.drain(PATIENCE)
    release.set()
    status, headers = client.head()
    assert (status, headers["X-Request-ID"]) == (200, "abc")


# --- where it is shown ------------------------------------------------------------------------------------------------


def test_what_is_in_flight_or_cut_is_named(serve, app, connect, caplog):
    """`requests`, the account of a drain, its line in the log and the fields of that line."""
    server = serve(behind(app, "*"))
    connect(server).send(get("/gate", "X-Request-ID: abc", f"traceparent: {TRACEPARENT}"))
    app.entered(1)
    [shown] = server.requests()
    assert (shown.request_id, shown.traceparent) == ("abc", TRACEPARENT)
    with caplog.at_level("WARNING", logger="flaskd.server"):
        [cut] = server.drain(0).cut
    ids = {"request_id": "abc", "traceparent": TRACEPARENT}
    assert ids.items() <= cut.as_json().items()
    [line] = [each for each in caplog.records if each.getMessage().startswith("cut GET /gate")]
    assert ids.items() <= line.fields.items()
    assert ", request_id=abc): " in line.getMessage().splitlines()[0]


def test_a_body_that_is_cut_is_named(serve, app, connect):
    """A request that has not come whole has what its proxy says of it; nothing is made for it, for none was told."""
    server = serve(behind(app, "*"), ids=True)
    connect(server).ask("/hello")
    connect(server).send(get("/", "X-Request-ID: abc", "Content-Length: 5", method="POST"))
    connect(server).send(get("/", "Content-Length: 5", method="POST"))
    until(server, lambda: sum(each.arriving is not None for each in server.loop.connections.channels()) == 2)
    assert [each.request_id for each in server.drain(0).cut] == ["abc", ""]


def test_what_is_said_of_a_request_names_it(serve, app, connect, caplog):
    """The traceback of an app that fails can be found by the id that the client was told."""
    server = serve(app, ids=True)
    with caplog.at_level("ERROR", logger="waitress"):
        name = connect(server).ask("/boom").headers["X-Request-ID"]
    [line] = [each for each in caplog.records if each.levelno == logging.ERROR]
    assert line.getMessage() == f"Exception while serving /boom request_id={name}"
    assert line.fields == {"id": 1, "request_id": name}


def test_a_change_holds_for_requests_that_come_behind_it(serve, app, connect, answers):
    """One that is in flight keeps what its app was told, and is told nothing more."""
    server = serve(app, threads=2)
    without = connect(server).send("/gate/without")
    app.entered(1)
    server.give_ids(on=True)
    named = connect(server).send("/gate/with")
    app.entered(1)
    server.give_ids(on=False)
    names = {each.path: each.request_id for each in server.requests()}
    app.released.set()
    assert without.response().headers["X-Request-ID"] is None
    assert named.response().headers["X-Request-ID"] == names["/gate/with"]
    assert names["/gate/without"] == ""


def test_a_server_thread_gives_ids(telling, told):
    """As its configuration has it; Werkzeug's server gives none."""
    for kind in ("waitress", "werkzeug"):
        with ServerThread(telling, server=kind, config={"log": {"request_id": True}}) as server:
            assert http_client.get(server.url)[0] == 200
    assert MADE.fullmatch(told[0])
    assert told[1] is None


def test_the_apps_log_can_have_it(serve, connect, caplog):
    """By the filter that docs/proxy.md shows; lines outside of a request have none."""
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs/proxy.md").read_text(), re.DOTALL)
    made = {}
    exec(code, made)
    shop, log = Flask("shop"), logging.getLogger("shop")

    @shop.get("/")
    def index():
        log.warning("inside")
        return ""

    caplog.handler.addFilter(shown := made["RequestId"]())
    try:
        name = connect(serve(shop, ids=True)).ask("/").headers["X-Request-ID"]
        log.warning("outside")
    finally:
        caplog.handler.removeFilter(shown)
    said = {each.getMessage(): each.request_id for each in caplog.records if each.name == "shop"}
    assert said == {"inside": name, "outside": "-"}


# --- its source -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is nothing to fork")
def test_forked_processes_make_other_ids():
    """Workers of one template share all that it had at the fork: each makes a source of its own after it."""
    reader, writer = os.pipe()
    for _ in range(2):
        if not (pid := os.fork()):
            try:
                make = IdSource()
                os.write(writer, b"".join(make().encode() + b"\n" for _ in range(50)))
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        names = pipe.read().split()
    assert all(map(MADE.fullmatch, names))
    assert len(set(names)) == len(names) == 100


def test_an_app_that_seeds_its_random_numbers_changes_no_ids():
    """Two workers whose apps call random.seed(1) in each request make other ids all the same."""
    state = random.getstate()
    try:
        names = set()
        for make in (IdSource(), IdSource()):
            for _ in range(3):
                random.seed(1)
                names.add(make())
    finally:
        random.setstate(state)
    assert len(names) == 6
