"""An app with a gate, a client that sends raw bytes, and fixtures that bring both together with a WaitressThread."""

import gc
import http.client
import io
import os
import queue
import socket
import struct
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import pytest
from patience import PATIENCE

from flaskd.server import WaitressThread
from flaskd.sockets import Listener

BIG = 8 * 1024 * 1024
"""Bytes: more than the kernel takes for a client that does not read, less than what makes a thread wait."""


def _has_ipv6():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


HAS_IPV6 = _has_ipv6()
"""Whether this machine has the loopback address ::1, which many containers lack."""


needs_handshakes = pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells of handshakes under way")


class App:
    """A WSGI app that notes when requests are entered; those for /gate stay until the test releases them."""

    def __init__(self):
        self.arrived = queue.SimpleQueue()
        self.released = threading.Event()
        self.draining = None

    def __call__(self, environ, start_response):
        self.draining = environ.get("flaskd.draining")
        self.arrived.put(environ["PATH_INFO"])
        name = environ["PATH_INFO"].split("/")[1]
        return getattr(self, name or "hello")(environ, start_response)

    def entered(self, count):
        """Wait until so many requests are inside; returns their paths."""
        return {self.arrived.get(timeout=PATIENCE) for _ in range(count)}

    def hello(self, environ, start_response, body=b"hello"):
        start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]

    def odd(self, environ, start_response):
        start_response("odd", [("Content-Length", "0")])
        return []

    def gate(self, environ, start_response):
        self.released.wait()
        return self.hello(environ, start_response, environ["PATH_INFO"].encode())

    def chunks(self, environ, start_response):
        start_response("200 OK", [("Content-Type", "text/plain")])
        yield from (b"one", b"two")

    def empty(self, environ, start_response):
        start_response("204 No Content", [])
        return []

    def late(self, environ, start_response):
        self.released.wait()
        return self.hello(environ, start_response, b"x" * 1_000_000)

    def echo(self, environ, start_response):
        return self.hello(environ, start_response, environ["wsgi.input"].read())

    def big(self, environ, start_response):
        return self.hello(environ, start_response, b"x" * BIG)

    def file(self, environ, start_response):
        start_response("200 OK", [("Content-Type", "text/plain")])
        return environ["wsgi.file_wrapper"](io.BytesIO(b"x" * BIG))

    def stream(self, environ, start_response):
        start_response("200 OK", [("Content-Type", "text/plain")])
        yield b"first"
        self.released.wait()
        yield b"last"

    def flood(self, environ, start_response):
        start_response("200 OK", [("Content-Type", "text/plain")])
        while True:
            yield b"x" * 65536

    def boom(self, environ, start_response):
        raise LookupError("on purpose")

    def exit(self, environ, start_response):
        raise SystemExit(environ["QUERY_STRING"] or None)

    def interrupt(self, environ, start_response):
        raise KeyboardInterrupt

    def half(self, environ, start_response):
        start_response("200 OK", [("Content-Type", "text/plain")])
        yield b"first"
        raise LookupError("on purpose")

    def half_exit(self, environ, start_response):
        start_response("200 OK", [("Content-Type", "text/plain")])
        yield b"first"
        raise SystemExit(1)

    def short(self, environ, start_response):
        start_response("200 OK", [("Content-Length", "10")])
        return [b"short"]


@dataclass
class Response:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def last(self):
        """Whether the server has said that it will close the connection."""
        return self.headers["Connection"] == "close"


class Client:
    """A connection that sends and reads bytes as given."""

    server = None

    def __init__(self, address, receive_buffer=None, *, slow=False):
        """`slow`: its handshake completes at its first bytes, or after 200 ms (TCP_QUICKACK, tcp(7); Linux)."""
        family = socket.AF_UNIX if address.path else socket.AF_INET6 if ":" in address.host else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_STREAM)
        self.socket.settimeout(PATIENCE)
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        if slow:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)
        try:
            self.socket.connect(address.path or (address.host, address.port))
        except OSError:
            self.socket.close()
            raise
        self.file = self.socket.makefile("rb")

    def send(self, *requests):
        """Send requests, given as paths or as bytes, in one piece."""
        self.socket.sendall(b"".join(each if isinstance(each, bytes) else get(each) for each in requests))
        return self

    def head(self):
        """Read a response up to its body; returns status and headers; raises errors of http.client."""
        line = self.file.readline()
        if not line:
            raise http.client.RemoteDisconnected
        return int(line.split()[1]), http.client.parse_headers(self.file)

    def response(self):
        """Read one response; raises an error of http.client if it is incomplete."""
        status, headers = self.head()
        if status in {100, 204, 304}:
            return Response(status, headers, b"")
        if headers["Transfer-Encoding"] == "chunked":
            body = b""
            while size := int(self._exactly(self.file.readline(), 3), 16):
                body += self._exactly(self.file.read(size + 2), size + 2)[:-2]
            self._exactly(self.file.readline(), 2)
            return Response(status, headers, body)
        length = int(headers["Content-Length"])
        return Response(status, headers, self._exactly(self.file.read(length), length))

    @staticmethod
    def _exactly(data, length):
        if len(data) < length:
            raise http.client.IncompleteRead(data)
        return data

    def ask(self, request):
        """Send a request, read its response, and wait until the server has counted it."""
        before = self.server.in_flight if self.server else 0
        response = self.send(request).response()
        while self.server and self.server.in_flight > before and self.server.turns(PATIENCE):
            pass
        return response

    def ended(self):
        """Whether the server closed the connection, with a FIN or a reset."""
        try:
            return self.file.read(1) == b""
        except ConnectionResetError:
            return True

    def reset(self):
        """Close the connection with a reset."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def close(self):
        self.file.close()
        self.socket.close()


def get(path, *headers, version="1.1", method="GET"):
    lines = [f"{method} {path} HTTP/{version}", *(["Host: test"] if version == "1.1" else []), *headers]
    return "\r\n".join([*lines, "", ""]).encode()


def post(path, body, *headers):
    return get(path, f"Content-Length: {len(body)}", *headers, method="POST") + body


def app_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("flaskd-thread-")]


def descriptors():
    gc.collect()
    return sorted(os.listdir("/proc/self/fd"))


def until(server, condition):
    """Wait until a condition is true for the server."""
    patience = time.monotonic() + PATIENCE
    while not condition():
        assert server.turns(PATIENCE)
        assert time.monotonic() < patience


@contextmanager
def draining(server, app, timeout=PATIENCE):
    """Drain in another thread; the block begins when the drain has begun, and gets its report as a Future.

    The app must have got a request before.
    """
    with ThreadPoolExecutor(1) as pool:
        report = pool.submit(server.drain, timeout)
        try:
            assert app.draining.wait(PATIENCE)
            assert server.turns(PATIENCE)  # by then it has closed its listeners
            yield report
        finally:
            app.released.set()


@contextmanager
def looks_at_the_gate():
    """Gives a function that waits until a server has looked twice for handshakes under way, or has found none.

    At the second look the least time behind the gate is over; on a busy machine a slow handshake may be over, too.
    """
    looked, before = queue.SimpleQueue(), Listener.handshakes

    def handshakes(self):
        count = before(self)
        looked.put(count)
        return count

    def looked_twice():
        if looked.get(timeout=PATIENCE) > 0:
            looked.get(timeout=PATIENCE)

    with mock.patch.object(Listener, "handshakes", handshakes):
        yield looked_twice


@pytest.fixture
def no_thread_left():
    before = set(threading.enumerate())
    yield
    gc.collect()
    assert set(threading.enumerate()) <= before


@pytest.fixture
def app():
    return App()


@pytest.fixture
def answers():
    """The records for the access log, in order."""
    return queue.SimpleQueue()


@pytest.fixture
def serve(app, answers):
    """Starts servers, and stops them at the end."""
    started = []

    def start(app=app, **options):
        server = WaitressThread(app, on_answer=answers.put, **options)
        started.append(server)
        return server.start()

    yield start
    app.released.set()
    for server in started:
        server.stop(PATIENCE)


@pytest.fixture
def connect():
    """Opens connections to a server, and closes them at the end."""
    clients = []

    def open_one(server, index=0, **options):
        clients.append(Client(server.addresses[index], **options))
        clients[-1].server = server
        return clients[-1]

    yield open_one
    for client in clients:
        client.close()
