"""The admin listener's pages, without a daemon."""

import contextlib
import http.client
import json
import socket
import threading

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from flaskd.admin import AdminServer
from flaskd.admin import health as health_module
from flaskd.admin.metrics import families
from flaskd.ledger import InFlight
from flaskd.lifecycle import State
from flaskd.server import Histogram, Tally, WaitressThread
from flaskd.serving.api import ServingSnapshot
from flaskd.snapshot import Counts, Held, Snapshot
from flaskd.sockets import Address, Listener

RECORD = {
    "completed": 3, "rejected": 1, "cut": [{}], "took": 2.5,
    "policies": {"close-db": {"fate": "ok", "took": 0.25}, 'odd"\\\n': {"fate": "timed_out", "took": 5.0}},
}  # fmt: skip


class Source:
    def __init__(self):
        self.wedged = ""
        self.state = "ready"

    def readiness(self):
        return ("200 OK", "ready") if self.state == "ready" else ("429 Too Many Requests", self.state)

    def snapshot(self):
        tally = Tally(outcomes={"completed": 7, "rejected": 1, "cut": 2, "gone": 3}, statuses=[0, 0, 5, 1, 1, 1])
        for seconds in (0.001, 0.005, 0.3, 100.0):
            tally.took.add(seconds)
        requests = tuple(InFlight(number, "unix", "GET", "/", age, "running") for number, age in enumerate((1.5, 0.5)))
        steps = {"warm": {"fate": "ok", "took": 1.0}}
        serving = ServingSnapshot(in_flight=requests, queued=1, connections=4, tally=tally, steps=steps)
        counts = Counts()
        counts.drains, counts.reloads, counts.failed_reloads = 2, 1, 3
        return snapshot(state=State(self.state), threads=8, serving=serving, held=Held(last_stop=RECORD), counts=counts)


def snapshot(**given):
    """A snapshot of a daemon with the given values."""
    plain = {
        "name": "flaskd", "state": State.READY, "since": 5.0, "age": 1.0, "started": 1.0, "uptime": 5.0, "reason": None,
        "app": None, "threads": 4, "serving": ServingSnapshot(), "held": Held(), "log_level": "info", "config": None,
        "counts": Counts(),
    }  # fmt: skip
    return Snapshot(**{**plain, **given})


@pytest.fixture
def source():
    return Source()


@pytest.fixture
def ask(source):
    """Send a request to the admin listener; returns status, headers and body."""
    before = threading.active_count()
    server = AdminServer(source)
    server.open([Listener.bind(Address("127.0.0.1", 0))], ["shop.internal"])

    def ask(path, method="GET", body=None, **headers):
        host = server.addresses[0].url.removeprefix("http://").rstrip("/")
        connection = http.client.HTTPConnection(host, timeout=10)
        with contextlib.closing(connection):
            connection.request(method, path, body=body, headers=headers)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read().decode()

    ask.url = server.addresses[0].url
    yield ask
    server.close()
    server.close()
    assert threading.active_count() == before


def test_alive_while_the_serving_thread_turns(ask, source):
    """/livez is 200, in any state, unless the daemon says why it is not alive."""
    source.state = "draining"
    assert ask("/livez")[::2] == (200, "alive\n")
    source.wedged = "the serving thread has not turned for 6.2s"
    assert ask("/livez")[::2] == (503, "the serving thread has not turned for 6.2s\n")


def test_ready_or_the_status_that_was_chosen(ask, source):
    """/readyz answers with the status and the word of the source; HEAD is the same without the word."""
    assert ask("/readyz")[::2] == (200, "ready\n")
    source.state = "draining"
    assert ask("/readyz")[::2] == (429, "draining\n")
    status, headers, body = ask("/readyz", "HEAD")
    assert (status, headers["Content-Length"], body) == (429, "9", "")


def test_status_is_json_and_never_stored(ask):
    """/status.json has what the verb `status` has, and is never cached."""
    status, headers, body = ask("/status.json")
    told = json.loads(body)
    assert (status, told["state"], told["in_flight"]) == (200, "ready", 2)
    assert (headers["Content-Type"], headers["Cache-Control"]) == ("application/json", "no-store")


@pytest.mark.parametrize(
    ("path", "method", "body", "status"),
    [
        ("/nothing", "GET", None, 404),
        ("/readyz/", "GET", None, 404),
        ("/readyz", "POST", "{}", 405),
        ("/metrics", "DELETE", None, 405),
        ("/readyz", "POST", "x" * 5000, 413),
        ("/readyz", "GET", "{}", 200),
        ("/", "GET", None, 200),
    ],
)
def test_what_is_refused(ask, path, method, body, status):
    """Other paths, methods other than GET and HEAD, and large bodies are refused."""
    assert ask(path, method, body)[0] == status


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200), ("127.0.0.1:9090", 200), ("10.1.2.3:80", 200), ("[::1]", 200), ("[::1]:9090", 200),
        ("localhost", 200), ("LOCALHOST:1", 200), ("shop.internal", 200), ("Shop.Internal:9090", 200),
        ("evil.example", 421), ("127.0.0.1.evil.example", 421), ("localhost.evil.example:9090", 421),
    ],
)  # fmt: skip
def test_names_that_were_not_allowed_learn_nothing(ask, host, status):
    """Under a host name that is not allowed, page, metrics and status are refused, and probes are answered."""
    for path in ("/metrics", "/status.json", "/page.json", "/"):
        assert ask(path, Host=host, Accept="text/html")[0] == status
    assert ask("/readyz", Host=host)[0] == 200


def test_a_unix_socket_asks_for_no_host(source, tmp_path):
    """Over a Unix socket any Host is accepted, because browsers cannot connect to one."""
    server = AdminServer(source)
    server.open([Listener.bind(Address(path=str(tmp_path / "a.sock")))], [])
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(10)
        client.connect(str(tmp_path / "a.sock"))
        client.sendall(b"GET /status.json HTTP/1.1\r\nHost: evil.example\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 200 OK")
    server.close()
    assert not (tmp_path / "a.sock").exists()


def value_of(families, name, **labels):
    [value] = [
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    return value


@pytest.mark.parametrize(
    ("accept", "parser"), [("text/plain", parse), ("application/openmetrics-text; version=1.0.0", parse_openmetrics)]
)
def test_metrics_are_read_by_prometheus_own_parser(ask, accept, parser):
    """Prometheus' own parser reads both formats, with the source's counts; odd names of policies are escaped."""
    status, headers, body = ask("/metrics", Accept=accept)
    assert status == 200
    assert headers["Content-Type"].startswith(accept.partition(";")[0])
    families = list(parser(body))
    for name, labels, value in [
        ("flaskd_state", {"state": "ready"}, 1),
        ("flaskd_state", {"state": "drained"}, 0),
        ("flaskd_requests_total", {"outcome": "completed"}, 7),
        ("flaskd_requests_total", {"outcome": "cut"}, 2),
        ("flaskd_responses_total", {"status": "2xx"}, 5),
        ("flaskd_responses_total", {"status": "5xx"}, 1),
        ("flaskd_request_seconds_bucket", {"le": "0.005"}, 2),
        ("flaskd_request_seconds_bucket", {"le": "0.5"}, 3),
        ("flaskd_request_seconds_bucket", {"le": "60.0"}, 3),
        ("flaskd_request_seconds_bucket", {"le": "+Inf"}, 4),
        ("flaskd_request_seconds_count", {}, 4),
        ("flaskd_request_seconds_sum", {}, 100.306),
        ("flaskd_queue_wait_seconds_count", {}, 0),
        ("flaskd_requests_in_flight", {}, 2),
        ("flaskd_requests_queued", {}, 1),
        ("flaskd_connections", {}, 4),
        ("flaskd_drains_total", {}, 2),
        ("flaskd_reloads_total", {"result": "failed"}, 3),
        ("flaskd_cleanup_seconds", {"stop": "current", "policy": "warm"}, 1.0),
        ("flaskd_cleanup_seconds", {"stop": "last", "policy": "close-db", "fate": "ok"}, 0.25),
        ("flaskd_cleanup_seconds", {"stop": "last", "policy": 'odd"\\\n'}, 5.0),
        ("flaskd_last_stop_requests", {"outcome": "cut"}, 1),
        ("flaskd_last_stop_duration_seconds", {}, 2.5),
    ]:
        assert value_of(families, name, **labels) == pytest.approx(value), (name, labels)


def test_workers_that_reached_a_limit_are_counted():
    """The metrics count recycled workers by the key of their limit, from the start on."""
    serving = ServingSnapshot(wanted=2, recycled={"max_requests": 0, "max_memory": 4})
    [family] = [each for each in families(snapshot(serving=serving)) if each.name == "flaskd_workers_recycled"]
    found = {sample.labels["limit"]: sample.value for sample in family.samples if sample.name.endswith("_total")}
    assert found == {"max_requests": 0, "max_memory": 4}


def test_a_damaged_record_leaves_the_metrics_as_they_are():
    """If the record of the last stop is damaged, only its metrics are missing."""
    names = {family.name for family in families(snapshot(held=Held(last_stop={"damaged": "no JSON"})))}
    assert "flaskd_requests" in names
    assert not {name for name in names if "last_stop" in name}


def test_without_prometheus_client_the_next_step_is_said(source, monkeypatch):
    """Without prometheus_client /metrics is 501 and says what to install; the other pages work."""

    def missing(_snapshot):
        raise ImportError

    monkeypatch.setattr(health_module, "exporter", missing)
    server = AdminServer(source)
    server.open([Listener.bind(Address("127.0.0.1", 0))], [])
    host = server.addresses[0].url.removeprefix("http://").rstrip("/")
    for path, status in (("/metrics", 501), ("/readyz", 200)):
        connection = http.client.HTTPConnection(host, timeout=10)
        with contextlib.closing(connection):
            connection.request("GET", path)
            answer = connection.getresponse()
            assert answer.status == status
            assert path != "/metrics" or b"pip install 'flaskd[metrics]'" in answer.read()
    server.close()


def test_many_requests_at_once_on_one_connection_do_not_wedge_it(ask):
    """A client that asks for the metrics repeatedly and reads nothing does not delay other clients."""
    host, port = ask.url.removeprefix("http://").rstrip("/").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as greedy:
        greedy.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                greedy.send(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 200)
        assert ask("/readyz")[0] == 200


def test_without_listeners_there_is_nothing(source):
    """Without listeners there is no thread."""
    before = threading.active_count()
    server = AdminServer(source)
    server.open([], [])
    assert (server.addresses, threading.active_count()) == ([], before)
    server.close()


# --- what it counts -------------------------------------------------------------------------------------------------


def test_a_histogram_counts_what_is_on_a_bound_below_it():
    """A value that equals a bound is counted below it, as Prometheus' "le" requires."""
    histogram = Histogram()
    for seconds in (0.0, 0.005, 0.0051, 60.0, 61.0):
        histogram.add(seconds)
    assert (histogram.counts[0], histogram.counts[1], histogram.counts[-2], histogram.counts[-1]) == (2, 1, 1, 1)
    assert histogram.total == pytest.approx(121.0101)


def test_the_tally_of_a_server():
    """Each request is counted once: by outcome and status, with its time and its wait."""

    def app(environ, start_response):
        start_response(environ["PATH_INFO"][1:] + " X", [("Content-Length", "2")])
        return [b"ok"]

    with WaitressThread(app) as server:
        for status in ("200", "201", "404", "500"):
            connection = http.client.HTTPConnection(server.url.removeprefix("http://").rstrip("/"), timeout=10)
            with contextlib.closing(connection):
                connection.request("GET", f"/{status}")
                assert connection.getresponse().status == int(status)
        report = server.drain(10)
        tally = server.tally()
    assert report.clean
    assert tally.outcomes == {"completed": 4, "rejected": 0, "cut": 0, "gone": 0}
    assert tally.statuses == [0, 0, 2, 0, 1, 1]
    assert sum(tally.took.counts) == sum(tally.waited.counts) == 4
    assert tally.took.total >= tally.waited.total > 0


def test_without_threads_the_serving_thread_runs_the_app():
    """A server with 0 threads runs the app in its serving thread."""

    def app(environ, start_response):
        name = threading.current_thread().name.encode()
        start_response("200 OK", [("Content-Length", str(len(name)))])
        return [name]

    with WaitressThread(app, threads=0, name="alone") as server:
        connection = http.client.HTTPConnection(server.url.removeprefix("http://").rstrip("/"), timeout=10)
        with contextlib.closing(connection):
            for _ in range(3):  # on one connection
                connection.request("GET", "/")
                assert connection.getresponse().read() == b"alone"
        assert server.silent_for < 5
        assert server.drain(10).clean
        assert server.tally().outcomes["completed"] == 3
