"""The page for people on the admin listener: which clients get it, its security headers, and its data."""

import base64
import contextlib
import hashlib
import html.parser
import http.client
import json
import re
import socket

import pytest
from patience import until

from flaskd.admin import AdminServer, health
from flaskd.admin.health import AdminApp
from flaskd.admin.status_page import own_ports, page_data
from flaskd.ledger import DrainReport, InFlight
from flaskd.lifecycle import State, StopReason
from flaskd.notices import DrainBegan, DrainEnded, ReloadEnded, Resumed, StopBegan
from flaskd.serving.api import ServingSnapshot
from flaskd.snapshot import Counts, Held, Snapshot
from flaskd.sockets import Address, Listener
from flaskd.version import __version__

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
HOSTILE = "</script><script>alert(1)</script>"


def snapshot(**given):
    """A snapshot of a daemon with two requests in flight and the given values."""
    requests = tuple(
        InFlight(number, "192.0.2.7", "GET", HOSTILE, age, "running", stack="File app.py")
        for number, age in enumerate((0.5, 9.5))
    )
    plain = {
        "name": "flaskd", "state": State.READY, "since": 5.0, "age": 1.0, "started": 1.0, "uptime": 5.0, "reason": None,
        "app": None, "threads": 4, "serving": ServingSnapshot(in_flight=requests), "held": Held(), "log_level": "info",
        "config": None, "counts": Counts(),
    }  # fmt: skip
    return Snapshot(**{**plain, **given})


class Source:
    wedged = ""
    asked = 0

    def readiness(self):
        return "200 OK", "ready"

    def snapshot(self):
        self.asked += 1
        return snapshot()


@pytest.fixture(scope="module")
def ask():
    """Request a path of the admin listener; returns status, headers and body."""
    server = AdminServer(Source())
    server.open([Listener.bind(Address("127.0.0.1", 0))], [])

    def ask(path="/", method="GET", **headers):
        host = server.addresses[0].url.removeprefix("http://").rstrip("/")
        with contextlib.closing(http.client.HTTPConnection(host, timeout=10)) as connection:
            connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            body = b"" if answer.getheader("Content-Type") == "text/event-stream" else answer.read()
            return answer.status, dict(answer.getheaders()), body.decode()

    yield ask
    server.close()


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        (BROWSER, "text/html"), ("TEXT/HTML", "text/html"), ("text/html;q=0.1", "text/html"),
        ("application/json, text/html ; q=1.0", "text/html"), ("*/*", "text/plain"), ("text/*", "text/plain"),
        ("text/html;q=0", "text/plain"), ("text/html;q=0.000, */*", "text/plain"), ("text/htmlx", "text/plain"),
        ("", "text/plain"),
    ],
)  # fmt: skip
def test_who_gets_the_page(ask, accept, kind):
    """A client whose Accept header names HTML gets the page; curl gets the list of paths; caches learn of Vary."""
    status, headers, body = ask(Accept=accept)
    assert (status, headers["Content-Type"], headers["Vary"]) == (200, f"{kind}; charset=utf-8", "Accept")
    assert body.startswith("<!doctype html>" if kind == "text/html" else "/livez\n")


def test_the_page_runs_nothing_but_what_is_in_it(ask):
    """The policy has the hashes of the one style and the one script, and forbids all other code and connections."""
    _, headers, body = ask(Accept=BROWSER)
    policy = dict(each.strip().split(" ", 1) for each in headers["Content-Security-Policy"].split(";"))
    for tag in ("script", "style"):
        [content] = re.findall(f"<{tag}>(.*?)</{tag}>", body, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert policy.pop(f"{tag}-src") == f"'sha256-{digest}'"
    assert policy == {
        "default-src": "'none'", "connect-src": "'self'", "img-src": "data:", "base-uri": "'none'",
        "form-action": "'none'", "frame-ancestors": "'none'", "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }  # fmt: skip


@pytest.mark.parametrize("path", ["/", "/page.json", "/events", "/status.json", "/metrics"])
def test_what_is_told_is_for_this_site_alone(ask, path):
    """No other site may read or frame the page, its links send no Referer, and it is never cached."""
    headers = ask(path, Accept=BROWSER)[1]
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["X-Frame-Options"] == "DENY"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("path", ["/", "/page.json", "/events", "/status.json", "/metrics"])
@pytest.mark.parametrize(
    ("site", "mode", "destination", "answered"),
    [
        ("none", "navigate", "document", "all"), ("same-origin", "cors", "empty", "all"),
        ("cross-site", "no-cors", "script", "none"), ("same-site", "cors", "empty", "none"),
        ("cross-site", "navigate", "iframe", "none"), ("cross-site", "navigate", "document", "page"),
    ],
)  # fmt: skip
def test_another_site_that_asks_is_refused(ask, path, site, mode, destination, answered):
    """A request that a browser sends for another site is refused; a link to the page may be followed."""
    sent = {"Sec_Fetch_Site": site, "Sec_Fetch_Mode": mode, "Sec_Fetch_Dest": destination}
    expected = 200 if answered == "all" or (answered == "page" and path == "/") else 403
    assert ask(path, Accept=BROWSER, **sent)[0] == expected
    assert ask("/readyz", **sent)[0] == 200


def test_the_page_changes_nothing(ask):
    """The page answers only GET and HEAD, and has no form."""
    assert ask(method="POST", Accept=BROWSER)[0] == 405
    status, headers, body = ask(method="HEAD", Accept=BROWSER)
    assert (status, body) == (200, "")
    page = ask(Accept=BROWSER)[2]
    assert int(headers["Content-Length"]) == len(page.encode())
    assert "<form" not in page
    assert re.findall(r"(?:fetch|EventSource)\((.*?)[,)]", page) == ['"events"', '"page.json"']
    assert "XMLHttpRequest" not in page


class Loads(html.parser.HTMLParser):
    """Collects what a page loads or links to."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        self.found += [
            (tag, value) for name, value in attributes
            if name in {"src", "href", "action"} and not value.startswith("data:")
        ]  # fmt: skip


def test_nothing_is_loaded_from_elsewhere(ask):
    """The page loads nothing: it is one file."""
    loads = Loads()
    loads.feed(ask(Accept=BROWSER)[2])
    assert loads.found == []


def test_nothing_from_outside_becomes_html(ask):
    """The script uses no function that turns text into HTML or code, and the server puts nothing into the page."""
    page = ask(Accept=BROWSER)[2]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(|DOMParser", page)
    assert HOSTILE not in page
    told = json.loads(ask("/page.json")[2])
    assert [each["path"] for each in told["requests"]] == [HOSTILE, HOSTILE]


def test_what_the_page_is_told_of_requests(ask):
    """The page's data has the requests, the oldest first, without their stacks."""
    told = json.loads(ask("/page.json")[2])
    assert [each["age"] for each in told["requests"]] == [9.5, 0.5]
    assert "stack" not in told["requests"][0]
    assert (told["status"]["in_flight"], told["status"]["version"]) == (2, __version__)


def test_of_many_requests_the_oldest_are_told():
    """With ten thousand requests in flight the data has only the oldest."""
    many = tuple(InFlight(number, "", "GET", "/", float(number), "running") for number in range(10_000))
    told = page_data(snapshot(serving=ServingSnapshot(in_flight=many)), details=True)
    assert [each["id"] for each in told["requests"]] == list(range(9_999, 9_949, -1))
    assert told["status"]["in_flight"] == 10_000


@pytest.mark.parametrize(
    ("hosts", "own"), [(["127.0.0.1"], True), (["127.0.0.2", "127.0.0.1"], True), (["0.0.0.0"], False)]
)
def test_clients_are_shown_to_this_machine_alone(hosts, own):
    """Clients' addresses are shown on ports that only this machine reaches, or if the configuration allows it."""
    listeners = [Listener.bind(Address(host, 0)) for host in hosts]
    ports = own_ports(listeners)
    for allowed, expected in ((ports, own), (None, True)):
        for listener in listeners:
            environ = {
                "REQUEST_METHOD": "GET", "PATH_INFO": "/page.json", "SERVER_PORT": str(listener.socket.getsockname()[1])
            }  # fmt: skip
            [body] = AdminApp(Source(), None, [], allowed)(environ, lambda *_: None)
            told = json.loads(body)
            assert told["details"] is expected
            assert ("client" in told["requests"][0]) is expected
            assert (b"192.0.2.7" in body) is expected
    for listener in listeners:
        listener.close()


def test_a_port_that_others_reach_too_is_not_this_machines_own():
    """A port on loopback and on another address counts as public, because a request does not tell which it used."""
    first = Listener.bind(Address("127.0.0.1", 0))
    port = first.socket.getsockname()[1]

    class Everywhere:
        address = Address("0.0.0.0", port)

        class socket:  # noqa: N801
            family = socket.AF_INET

            @staticmethod
            def getsockname():
                return "0.0.0.0", port

    assert own_ports([first]) == {str(port)}
    assert own_ports([first, Everywhere]) == own_ports([Everywhere, first]) == set()
    first.close()


def test_a_unix_socket_is_this_machines_own(tmp_path):
    """Over a Unix socket clients' addresses are shown."""
    server = AdminServer(Source())
    server.open([Listener.bind(Address(path=str(tmp_path / "a.sock")))], [])
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(10)
        client.connect(str(tmp_path / "a.sock"))
        client.sendall(b"GET /page.json HTTP/1.0\r\n\r\n")
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    server.close()
    assert b'"details": true' in answer
    assert b"192.0.2.7" in answer


def test_who_drained_is_told_until_it_is_undone():
    """The data names who asked for a drain, and when, from its begin to the resume."""
    counts = Counts()
    assert snapshot(counts=counts).as_json()["drain"] is None
    counts.heard(DrainBegan(1, 15.0, "uid=7 pid=8 command=flaskd"))
    counts.heard(DrainEnded(DrainReport(), State.DRAINED))
    told = snapshot(counts=counts).as_json()["drain"]
    assert told["by"] == "uid=7 pid=8 command=flaskd"
    assert told["time"].endswith("Z")
    counts.heard(Resumed("ready", State.DRAINED))
    assert snapshot(counts=counts).as_json()["drain"] is None
    counts.heard(StopBegan(StopReason("signal", "SIGTERM"), 0, 25.0, 25.0, "x", drains=True))
    assert (counts.drains, counts.drain) == (2, None)


def test_the_place_of_a_fault_in_code_is_told_to_this_machine_alone():
    """After a reload that the app's code made fail, `details` adds its traceback; a later reload removes it."""
    counts = Counts()
    trace = f'Traceback (most recent call last):\n  File "shop.py", line 1, in <module>\n{"x" * 9000}NameError'
    counts.heard(ReloadEnded("flaskd.yaml", "ready", "cannot load shop", trace=f"\n{trace}"))
    told = page_data(snapshot(counts=counts), details=True)
    assert (told["trace"], told["status"]["last_reload"]["fault"]) == (trace[-8000:], "cannot load shop")
    assert page_data(snapshot(counts=counts), details=False)["trace"] == ""
    assert "shop.py" not in json.dumps(snapshot(counts=counts).as_json())
    counts.heard(ReloadEnded("flaskd.yaml", "ready"))
    assert page_data(snapshot(counts=counts), details=True)["trace"] == ""


def test_what_a_status_says_of_process_and_stop():
    """The data has the version, the memory of this process in bytes, and how long a stop may still take."""
    told = snapshot().as_json()
    assert (told["version"], told["left"]) == (__version__, None)
    assert told["memory"] > 1_000_000
    assert snapshot(left=4.25).as_json()["left"] == 4.25


# --- what the page hears --------------------------------------------------------------------------------------------


@pytest.fixture
def hear(monkeypatch):
    """Open streams of events with one event every 20 ms; returns the connection and the answer."""
    monkeypatch.setattr(health, "_EVERY", 0.02)
    server = AdminServer(Source())
    server.open([Listener.bind(Address("127.0.0.1", 0))], [])

    def hear(path="/events", method="GET"):
        connection = http.client.HTTPConnection(server.url, timeout=10)
        connection.request(method, path)
        return connection, connection.getresponse()

    server.url = server.addresses[0].url.removeprefix("http://").rstrip("/")
    yield hear
    server.close()


def test_a_stream_tells_what_the_page_would_ask_for(hear):
    """Each event has the content of /page.json at that moment."""
    connection, answer = hear()
    assert (answer.status, answer.getheader("Content-Type")) == (200, "text/event-stream")
    assert answer.getheader("Cross-Origin-Resource-Policy") == "same-origin"
    for _ in range(3):
        event = answer.readline()
        assert event.startswith(b"data: ")
        assert json.loads(event[6:]) == page_data(snapshot(), details=True) | {
            "status": json.loads(event[6:])["status"]
        }
        assert answer.readline() == b"\n"
    connection.close()


def test_streams_are_bounded_and_in_no_way_of_others(hear):
    """A ninth stream is refused with advice, probes are still answered, and a place is free when a stream ends."""
    streams = [hear() for _ in range(8)]
    assert [answer.status for _, answer in streams] == [200] * 8
    connection, answer = hear()
    assert (answer.status, answer.getheader("Retry-After")) == (503, "2")
    assert b"ask for /page.json" in answer.read()
    connection.close()
    for path in ("/readyz", "/page.json"):
        connection, answer = hear(path)
        assert answer.status == 200
        connection.close()
    closed, answer = streams.pop()
    answer.close()
    closed.close()

    def takes_one_more():
        connection, answer = hear()
        streams.append((connection, answer))
        return answer.status == 200

    until(takes_one_more)
    for connection, answer in streams:
        answer.close()
        connection.close()


def test_a_head_of_the_stream_takes_no_place(hear):
    """HEAD on the stream is answered with the header alone, and uses no place."""
    for _ in range(10):
        connection, answer = hear(method="HEAD")
        assert (answer.status, answer.read()) == (200, b"")
        connection.close()
    connection, answer = hear()
    assert answer.status == 200
    connection.close()


def test_many_streams_cost_what_one_costs():
    """Streams that ask at about the same time share one snapshot of the daemon."""
    source = Source()
    app = AdminApp(source, None, [])
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/events", "SERVER_PORT": "80"}
    streams = [app(environ, lambda *_: None) for _ in range(8)]
    first = {each.news() for each in streams}
    assert (len(first), source.asked) == (1, 1)
