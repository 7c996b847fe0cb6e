"""Answers of every kind that an app may give, as a client reads them: RFC 9110, RFC 9112, PEP 3333."""

import errno
import io
import re
import socket
import sys
import threading

import pytest
from server_kit import BIG, PATIENCE, answers, app, connect, descriptors, draining, get, no_thread_left, serve, until
from waitress import wasyncore

from flaskd.config import ServerConfig
from flaskd.process.descriptors import open_files
from flaskd.server import BehindProxies, adjustments
from flaskd.server.poller import EpollMap
from flaskd.sockets import Address, Listener

pytestmark = pytest.mark.usefixtures("no_thread_left")


def raw(client):
    """Everything that the server sends until it ends the connection."""
    return client.file.read()


def split(answer):
    """Status line, headers by lower-case name, and what follows the header."""
    head, _, body = answer.partition(b"\r\n\r\n")
    line, *fields = head.decode("latin-1").split("\r\n")
    return line, {name.lower(): value for name, _, value in (field.partition(": ") for field in fields)}, body


def answering(status, headers, parts):
    """A WSGI app that gives one answer; `parts` returns its body, and is called with environ and write()."""

    def app(environ, start_response):
        if environ["PATH_INFO"] == "/next":
            start_response("200 OK", [("Content-Length", "4")])
            return [b"next"]
        write = start_response(status, headers)
        return parts(environ, write)

    return app


class Endless:
    """An iterable without end, which notes that it was closed."""

    def __init__(self):
        self.asked, self.closed = 0, threading.Event()

    def __iter__(self):
        return self

    def __next__(self):
        self.asked += 1
        return b"x" * 1000

    def close(self):
        self.closed.set()


def wrapped(environ, data):
    """`data` as a file, which the app gives to the server to send."""
    return environ["wsgi.file_wrapper"](io.BytesIO(data))


def written(write, *parts):
    """Use the callable that start_response gives (PEP 3333)."""
    for part in parts:
        write(part)
    return []


SHAPES = {
    "list": lambda environ, write: [b"hello"],
    "two parts": lambda environ, write: [b"he", b"llo"],
    "empty parts": lambda environ, write: [b"", b"hello", b""],
    "iterator": lambda environ, write: iter([b"he", b"llo"]),
    "write()": lambda environ, write: written(write, b"he", b"llo"),
    "file": lambda environ, write: wrapped(environ, b"hello"),
    "file without seek": lambda environ, write: environ["wsgi.file_wrapper"](io.BufferedReader(_Pipe(b"hello"))),
}


class _Pipe(io.RawIOBase):
    def __init__(self, data):
        self._data = data

    def readable(self):
        return True

    def readinto(self, room):
        part, self._data = self._data[: len(room)], self._data[len(room) :]
        room[: len(part)] = part
        return len(part)


# --- a body, whole -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("announced", [True, False], ids=["with a length", "without"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_body_arrives_whole_and_its_end_is_told(shape, announced, version, serve, connect):
    """A body ends by its Content-Length, by its last chunk or, in HTTP/1.0 without a length, with the connection."""
    app = answering("200 OK", [("Content-Length", "5")] if announced else [], SHAPES[shape])
    server = serve(app)
    line, headers, body = split(raw(connect(server).send(get("/", "Connection: close", version=version))))
    assert line == f"HTTP/{version} 200 OK"
    assert headers["connection"] == "close"
    if "transfer-encoding" in headers:
        assert (version, headers["transfer-encoding"], "content-length" in headers) == ("1.1", "chunked", False)
        assert re.fullmatch(rb"(?:[0-9A-F]+\r\n(?:he|llo|hello)\r\n)+0\r\n\r\n", body)
        assert re.sub(rb"[0-9A-F]+\r\n|\r\n", b"", body) == b"hello"
    else:
        assert body == b"hello"
        assert headers.get("content-length", "5") == "5"
        assert "content-length" in headers or version == "1.0"
    until(server, lambda: server.completed == 1)
    assert server.tally().outcomes == {"completed": 1, "rejected": 0, "cut": 0, "gone": 0}


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "file without seek"])
def test_a_connection_is_kept_behind_an_answer_of_known_length(shape, serve, connect):
    """Requests sent behind it are answered on the same connection, in HTTP/1.0 too if the client asked for that."""
    client = connect(serve(answering("200 OK", [("Content-Length", "5")], SHAPES[shape])))
    client.send("/", "/next")
    assert [client.response().body for _ in range(2)] == [b"hello", b"next"]
    old = get("/", "Connection: keep-alive", version="1.0")
    assert client.ask(old).headers["Connection"].lower() == "keep-alive"
    assert client.ask("/next").body == b"next"


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_longer_than_its_length_ends_there(shape, serve, connect):
    """No byte beyond the Content-Length is sent, which a client would take for the next answer."""
    client = connect(serve(answering("200 OK", [("Content-Length", "3")], SHAPES[shape]))).send("/", "/next")
    assert client.response().body == b"hel"
    assert client.response().body == b"next"


# --- no body, whatever the app gives -----------------------------------------------------------------------------------


@pytest.mark.parametrize("announced", [True, False], ids=["with a length", "without"])
@pytest.mark.parametrize("shape", SHAPES)
def test_head_is_answered_without_a_body(shape, announced, serve, connect):
    """An answer to HEAD has no body, which the client would take for the next answer (RFC 9110 §9.3.2)."""
    server = serve(answering("200 OK", [("Content-Length", "5")] if announced else [], SHAPES[shape]))
    client = connect(server).send(get("/", method="HEAD"), get("/next", "Connection: close"))
    first, _, rest = raw(client).partition(b"\r\n\r\n")
    assert first.startswith(b"HTTP/1.1 200 OK\r\n")
    assert split(rest)[0] == "HTTP/1.1 200 OK"
    assert split(rest)[2] == b"next"
    if announced or shape in {"list", "file"}:
        assert b"\r\nContent-Length: 5\r\n" in first


@pytest.mark.parametrize("path", ["/boom", "/nowhere", "/half", "/exit", "/short", "/file", "/big", "/chunks"])
def test_head_has_no_body_when_the_app_fails_either(path, serve, connect):
    """The answer to HEAD ends with its header, also when the app fails."""
    assert split(raw(connect(serve()).send(get(path, "Connection: close", method="HEAD"))))[2] == b""


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_head_and_refusals_of_the_server_itself(method, serve, connect):
    """Answers that flaskd gives without the app have a body for GET, and none for HEAD."""
    request = f"{method} / HTTP/1.1\r\n\r\n".encode()  # without Host
    line, headers, body = split(raw(connect(serve()).send(request)))
    assert line.startswith("HTTP/1.1 400 ")
    assert int(headers["content-length"]) > 0
    assert len(body) == (int(headers["content-length"]) if method == "GET" else 0)


@pytest.mark.parametrize(
    ("method", "status"), [("HEAD", "200 OK"), ("GET", "304 Not Modified"), ("GET", "204 No Content")]
)
def test_an_endless_body_that_nobody_may_see_is_not_asked_for(method, status, serve, connect):
    """The app's endless iterable is closed as soon as the header is sent."""
    body = Endless()
    client = connect(serve(answering(status, [], lambda environ, write: body)))
    client.send(get("/", "Connection: close", method=method))
    assert split(raw(client))[2] == b""
    assert body.closed.wait(PATIENCE)
    assert body.asked <= 1


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified", "100 Continue", "101 Switching Protocols"])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_answer_that_may_have_no_body_and_is_given_one_closes(shape, status, serve, connect):
    """Only the header is sent; it says that the connection ends, and requests sent behind it are not answered."""
    server = serve(answering(status, [("Content-Length", "5")], SHAPES[shape]))
    line, headers, body = split(raw(connect(server).send("/", "/next")))
    assert (line, headers["connection"], body) == (f"HTTP/1.1 {status}", "close", b"")
    assert "content-length" not in headers
    assert "transfer-encoding" not in headers


def test_a_final_1xx_closes(serve, connect):
    """After a 1xx answer the connection ends, because the client would wait for a final answer (RFC 9110 §15.2)."""
    client = connect(serve(answering("102 Processing", [], lambda environ, write: []))).send("/")
    assert raw(client).startswith(b"HTTP/1.1 102 Processing\r\nConnection: close\r\n")


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
def test_an_answer_without_a_body_keeps_its_connection(status, serve, connect):
    """The connection is kept after a 204 or 304 if the app gives no body."""
    client = connect(serve(answering(status, [], lambda environ, write: []))).send("/", "/next")
    assert client.response().headers["Connection"] is None
    assert client.response().body == b"next"


# --- short of its length -----------------------------------------------------------------------------------------------


def test_a_file_that_shrinks_while_it_is_sent(serve, connect, tmp_path, caplog, answers):
    """The connection ends at once, the log says why, the answer counts as cut, and the loop goes on."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * BIG)

    def app(environ, start_response):
        start_response("200 OK", [("Content-Length", str(BIG))])
        return environ["wsgi.file_wrapper"](path.open("rb"))

    server = serve(app)
    client = connect(server, receive_buffer=4096).send("/file?x")
    assert client.file.read(4096).startswith(b"HTTP/1.1 200 OK\r\n")
    path.write_bytes(b"")
    assert len(raw(client)) < BIG
    until(server, lambda: "cut GET" in caplog.text)
    assert server.tally().outcomes == {"completed": 0, "rejected": 0, "cut": 1, "gone": 0}
    assert re.search(r"cut GET /file \(.*\): its file ended \d+ bytes before", caplog.text)
    assert 0 < answers.get(timeout=PATIENCE)["bytes"] < BIG
    assert server.connections == 0


class _Bad(io.BytesIO):
    """A file that raises when it is read; `told` is the moment at which it does."""

    def __init__(self, error):
        super().__init__(b"x" * BIG)
        self._error = error

    def read(self, size=-1):
        if self.tell() > BIG // 2:
            raise self._error
        return super().read(size)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), ValueError("closed"), RuntimeError()])
def test_a_file_that_cannot_be_read_to_its_end(error, serve, connect, caplog):
    """Whatever error the file raises, the answer counts as cut, and the log says so."""

    def app(environ, start_response):
        start_response("200 OK", [])
        return environ["wsgi.file_wrapper"](_Bad(error))

    server = serve(app)
    assert len(raw(connect(server).send("/file"))) < BIG
    until(server, lambda: f": {str(error) or 'RuntimeError'}" in caplog.text)
    assert server.in_flight == 0
    assert server.tally().outcomes["cut"] == 1


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/short", "its answer is 5 bytes shorter than its Content-Length says"),
        ("/half", "the app broke off its answer"),
        ("/half_exit", "the app broke off its answer"),
    ],
)
@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_an_answer_that_the_app_leaves_short_is_cut(version, path, why, serve, connect, caplog):
    """The connection ends, the log names the request, and it does not count as completed."""
    server = serve()
    client = connect(server).send(get(path, "Connection: keep-alive", version=version), get("/", version=version))
    answer = raw(client)
    assert answer.count(b"HTTP/1.") == 1
    assert not answer.endswith(b"0\r\n\r\n")
    until(server, lambda: "cut GET" in caplog.text and server.in_flight == 0)
    assert server.tally().outcomes == {"completed": 0, "rejected": 0, "cut": 1, "gone": 1}
    assert re.search(rf"cut GET {path} \(.*\): {why}", caplog.text)


def test_an_app_that_fails_behind_its_whole_answer_has_answered(serve, connect):
    """The client has got all that was announced, so the request counts as completed."""

    def app(environ, start_response):
        start_response("200 OK", [("Content-Length", "5")])
        yield b"hello"
        raise LookupError("on purpose")

    server = serve(app)
    assert split(raw(connect(server).send("/")))[2] == b"hello"
    until(server, lambda: server.in_flight == 0)
    assert server.tally().outcomes["completed"] == 1


def test_a_short_answer_is_in_a_drains_account(serve, app, connect):
    """The account of a drain lists an answer that the app broke off."""
    gate, entered = threading.Event(), threading.Event()

    def short(environ, start_response):
        app.draining = environ["flaskd.draining"]
        start_response("200 OK", [("Content-Length", "9")])
        entered.set()
        gate.wait(PATIENCE)
        return [b"short"]

    server = serve(short)
    client = connect(server).send("/part")
    assert entered.wait(PATIENCE)
    with draining(server, app) as report:
        gate.set()
        raw(client)
        account = report.result(PATIENCE)
    assert [(each.path, each.reason) for each in account.cut] == [
        ("/part", "its answer is 4 bytes shorter than its Content-Length says")
    ]
    assert (account.completed, account.clean) == (0, False)


def test_a_client_that_leaves_is_not_cut(serve, app, connect):
    """A request whose client left does not count as cut."""
    server = serve()
    client = connect(server, receive_buffer=4096).send("/big")
    app.entered(1)
    client.reset()
    until(server, lambda: server.in_flight == 0)
    assert server.tally().outcomes["gone"] == 1


def test_a_client_to_whom_no_way_leads_is_not_cut(serve, app, connect, monkeypatch, caplog):
    """If send(2) reports an error of the network, the client counts as gone, and its connection is closed."""
    server = serve()

    def send(*_, **__):
        raise OSError(errno.EHOSTUNREACH, "No route to host")

    client = connect(server).send("/gate")
    app.entered(1)
    monkeypatch.setattr(socket.socket, "send", send)
    app.released.set()
    assert raw(client) == b""
    until(server, lambda: server.in_flight == 0)
    assert server.tally().outcomes["gone"] == 1
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


# --- what an app may not do --------------------------------------------------------------------------------------------


def _twice(environ, start_response):
    start_response("200 OK", [])
    start_response("200 OK", [])
    return []


def _again(environ, start_response):
    """PEP 3333: with exc_info, and nothing sent yet, a second call of start_response replaces the first."""
    start_response("200 OK", [("X-First", "1")])
    try:
        raise LookupError("on purpose")
    except LookupError as error:
        start_response("418 I'm a teapot", [("Content-Length", "0")], (type(error), error, error.__traceback__))
    return []


def _starting(status="200 OK", headers=()):
    def app(environ, start_response):
        start_response(status, list(headers))
        return [b"hello"]

    return app


BAD = {
    "no start_response": lambda environ, start_response: [b"hello"],
    "start_response twice": _twice,
    "a status that is no text": _starting(200),
    "a status with a line feed": _starting("200 OK\r\nX: y"),
    "a status that is none": _starting("odd"),
    "an empty status": _starting(""),
    "a status of four digits": _starting("2000 OK"),
    "a name that is no token": _starting(headers=[("A B", "y")]),
    "an empty name": _starting(headers=[("", "y")]),
    "a value with a NUL": _starting(headers=[("X", "a\0b")]),
    "a name that is no text": _starting(headers=[(b"X", "y")]),
    "a value that is no text": _starting(headers=[("X", 1)]),
    "a value with a line feed": _starting(headers=[("X", "a\nY: b")]),
    "a name with a carriage return": _starting(headers=[("X\rY", "a")]),
    "a value outside of latin-1": _starting(headers=[("X", "\u20ac")]),
    "a hop-by-hop header": _starting(headers=[("Connection", "close")]),
    "a transfer coding": _starting(headers=[("Transfer-Encoding", "chunked")]),
    "a length that is no number": _starting(headers=[("Content-Length", "five")]),
    "a negative length": _starting(headers=[("Content-Length", "-5")]),
    "a length with an underscore": _starting(headers=[("Content-Length", "5_0")]),
    "text instead of bytes": lambda environ, start_response: (start_response("200 OK", []), ["hello"])[1],
    "nothing": lambda environ, start_response: None,
}


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("broken", BAD.values(), ids=BAD)
def test_an_app_that_breaks_the_rules_is_a_500(broken, version, serve, connect, caplog):
    """Nothing of an answer that violates PEP 3333 is sent; the traceback is in the log, and not in the 500."""
    line, headers, body = split(raw(connect(serve(broken)).send(get("/", version=version))))
    assert line.startswith(f"HTTP/{version} 500 ")
    assert headers["connection"] == "close"
    assert int(headers["content-length"]) == len(body)
    assert b"Traceback" not in body
    assert "Traceback" in caplog.text


def test_an_app_may_change_its_mind_before_its_first_byte(serve, connect):
    """start_response with exc_info replaces status and headers (PEP 3333)."""
    response = connect(serve(_again)).ask("/")
    assert (response.status, response.headers["X-First"]) == (418, None)


def test_a_changed_mind_has_the_length_of_its_own(serve, connect):
    """start_response with exc_info also clears Content-Length, so the page of an error is not cut to the old one."""

    def app(environ, start_response):
        start_response("200 OK", [("Content-Length", "2")])
        try:
            raise LookupError("on purpose")
        except LookupError:
            start_response("500 Sorry", [("Content-Type", "text/plain")], sys.exc_info())
        return [b"a longer page"]

    client = connect(serve(app))
    for _ in range(2):
        response = client.ask("/")
        assert (response.status, response.body, response.last) == (500, b"a longer page", False)


def test_a_status_without_a_reason_has_its_blank(serve, connect):
    """RFC 9112 §4: a status line has the blank after its code even if the reason is empty."""
    assert split(raw(connect(serve(_starting("200"))).send(get("/", "Connection: close"))))[0] == "HTTP/1.1 200 "


@pytest.mark.parametrize("headers", [[], [("Content-Length", "10")]])
@pytest.mark.parametrize("kind", [bytearray, memoryview])
def test_parts_that_are_bytes_in_another_shape(kind, headers, serve, connect):
    """A bytearray or memoryview is sent as bytes, in chunks too."""

    def app(environ, start_response):
        start_response("200 OK", headers)
        return iter([kind(b"hello"), kind(b"world")])

    assert connect(serve(app)).ask("/").body == b"helloworld"


def test_a_304_may_tell_a_length(serve, connect, caplog):
    """A 304 may have a Content-Length (RFC 9110 §8.6): nothing is missing, and the connection is kept."""

    def app(environ, start_response):
        start_response("304 Not Modified", [("Content-Length", "10"), ("ETag", '"a"')])
        return []

    client = connect(serve(app))
    for _ in range(2):
        response = client.ask("/")
        assert (response.status, response.body, response.last) == (304, b"", False)
    assert not caplog.messages


def test_two_lengths_are_one(serve, connect):
    """If an app gives two Content-Lengths, the client sees one, and the body has that length."""
    app = _starting(headers=[("Content-Length", "5"), ("content-length", "3")])
    _, headers, body = split(raw(connect(serve(app)).send(get("/", "Connection: close"))))
    assert int(headers["content-length"]) == len(body)


# --- headers of the server's own ---------------------------------------------------------------------------------------


def test_date_and_server(serve, connect):
    """Every answer has a Date (RFC 9110 §5.6.7), and a Server unless the app sets one or none is configured."""
    response = connect(serve(_starting())).ask("/")
    date = r"\w{3}, \d{2} \w{3} \d{4} \d{2}:\d{2}:\d{2} GMT"
    assert re.fullmatch(date, response.headers["Date"])
    assert response.headers["Server"]
    assert connect(serve(_starting(), adjustments={"ident": None})).ask("/").headers["Server"] is None


def test_an_app_that_names_its_server_and_date_is_not_second_guessed(serve, connect):
    """As flaskd is no proxy, it adds no Via (RFC 9110 §7.6.3); Server and Date of the app are kept."""
    named = [("server", "mine"), ("date", "today")]
    headers = connect(serve(_starting(headers=named))).ask("/").headers
    assert (headers.get_all("Server"), headers.get_all("Date"), headers["Via"]) == (["mine"], ["today"], None)
    headers = connect(serve(_starting(headers=[*named, ("Via", "1.1 other")]))).ask("/").headers
    assert headers.get_all("Via") == ["1.1 other"]


def test_headers_of_one_name_stay_in_their_order(serve, connect):
    """Several Set-Cookie headers stay separate and in their order (RFC 9110 §5.3)."""
    cookies = [("Set-Cookie", "b=1"), ("X", "y"), ("set-cookie", "a=2")]
    assert connect(serve(_starting(headers=cookies))).ask("/").headers.get_all("Set-Cookie") == ["b=1", "a=2"]


# --- addresses --------------------------------------------------------------------------------------------------------


def environ_of(server, client, request=None):
    """The environ that the app got."""
    return dict(line.split("=", 1) for line in client.ask(request or get("/")).body.decode().splitlines())


def telling(environ, start_response):
    names = ("SERVER_NAME", "SERVER_PORT", "REMOTE_ADDR")
    body = "\n".join(f"{name}={environ[name]}" for name in names).encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]


@pytest.mark.parametrize(
    ("host", "name"), [("127.0.0.1", "127.0.0.1"), ("localhost", "localhost"), ("0.0.0.0", "127.0.0.1")]
)
def test_the_server_has_the_name_of_its_listener(host, name, serve, connect):
    """SERVER_NAME is the listener's host; for a wildcard address, it is the address to which the client connected."""
    server = serve(telling, listeners=[Listener.bind(Address(host))])
    client = connect_to(server, connect)
    told = environ_of(server, client)
    assert (told["SERVER_NAME"], told["SERVER_PORT"]) == (name, str(server.addresses[0].port))


def connect_to(server, connect):
    """Connect over 127.0.0.1 to the server's port."""
    server._addresses = [Address("127.0.0.1", server.addresses[0].port)]
    return connect(server)


def test_a_unix_listener_has_its_path_for_a_port(serve, connect, tmp_path):
    """SERVER_PORT is the socket's path, not the temporary name under which it was bound; after a resume, too."""
    path = str(tmp_path / "s")
    server = serve(telling, listeners=[Listener.bind(Address(path=path))])
    for _ in range(2):
        told = environ_of(server, connect(server))
        assert (told["SERVER_NAME"], told["SERVER_PORT"]) == ("localhost", path)
        server.drain()
        server.resume()


def test_a_name_that_was_given_stays(serve, connect):
    """A server_name in waitress' settings becomes SERVER_NAME."""
    server = serve(telling, adjustments={"server_name": "shop.test"})
    assert environ_of(server, connect(server))["SERVER_NAME"] == "shop.test"


def test_a_probe_has_a_name_too(serve):
    """A probe, which has no listener, has a SERVER_NAME too."""
    server = serve(telling, listeners=[Listener.bind(Address("0.0.0.0"))])
    assert server.probe("/", PATIENCE) == 200


PROXIED = {"trusted_proxy": "127.0.0.1", "trusted_proxy_headers": "x-forwarded-for"}


def serve_behind(serve, app, settings):
    """Serve the app with a configuration's proxies, as launch.py and embedded.py do."""
    server = ServerConfig.model_validate(settings)
    return serve(BehindProxies(app, server), adjustments=adjustments(server, open_files.limit()))


@pytest.mark.parametrize(
    ("settings", "header", "client"),
    [
        (PROXIED, "X-Forwarded-For: 192.0.2.7", "192.0.2.7"),
        (PROXIED, "X-Forwarded-For: 203.0.113.9, 192.0.2.7", "192.0.2.7"),
        (PROXIED | {"trusted_proxy_count": 2}, "X-Forwarded-For: 192.0.2.7, 10.0.0.1", "192.0.2.7"),
        (PROXIED | {"trusted_proxy": "*"}, "X-Forwarded-For: 2001:db8::1", "2001:db8::1"),
        (PROXIED | {"trusted_proxy": ["10.0.0.0/8", "127.0.0.0/8"]}, "X-Forwarded-For: 192.0.2.7", "192.0.2.7"),
        (PROXIED | {"trusted_proxy_headers": "forwarded"}, 'Forwarded: for="[2001:db8::1]:4711"', "2001:db8::1"),
        (PROXIED, "X-Other: 1", "127.0.0.1"),
        (PROXIED | {"trusted_proxy": "192.0.2.1"}, "X-Forwarded-For: 192.0.2.7", "127.0.0.1"),
        ({}, "X-Forwarded-For: 192.0.2.7", "127.0.0.1"),
    ],
)
def test_the_clients_address_is_what_a_trusted_proxy_says(settings, header, client, serve, connect, answers):
    """Access log and app get the same client address; a header from an untrusted peer is ignored."""
    server = serve_behind(serve, telling, settings)
    assert environ_of(server, connect(server), get("/", header))["REMOTE_ADDR"] == client
    assert answers.get(timeout=PATIENCE)["client"] == client


def test_requests_that_the_app_never_sees_have_their_clients_address_too(serve, app, connect, answers):
    """Refused requests, the health path, and requests in flight are shown with the client's address from the proxy."""
    server = serve_behind(serve, app, PROXIED)
    server.answer_health("/healthz", lambda: ("200 OK", "ready"))
    header = "X-Forwarded-For: 192.0.2.7"
    assert connect(server).ask(get("/healthz", header)).status == 200
    assert connect(server).send(f"GET / HTTP/1.1\r\n{header}\r\n\r\n".encode()).response().status == 400
    assert [answers.get(timeout=PATIENCE)["client"] for _ in range(2)] == ["192.0.2.7"] * 2
    connect(server).send(get("/gate", header))
    app.entered(1)
    assert [each.client for each in server.requests()] == ["192.0.2.7"]


def test_an_address_cannot_forge_a_line(serve, app, connect, answers):
    """A client's address from a proxy cannot forge a log line, even if the client made it up."""
    server = serve_behind(serve, app, PROXIED)
    connect(server).ask(get("/", 'X-Forwarded-For: a "b\xe9' + "c" * 1000))
    client = answers.get(timeout=PATIENCE)["client"]
    assert client.startswith('a%20"b%C3%A9ccc')
    assert len(client) < 200


# --- how much was sent -------------------------------------------------------------------------------------------------


def test_the_access_log_tells_what_was_sent(serve, app, connect, answers):
    """If the client leaves, the access log has the bytes that were sent, not the length that was announced."""
    server = serve()
    client = connect(server, receive_buffer=4096).send("/big")
    app.entered(1)
    client.file.read(1000)
    client.reset()
    assert 0 < answers.get(timeout=PATIENCE)["bytes"] < BIG


def test_the_access_log_tells_what_was_sent_before_a_cut(serve, app, connect, answers):
    """For a request that is cut at the deadline, the access log has the bytes that were sent before."""
    server = serve()
    client = connect(server).send("/stream")
    assert b"first" in client.file.read1()
    app.entered(1)
    assert server.drain(timeout=0.2).cut
    told = answers.get(timeout=PATIENCE)
    assert (told["status"], told["bytes"]) == (200, len(b"5\r\nfirst\r\n"))


# --- clients that leave ------------------------------------------------------------------------------------------------


def test_a_pipelining_client_that_leaves_leaves_nothing_in_the_log(serve, app, connect, caplog, monkeypatch):
    """The client leaves while its thread hands the connection on; the log has no error."""
    server = serve()
    real = EpollMap.expect

    def expect(self, channel):
        channel.requests_lock.release()  # a thread owns the connection; the loop does not wait for it
        try:
            server.loop.call(channel.handle_close)
            until(server, lambda: server.connections == 0)
        finally:
            channel.requests_lock.acquire()
        real(self, channel)

    monkeypatch.setattr(EpollMap, "expect", expect)
    assert connect(server).send("/", "/").response().body == b"hello"
    until(server, lambda: server.connections == 0)
    server.stop()
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.mark.parametrize("sent", [b"", b"GET / HT"], ids=["silent", "slow"])
def test_the_time_without_activity_is_kept(sent, serve, connect):
    """`channel_timeout` is kept to a tenth of it or a second, whatever waitress' interval is."""
    server = serve(adjustments={"channel_timeout": 1})
    loop = server.loop
    client = connect(server)
    client.send(sent)
    until(server, lambda: server.connections == 1)
    server.turns(PATIENCE)
    assert loop.connections.next_reaping - loop.last_turn <= 1
    assert client.ended()


def test_uploads_that_are_broken_off_leave_no_file(serve, connect):
    """The received part of an upload is freed when its connection closes, not only at garbage collection."""
    server = serve()
    before = descriptors()
    clients = [connect(server) for _ in range(3)]
    head = get("/echo", f"Content-Length: {BIG}", method="POST")
    for client in clients:
        client.send(head + b"x" * (BIG // 4))
    until(server, lambda: len(_files(server)) == 3)
    files = _files(server)
    for client in clients:
        client.reset()
    until(server, lambda: server.connections == 0)
    assert all(file.closed for file in files)
    for client in clients:
        client.close()
    assert descriptors() == before


def test_the_end_of_a_server_frees_what_had_come(serve, connect):
    """The end of a server without a drain also frees the received parts of uploads."""
    server = serve()
    connect(server).send(get("/echo", f"Content-Length: {BIG}", method="POST") + b"x" * (BIG // 4))
    until(server, lambda: len(_files(server)) == 1)
    files = _files(server)
    server.end()
    assert [file.closed for file in files] == [True]


def _files(server):
    arriving = [channel.arriving for channel in server.loop.connections.channels()]
    bodies = [request.body_rcv.getbuf() for request in arriving if request is not None and request.body_rcv]
    return [body.buf.file for body in bodies if body.overflowed]
