"""Werkzeug's development server in a thread: whatever the app or the client does, a stop is quick, and reports."""

import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from server_kit import PATIENCE, Client, get, looks_at_the_gate, needs_handshakes, no_thread_left

import flaskd
from flaskd.sockets import Address

pytestmark = pytest.mark.usefixtures("no_thread_left")


class Broken:
    """An iterable that raises after `parts`, or when it is closed."""

    def __init__(self, *parts, error=None, closing=None):
        self._parts, self._error, self._closing = parts, error, closing

    def __iter__(self):
        yield from self._parts
        if self._error is not None:
            raise self._error

    def close(self):
        if self._closing is not None:
            raise self._closing


def app_of(status, headers, parts):
    def app(environ, start_response):
        start_response(status, headers)
        return parts()

    return app


def raising(error):
    def app(environ, start_response):
        raise error()

    return app


@contextmanager
def serving(app):
    """A server, and a client of it that has sent one request."""
    server = flaskd.ServerThread(app, server="werkzeug").start()
    try:
        with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as client:
            yield server, client
    finally:
        server.stop(timeout=PATIENCE)


def answer(client):
    """Everything that the server sends until it ends the connection."""
    return b"".join(iter(lambda: client.recv(65536), b""))


FAILING = {
    "TimeoutError": raising(TimeoutError),
    "ConnectionResetError": raising(ConnectionResetError),
    "BrokenPipeError": raising(BrokenPipeError),
    "SystemExit": raising(SystemExit),
    "TimeoutError later": app_of("200 OK", [], lambda: Broken(error=TimeoutError())),
    "a header that is not latin-1": app_of("200 OK", [("X", "\u20ac")], lambda: [b"hello"]),
    "a header that is not latin-1, and a length": app_of(
        "200 OK", [("Content-Length", "5"), ("X", "\u20ac")], lambda: [b"hello"]
    ),
    "a status that is no number": app_of("odd", [], lambda: [b"hello"]),
    "no answer": lambda environ, start_response: [b"hello"],
    "nothing": lambda environ, start_response: None,
}


@pytest.mark.parametrize("app", FAILING.values(), ids=FAILING)
def test_an_app_that_fails_is_answered(app):
    """The client gets 500, even for errors that Werkzeug takes for a client that left; and the stop is quick."""
    with serving(app) as (server, client):
        client.sendall(get("/"))
        assert answer(client).split(b" ", 2)[1] == b"500"
        report = server.stop(timeout=PATIENCE)
        assert report.took < PATIENCE / 2
        assert report.clean


SHORT = {
    "of its length": app_of("200 OK", [("Content-Length", "10")], lambda: [b"short"]),
    "of its last chunk": app_of("200 OK", [], lambda: Broken(b"short", error=LookupError())),
    "of its last chunk, with a header": app_of("200 OK", [("X", "y")], lambda: Broken(b"short", error=LookupError())),
    "of its last chunk by a timeout": app_of("200 OK", [], lambda: Broken(b"short", error=TimeoutError())),
    "of its last chunk by text": app_of("200 OK", [], lambda: [b"short", "text"]),
}


@pytest.mark.parametrize("app", SHORT.values(), ids=SHORT)
def test_an_answer_that_ends_short_is_cut(app, caplog):
    """The log names the request, and it does not count as completed."""
    with serving(app) as (server, client):
        client.sendall(get("/part"))
        told = answer(client)
        assert b"short" in told
        assert not told.endswith(b"\r\n0\r\n\r\n")
        assert b"Internal Server Error" not in told
        assert server.stop(timeout=PATIENCE).completed == 0
    assert "cut GET /part" in caplog.text


@pytest.mark.parametrize("more", [b"x", get("/again"), b"x" * 100_000], ids=["a byte", "a request", "many"])
def test_more_bytes_while_a_request_runs(more):
    """The server does not wait for bytes that a client sends after its request."""
    entered, released = threading.Event(), threading.Event()

    def app(environ, start_response):
        entered.set()
        released.wait(PATIENCE)
        start_response("200 OK", [("Content-Length", "5")])
        return [b"hello"]

    with serving(app) as (server, client):
        client.sendall(get("/") + more[:1])
        assert entered.wait(PATIENCE)
        client.sendall(more[1:])
        released.set()
        assert answer(client).endswith(b"hello")
        report = server.stop(timeout=PATIENCE)
        assert report.took < PATIENCE / 2
        assert report.clean


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of handshakes under way")
@needs_handshakes
def test_a_client_that_is_still_connecting_is_served():
    """A stop waits for handshakes under way, and answers clients that come through the gate."""
    app = app_of("200 OK", [], lambda: [b"hello"])
    with serving(app) as (server, _), looks_at_the_gate() as looked_twice, ThreadPoolExecutor(1) as pool:
        far = Client(Address("127.0.0.1", server.port), slow=True)
        report = pool.submit(server.stop, timeout=PATIENCE)
        looked_twice()
        assert far.send("/").response().status == 200
        far.close()
        assert report.result(PATIENCE).completed == 1


def test_a_request_that_never_comes_whole_is_in_the_account():
    """An incomplete request is closed at the deadline, and the report lists it as cut."""
    with serving(app_of("200 OK", [], lambda: [b"hello"])) as (server, client):
        client.sendall(b"GET /slow HTTP/1.1\r\nHost:")
        with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as other:
            other.sendall(get("/"))
            answer(other)  # it connected later, so the first line of the other one was read
        report = server.stop(timeout=0.5)
        assert [(each.method, each.path, each.phase) for each in report.cut] == [("GET", "/slow", "receiving")]
        assert not report.clean


@pytest.mark.parametrize("status", ["200 OK", "204 No Content", "304 Not Modified"])
def test_an_answer_that_may_have_no_body_has_none(status):
    """An answer that may have no body has none, whatever the app gives (RFC 9112 §6.3)."""
    with serving(app_of(status, [("X", "y")], lambda: [b"hello"])) as (server, client):
        client.sendall(get("/", method="HEAD" if status == "200 OK" else "GET"))
        told = answer(client)
        assert told.startswith(f"HTTP/1.1 {status}".encode())
        assert told.endswith(b"\r\n\r\n")
        assert server.stop(timeout=PATIENCE).clean
