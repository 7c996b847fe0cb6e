"""Ids of requests: from a trusted proxy or made by flaskd, and where they are shown."""

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
    """What the apps of `telling` got as ids."""
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
    """An id may have up to 128 letters, digits, dots, hyphens and underscores."""
    assert read_ids({"HTTP_X_REQUEST_ID": given}) == Ids(given)


@pytest.mark.parametrize(
    "given", ["", "x" * 129, "a b", "a,b", "a, b", "a/b", "\xe4", "a\n", 'a"', "a=b", "a;b", "a:b"]
)
def test_no_other_id_is_taken(given):
    """An id with other characters, or one of two ids, is ignored."""
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
    """W3C Trace Context: small hex digits, no ids of zeros, no version ff; later versions by their common part."""
    assert read_ids({"HTTP_TRACEPARENT": given}) == Ids("", taken)


@pytest.mark.parametrize(
    ("trusted", "taken"),
    [(["127.0.0.1"], True), (["localhost"], True), (["*"], True), (["192.0.2.1"], False), ([], False)],
)
def test_only_a_trusted_proxy_names_requests(serve, connect, answers, telling, trusted, taken):
    """Ids from an untrusted peer are not logged, and none is made in their place."""
    server = serve(behind(telling, *trusted))
    connect(server).ask(get("/", "X-Request-ID: abc", f"traceparent: {TRACEPARENT}"))
    line = answers.get(timeout=PATIENCE)
    shown = {key: line[key] for key in ("request_id", "traceparent") if key in line}
    assert shown == ({"request_id": "abc", "traceparent": TRACEPARENT} if taken else {})


# --- what is made -----------------------------------------------------------------------------------------------------


def test_nothing_is_made_unless_it_is_asked_for(serve, connect, answers, telling, told):
    """Without `log.request_id` app and client get no id, not even a trusted proxy's, and the log has no field."""
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
    """App, client and log get the trusted proxy's id, or a new one if that is missing or malformed."""
    server = serve(behind(telling, trusted), ids=True)
    answer = connect(server).ask(get("/", *headers))
    [name] = told
    assert name == "abc" if taken else MADE.fullmatch(name)
    assert answer.headers.get_all("X-Request-ID") == [name]
    assert answers.get(timeout=PATIENCE)["request_id"] == name


def test_ids_are_made_without_proxies_too(serve, connect, telling, told):
    """Each request has an id of its own, also several on one connection."""
    server = serve(telling, ids=True)
    client = connect(server)
    names = [client.ask("/").headers["X-Request-ID"] for _ in range(3)]
    assert names == told
    assert len(set(names)) == 3


def test_a_probe_has_an_id(serve, telling, told):
    """The probe of `health.probe` has an id, too, for apps that rely on it."""
    assert serve(telling, ids=True).probe("/", PATIENCE) == 200
    assert MADE.fullmatch(told[0])


def test_an_id_of_the_apps_own_stays(serve, connect):
    """An id that the app sets in its answer is kept, and not sent twice."""

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
    """Every answer has the id that is in the log, also refusals and answers without the app."""
    server = serve(behind(app, "192.0.2.1"), ids=True)
    server.answer_health("/healthz", lambda: ("200 OK", "ready"))
    found, headers = connect(server).send(request_).head()
    assert found == status
    line = answers.get(timeout=PATIENCE)
    assert MADE.fullmatch(line["request_id"])
    assert headers.get_all("X-Request-ID") == [line["request_id"]]


def test_a_refusal_has_the_proxys_id(serve, app, connect):
    """A refused request whose head could be read has its proxy's id."""
    server = serve(behind(app, "*"), ids=True)
    _, headers = connect(server).send(get("/", "X-Request-ID: abc", "Content-Length: 99999999999")).head()
    assert headers["X-Request-ID"] == "abc"


def test_a_503_has_it(serve, app, connect):
    """A 503 for a request that never began has its id."""
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
    """An answer that a limit causes in the place of the app has the request's id."""
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
    """A stream that a drain ends before its first part has the id in its header."""
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
    """`requests`, a drain's account, its log line and the line's fields have the id."""
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
    """An incomplete request has its proxy's id; none is made for it."""
    server = serve(behind(app, "*"), ids=True)
    connect(server).ask("/hello")
    connect(server).send(get("/", "X-Request-ID: abc", "Content-Length: 5", method="POST"))
    connect(server).send(get("/", "Content-Length: 5", method="POST"))
    until(server, lambda: sum(each.arriving is not None for each in server.loop.connections.channels()) == 2)
    assert [each.request_id for each in server.drain(0).cut] == ["abc", ""]


def test_what_is_said_of_a_request_names_it(serve, app, connect, caplog):
    """The traceback of a failed app is logged with the id that the client got."""
    server = serve(app, ids=True)
    with caplog.at_level("ERROR", logger="waitress"):
        name = connect(server).ask("/boom").headers["X-Request-ID"]
    [line] = [each for each in caplog.records if each.levelno == logging.ERROR]
    assert line.getMessage() == f"Exception while serving /boom request_id={name}"
    assert line.fields == {"id": 1, "request_id": name}


def test_a_change_holds_for_requests_that_come_behind_it(serve, app, connect, answers):
    """A change of the setting does not affect a request in flight."""
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
    """A ServerThread gives ids if it is configured; with Werkzeug's server it does not."""
    for kind in ("waitress", "werkzeug"):
        with ServerThread(telling, server=kind, config={"log": {"request_id": True}}) as server:
            assert http_client.get(server.url)[0] == 200
    assert MADE.fullmatch(told[0])
    assert told[1] is None


def test_the_apps_log_can_have_it(serve, connect, caplog):
    """The filter in docs/proxy.md adds the id to the app's log lines; lines outside of requests have none."""
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
    """Workers of one template make different ids, because each makes its source after the fork."""
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
    """Two workers whose apps call random.seed(1) in each request still make different ids."""
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
