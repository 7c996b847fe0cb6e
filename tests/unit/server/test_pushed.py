"""Answers that the loop continues by itself, while it answers other requests."""

import contextlib
import http.client
import socket
import threading
import time

import pytest
from patience import until

from flaskd.server import Pushed, WaitressThread


class App:
    """Answers /pushed with what `news` gives, every 10 ms, and all other paths with ok."""

    def __init__(self, news):
        self.news, self.given = news, []

    def __call__(self, environ, start_response):
        if environ["PATH_INFO"] != "/pushed":
            start_response("200 OK", [("Content-Length", "2")])
            return [b"ok"]
        start_response("200 OK", [("Content-Type", "text/event-stream")])
        self.given.append(Pushed(self.news, 0.01))
        return self.given[-1]


def ask(server, path="/"):
    connection = http.client.HTTPConnection(server.url.removeprefix("http://").rstrip("/"), timeout=10)
    connection.request("GET", path)
    return connection, connection.getresponse()


def answers(server):
    connection, answer = ask(server)
    with contextlib.closing(connection):
        return answer.read() == b"ok"


def raw(server, request):
    address = server.addresses[0]
    client = socket.create_connection((address.host, address.port), timeout=10)
    client.sendall(request)
    return client


def test_it_goes_on_until_its_client_leaves():
    """Parts follow without a thread; the request is not in flight, and the answer ends when its client leaves."""
    numbers = iter(range(10_000))
    app = App(lambda: b"%d\n" % next(numbers))
    with WaitressThread(app, threads=0) as server:
        before = threading.active_count()
        connection, answer = ask(server, "/pushed")
        assert [answer.readline() for _ in range(5)] == [b"0\n", b"1\n", b"2\n", b"3\n", b"4\n"]
        assert answers(server)
        until(lambda: server.in_flight == 0)
        assert threading.active_count() == before
        [stream] = app.given
        assert stream.open
        answer.close()
        connection.close()
        until(lambda: not stream.open)
        until(lambda: server.connections == 0)
        assert server.drain(10).clean


def test_it_is_not_idle():
    """The connection outlives the timeouts for idle connections and for requests."""
    limits = {"channel_timeout": 1, "cleanup_interval": 1}
    with WaitressThread(App(lambda: b"x"), threads=0, patience=0.5, adjustments=limits) as server:
        connection, answer = ask(server, "/pushed")
        began = time.monotonic()
        while time.monotonic() - began < 2.2:
            assert answer.read(1) == b"x"
        answer.close()
        connection.close()


def test_an_http_1_0_client_gets_no_chunks():
    """For an HTTP/1.0 client the answer ends with the connection."""
    with WaitressThread(App(lambda: b"x"), threads=0) as server, raw(server, b"GET /pushed HTTP/1.0\r\n\r\n") as client:
        got = b""
        while not got.endswith(b"\r\n\r\nxxx"):
            got += client.recv(1)
        assert b"chunked" not in got


def test_who_does_not_read_gets_no_more():
    """A part waits until its client has read the last one; other clients are answered."""
    calls = []

    def news():
        calls.append(None)
        return bytes(1 << 22)

    with WaitressThread(App(news), threads=0) as server, raw(server, b"GET /pushed HTTP/1.1\r\nHost: x\r\n\r\n"):
        until(lambda: calls)
        for _ in range(50):
            assert answers(server)
        assert len(calls) <= 3


def test_a_drain_waits_for_none():
    """A drain closes the connection as an idle one, and nothing counts as cut."""
    with WaitressThread(App(lambda: b"x"), threads=0) as server:
        connection, answer = ask(server, "/pushed")
        assert answer.read(3) == b"xxx"
        report = server.drain(10)
        assert report.clean
        assert report.took < 5
        with pytest.raises(http.client.IncompleteRead):
            answer.read()
        connection.close()


def test_news_that_fail_close_the_connection_alone(caplog):
    """An error in `news` closes this connection alone; the log has the traceback."""
    parts = iter([b"x"])
    with WaitressThread(App(lambda: next(parts)), threads=0) as server:
        connection, answer = ask(server, "/pushed")
        with pytest.raises(http.client.IncompleteRead):
            answer.read()
        connection.close()
        assert answers(server)
    assert "cannot go on with an answer: the connection is closed" in caplog.text
    assert "StopIteration" in caplog.text
