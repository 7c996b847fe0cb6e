"""The shutdown endpoint's rules over real connections, its token, and the requests that it waits for."""

import base64
import http.client
import io
import itertools
import json
import logging
import os
import queue
import socket
import stat
import threading
from urllib.request import urlopen

import flask
import flask.cli
import pytest
from http_client import ask
from patience import PATIENCE
from server_kit import Client, get, no_thread_left

import flaskd
from flaskd.admin import opened_by
from flaskd.admin.endpoint import shutdown as endpoint
from flaskd.admin.endpoint.requests import Requests
from flaskd.admin.endpoint.rules import EndpointRules
from flaskd.admin.endpoint.server import EndpointServer, usual_hosts
from flaskd.admin.endpoint.token import configured_token
from flaskd.errors import CannotCreateError, ConfigError
from flaskd.server import STREAM_GRACE
from flaskd.sockets import Address

TOKEN = b"G3bV6a0mKQ2yq4lN0b1rXw9sT8uJ5cHd7eFiZkPoLMU"
PLAN = {"plan": "0123456789ab", "steps": [{"name": "close-db"}], "in_flight": 3}


class Endpoint:
    """An endpoint with a plan, and a note of the clients that asked it for a stop."""

    def __init__(self, address="127.0.0.1:0", **more):
        self.asked = queue.SimpleQueue()
        plan = more.pop("plan", lambda: PLAN)
        self.server = EndpointServer(Address.parse(address), TOKEN, plan=plan, stop=self.asked.put, **more).open()
        self.address = self.server.address

    def ask(self, method="POST", path="/shutdown", body=b"{}", **headers):
        """Send one request with valid defaults; None leaves a header out."""
        usual = {
            "Host": str(self.address),
            "Authorization": f"Bearer {TOKEN.decode()}",
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
        }
        named = {**usual, **{name.replace("_", "-"): value for name, value in headers.items()}}
        lines = [
            f"{method} {path} HTTP/1.1",
            *(f"{name}: {value}" for name, value in named.items() if value is not None),
        ]
        client = Client(self.address)
        try:
            client.socket.sendall("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
            response = client.response()
            assert client.ended()
            return response
        finally:
            client.close()

    @property
    def stops(self):
        """Whether a client was allowed to ask for a stop."""
        return not self.asked.empty()


@pytest.fixture
def make(no_thread_left):
    made = []

    def open_one(*args, **more):
        made.append(Endpoint(*args, **more))
        return made[-1]

    yield open_one
    for each in made:
        each.server.close(1)


@pytest.fixture
def door(make):
    return make()


@pytest.fixture
def token_file(tmp_path):
    return flaskd.ShutdownEndpoint.make_token(tmp_path / "token")


# --- who may ask ---


def test_the_answer_comes_first_then_the_stop(make):
    """202 has the id and the steps of the plan; the stop begins after the answer was sent."""
    seen = []
    door = make(plan=lambda: seen.append(door.stops) or PLAN)
    response = door.ask()
    assert (response.status, json.loads(response.body)) == (202, PLAN)
    assert door.asked.get(timeout=PATIENCE) == "127.0.0.1"
    assert seen == [False]


def test_a_client_that_does_not_wait_is_obeyed_all_the_same(door):
    """The stop begins even if the client does not wait for the answer."""
    client = Client(door.address)
    client.send(
        get("/shutdown", f"Authorization: Bearer {TOKEN.decode()}", "Content-Type: application/json",
            "Content-Length: 0", method="POST").replace(b"Host: test", f"Host: {door.address}".encode())
    )  # fmt: skip
    client.close()
    assert door.asked.get(timeout=PATIENCE) == "127.0.0.1"


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_only_post_is_taken(door, method):
    """Every method but POST is 405, even with a token, and without CORS headers."""
    client = Client(door.address)
    client.send(get("/shutdown", f"Authorization: Bearer {TOKEN.decode()}", "Origin: http://x", method=method))
    status, headers = client.head()
    client.close()
    assert (status, headers["Allow"]) == (405, "POST")
    assert not any(name.lower().startswith("access-control") for name in headers)
    assert not door.stops


WRONG_TOKENS = [
    None,
    "",
    "Bearer",
    "Bearer ",
    f"Bearer {TOKEN.decode()[:-1]}",
    f"Bearer {TOKEN.decode()}x",
    f"Bearer {TOKEN.decode().lower()}",
    f"Basic {TOKEN.decode()}",
    TOKEN.decode(),
    "Bearer \xe9\xe9",
]


@pytest.mark.parametrize("given", WRONG_TOKENS)
def test_every_wrong_token_gets_the_same_answer(door, given):
    """No token, half a token, another scheme, no ASCII: all get the same 404 as any other path, to the byte."""
    there, elsewhere = door.ask(Authorization=given), door.ask(path="/nothing")
    for response in (there, elsewhere):
        del response.headers["Date"]
    assert there.status == 404
    assert (there.status, there.headers.items(), there.body) == (
        elsewhere.status,
        elsewhere.headers.items(),
        elsewhere.body,
    )
    assert not door.stops


@pytest.mark.parametrize("path", ["/", "/shutdown/", "/shutdown/x", "/Shutdown", f"/{TOKEN.decode()}"])
def test_other_paths_are_not_found(door, path):
    """Other paths are 404 even with the right token."""
    assert door.ask(path=path).status == 404
    assert not door.stops


@pytest.mark.parametrize("query", [f"token={TOKEN.decode()}", f"access_token={TOKEN.decode()}", "x"])
def test_nothing_is_taken_from_a_query_string(door, query):
    """A token there ends up in logs and histories; even beside the right header the request is refused."""
    assert door.ask(path=f"/shutdown?{query}", Authorization=None).status == 404
    assert door.ask(path=f"/shutdown?{query}").status == 404
    assert not door.stops


def test_two_tokens_are_none(door):
    """A request with two Authorization headers is refused."""
    assert door.ask(Authorization="Bearer x", authorization=f"Bearer {TOKEN.decode()}").status == 404


@pytest.mark.parametrize("scheme", ["bearer", "BEARER", "Bearer "])
def test_the_scheme_has_no_case(door, scheme):
    """The case of the scheme does not matter (RFC 9110 §11.1)."""
    assert door.ask(Authorization=f"{scheme} {TOKEN.decode()}").status == 202


@pytest.mark.parametrize("header", [{"Origin": "http://127.0.0.1"}, {"Origin": "null"}, {"Origin": ""},
                                    {"Sec_Fetch_Site": "same-origin"}, {"Sec_Fetch_Site": "none"}])  # fmt: skip
def test_what_a_browser_sends_is_refused(door, header):
    """A request with an Origin or Sec-Fetch-Site header is refused; without a token the answer is still 404."""
    response = door.ask(**header)
    assert (response.status, door.stops) == (403, False)
    assert json.loads(response.body)["error"].startswith("cannot stop: the request has a header ")
    assert door.ask(**header, Authorization="Bearer no").status == 404


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "localhost", "127.0.0.1:1", "localhost.evil.example:{port}",
                                  "evil.example:{port}", "localhost,x:{port}", "127.1:{port}"])  # fmt: skip
def test_only_names_on_the_list_are_its_own(door, host):
    """A Host that is not on the list is refused, however similar it is."""
    response = door.ask(Host=host.format(port=door.address.port))
    assert (response.status, door.stops) == (403, False)
    assert f"expected a Host header of 127.0.0.1:{door.address.port}, localhost:" in json.loads(response.body)["error"]


@pytest.mark.parametrize(
    "host", ["localhost:{port}.evil.example", "localhost:{port}, x", "user@localhost:{port}", "[::1"]
)
def test_what_is_no_name_is_refused_before(door, host):
    """A malformed Host is a 400 (RFC 9112 §3.2), which says nothing about the token."""
    response = door.ask(Host=host.format(port=door.address.port))
    assert (response.status, door.stops) == (400, False)


def test_names_can_be_allowed(make):
    """`allowed_hosts` replaces the usual names; case does not matter."""
    door = make(allowed_hosts=["shop.internal:9090"])
    assert door.ask(Host="Shop.Internal:9090").status == 202
    assert door.ask().status == 403


@pytest.mark.parametrize(
    ("address", "hosts"),
    [
        (Address("127.0.0.1", 9), ["127.0.0.1:9", "localhost:9"]),
        (Address("127.0.0.2", 9), ["127.0.0.1:9", "127.0.0.2:9", "localhost:9"]),
        (Address("localhost", 80), ["127.0.0.1:80", "localhost:80", "127.0.0.1", "localhost"]),
        (Address("::1", 9), ["[::1]:9", "localhost:9"]),
        (Address("0.0.0.0", 9), ["127.0.0.1:9", "localhost:9"]),
        (Address("::", 9), ["[::1]:9", "localhost:9"]),
        (Address("10.1.2.3", 9), ["10.1.2.3:9"]),
        (Address(path="/run/x.sock"), ["localhost"]),
    ],
)
def test_the_usual_names(address, hosts):
    """The usual names are the address, and this machine's local names if it listens on a local address."""
    assert usual_hosts(address) == hosts


@pytest.mark.parametrize("kind", [None, "", "text/plain", "application/x-www-form-urlencoded", "multipart/form-data",
                                  "text/plain; application/json", "application/jsonx"])  # fmt: skip
def test_only_json_is_taken(door, kind):
    """A content type that a form can send, or a page without a preflight, is refused."""
    response = door.ask(Content_Type=kind)
    assert (response.status, door.stops) == (415, False)


@pytest.mark.parametrize(("body", "status"), [(b"", 202), (b"{}", 202), (b"{}\n", 202), (b'{"now": true}', 400),
                                              (b"[]", 400), (b"{", 400), (b"x" * 1024, 400), (b"x" * 1025, 413)])  # fmt: skip
def test_the_body_asks_for_nothing(door, body, status):
    """A body with any content is refused, without a stop, and a large one is not read."""
    assert door.ask(body=body, Content_Type="application/json; charset=utf-8").status == status
    if status == 202:
        assert door.asked.get(timeout=PATIENCE)
    assert not door.stops


# --- limits ---


def ask_plainly(door, token, **more):
    """Call the rules as a WSGI server does; returns the status."""
    said = []
    body = door(
        {"REQUEST_METHOD": "POST", "PATH_INFO": "/shutdown", "HTTP_AUTHORIZATION": f"Bearer {token}", "HTTP_HOST": "here",
         "CONTENT_TYPE": "application/json", "wsgi.input": io.BytesIO(b"{}"), "REMOTE_ADDR": "10.0.0.7", **more},
        lambda status, headers: said.append(status),
    )  # fmt: skip
    assert b"".join(body)
    return said[0][:3]


def test_wrong_tokens_are_limited(caplog):
    """After ten wrong tokens no token is compared for a time, not even the right one; the answer stays the same."""
    now = [0.0]
    door = EndpointRules(TOKEN, ["here"], lambda: PLAN, clock=lambda: now[0])
    assert {ask_plainly(door, f"guess {i}") for i in range(10)} == {"404"}
    assert ask_plainly(door, TOKEN.decode()) == "404"
    now[0] += 1.0
    assert ask_plainly(door, TOKEN.decode()) == "202"
    assert ask_plainly(door, "guess") == "404"
    assert ask_plainly(door, TOKEN.decode()) == "404"
    now[0] += 3600
    assert [ask_plainly(door, TOKEN.decode()) for _ in range(20)] == ["202"] * 20
    assert "too many wrong tokens" in caplog.text


def test_other_refusals_do_not_lock_the_door():
    """Requests for other paths, with GET or without a token do not count as wrong tokens."""
    door = EndpointRules(TOKEN, ["here"], lambda: PLAN, clock=lambda: 0.0)
    for _ in range(50):
        assert ask_plainly(door, TOKEN.decode(), PATH_INFO="/x") == "404"
        assert ask_plainly(door, TOKEN.decode(), REQUEST_METHOD="GET") == "405"
        assert ask_plainly(door, "", HTTP_AUTHORIZATION="", HTTP_ORIGIN="http://evil.example") == "404"
    assert ask_plainly(door, TOKEN.decode()) == "202"


def test_refusals_are_logged_with_the_peer_and_never_the_token(caplog):
    """A limited number of log lines has the client's address and the reason, and nothing that it sent."""
    now = [0.0]
    door = EndpointRules(TOKEN, ["here"], lambda: PLAN, clock=lambda: now[0])
    secret = "S3cretS3cret"
    for _ in range(5):
        ask_plainly(door, secret)
        ask_plainly(door, TOKEN.decode(), PATH_INFO=f"/{secret}")
        ask_plainly(door, TOKEN.decode(), QUERY_STRING=secret)
        ask_plainly(door, TOKEN.decode(), HTTP_ORIGIN=secret)
        ask_plainly(door, TOKEN.decode(), HTTP_HOST=secret)
    assert len(caplog.records) == 20
    now[0] += 1.0
    ask_plainly(door, secret)
    assert caplog.messages[0] == "shutdown endpoint: refused 10.0.0.7: a wrong token"
    assert caplog.messages[-1] == "shutdown endpoint: refused 10.0.0.7: a wrong token (5 more were not logged)"
    assert secret not in caplog.text
    assert TOKEN.decode() not in caplog.text


def test_tokens_are_compared_in_constant_time(monkeypatch):
    """Tokens are compared as bytes with hmac.compare_digest, in constant time."""
    compared = []
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    door = EndpointRules(TOKEN, ["here"], lambda: PLAN)
    ask_plainly(door, "guess")
    ask_plainly(door, TOKEN.decode())
    assert compared == [(b"guess", TOKEN), (TOKEN, TOKEN)]


def test_a_slow_client_is_sent_away(make, monkeypatch):
    """A client that sends its request very slowly is disconnected after a limited time."""
    monkeypatch.setattr("flaskd.admin.endpoint.server._PATIENCE", 0.3)
    monkeypatch.setitem(endpoint.EndpointServer.open.__globals__["_LIMITS"], "cleanup_interval", 0.1)
    door = make()
    client = Client(door.address)
    client.socket.settimeout(0.02)
    drip = iter(b"\r\n" + b"POST /shutdown HTTP/1.1\r\n" * 10_000)
    ended = False
    while not ended:  # ends, because the bytes run out
        try:
            client.socket.sendall(bytes([next(drip)]))
            ended = client.socket.recv(1) == b""
        except TimeoutError:
            continue
        except OSError:
            ended = True
    client.close()
    assert door.ask().status == 202


def test_it_says_nothing_of_itself(door):
    """The answer has no Server header and does not mention the app."""
    assert door.ask(Authorization=None).headers["Server"] is None


def test_it_closes_with_the_last_answer_given(door):
    """`close` answers running requests and frees the address; a second call does nothing."""
    door.server.close(PATIENCE)
    door.server.close(PATIENCE)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((door.address.host, door.address.port))


def test_a_unix_socket_will_do(make, tmp_path):
    """On a Unix socket the Host is localhost, the mode keeps other users out, and `close` removes the node."""
    door = make(f"unix:{tmp_path}/s")
    assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o660
    assert door.ask(Host="localhost").status == 202
    assert door.ask(Host="127.0.0.1").status == 403
    assert door.asked.get(timeout=PATIENCE) == "unix"
    door.server.close(1)
    assert list(tmp_path.iterdir()) == []


# --- the token ---


def test_a_made_token_is_good(token_file):
    """A token that was made is new each time, readable by its owner alone, and can be read back."""
    assert stat.S_IMODE(token_file.stat().st_mode) == 0o600
    token = configured_token(token_file, None, {})
    assert len(base64.urlsafe_b64decode(token + b"=")) == 32
    assert token + b"\n" == token_file.read_bytes()
    other = flaskd.ShutdownEndpoint.make_token(token_file.with_name("other"))
    assert other.read_bytes() != token_file.read_bytes()


def test_a_made_token_replaces_nothing(token_file, tmp_path):
    """An existing file or link is not replaced; a missing directory is named."""
    before = token_file.read_bytes()
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    for path in (token_file, tmp_path / "link"):
        with pytest.raises(CannotCreateError, match=f'cannot make a token file: "{path}" exists; remove it'):
            flaskd.ShutdownEndpoint.make_token(path)
    with pytest.raises(CannotCreateError, match=r"cannot make a token file .*No such file"):
        flaskd.ShutdownEndpoint.make_token(tmp_path / "no" / "token")
    assert token_file.read_bytes() == before
    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o610, 0o601, 0o777])
def test_a_token_that_others_may_reach_is_refused(token_file, mode):
    """A token file with a mode wider than 0600 is refused, also behind a link."""
    token_file.chmod(mode)
    link = token_file.with_name("link")
    link.symlink_to(token_file)
    for path in (token_file, link):
        with pytest.raises(ConfigError, match=f"its mode is {mode:04o}, which lets others at it; expected 0600"):
            configured_token(path, None, {})


def test_a_link_to_a_good_token_is_followed(token_file):
    """A link is followed, and the opened file is checked; a mode narrower than 0600 is accepted."""
    token_file.chmod(0o400)
    link = token_file.with_name("link")
    link.symlink_to(token_file)
    assert configured_token(link, None, {}) == configured_token(token_file, None, {})


def test_a_token_of_somebody_else_is_refused(token_file, monkeypatch):
    """A token file of another user is refused, because its owner can change it."""
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(ConfigError, match=f"it belongs to uid {os.getuid()}, and flaskd runs as uid {os.getuid() + 1}"):
        configured_token(token_file, None, {})


def test_what_is_no_regular_file_is_refused(tmp_path):
    """A FIFO, a directory or a device is refused without waiting."""
    os.mkfifo(tmp_path / "fifo", 0o600)
    (tmp_path / "directory").mkdir(0o700)
    for path in (tmp_path / "fifo", tmp_path / "directory", "/dev/null"):
        with pytest.raises(ConfigError, match="it is not a regular file"):
            configured_token(path, None, {})


def test_a_missing_token_is_named_with_the_next_step(tmp_path):
    """The message about a missing token has the command that makes one."""
    with pytest.raises(ConfigError, match=r"No such file or directory; make one with: \(umask 077; head -c 32"):
        configured_token(tmp_path / "no", None, {})


@pytest.mark.parametrize("content", [b"", b"\n", b"changeme\n", b"a" * 64, b"ab" * 32, TOKEN[:42], TOKEN[:31].hex().encode(),
                                     TOKEN + b"\n" + TOKEN, TOKEN + b" x", b"\0" * 64, b"\xff" * 64, TOKEN * 200])  # fmt: skip
def test_what_is_no_secret_is_refused(tmp_path, content):
    """A token that is too short, a placeholder, on two lines, or with other characters is refused, and not shown."""
    path = tmp_path / "token"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=r"expected (at least 32 random bytes|one line of base64 or hex)") as caught:
        configured_token(path, None, {})
    assert "changeme" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        os.urandom(32).hex().encode(),
        base64.b64encode(os.urandom(32)),
        base64.urlsafe_b64encode(os.urandom(48)),
        TOKEN + b"\r\n",
    ],
    ids=["hex", "base64", "urlsafe base64", "with an end of line"],
)
def test_hex_and_base64_are_good(tmp_path, content):
    """Hex and base64 tokens are accepted, with padding or without, with a newline or without."""
    path = tmp_path / "token"
    path.write_bytes(content)
    path.chmod(0o600)
    assert configured_token(path, None, {}) == content.strip()


def test_a_credential_is_good(tmp_path):
    """A systemd credential is accepted with the mode that an access control list makes it show."""
    (tmp_path / "shutdown-token").write_bytes(TOKEN)
    (tmp_path / "shutdown-token").chmod(0o440)
    assert configured_token(None, "shutdown-token", {"CREDENTIALS_DIRECTORY": str(tmp_path)}) == TOKEN
    with pytest.raises(ConfigError, match=r'"shutdown-token": \$CREDENTIALS_DIRECTORY is not set; the unit needs'):
        configured_token(None, "shutdown-token", {})


@pytest.mark.parametrize("given", [{}, {"token_file": "x", "credential": "y"}])
def test_no_token_no_endpoint(given):
    """Without a token, or with two sources of one, no endpoint is opened."""
    stopper = flaskd.ShutdownEndpoint(flask_app(), listen="127.0.0.1:0", **given)
    with pytest.raises(ConfigError, match="it needs either a token file or a credential"):
        stopper.start()
    assert stopper.url is None


# --- in an app's own code ---


def flask_app():
    return flask.Flask("shop")


@pytest.mark.parametrize(
    "wrong",
    [
        {"listen": "nonsense"},
        {"listen": "127.0.0.1:0", "timeout": -1},
        {"listen": "127.0.0.1:0", "timeout": float("nan")},
        {"listen": "127.0.0.1:0", "timeout": float("inf")},
    ],
)
def test_a_wrong_argument_is_told_at_once(wrong):
    """A wrong argument raises when the endpoint is made, not when it is started."""
    with pytest.raises((ValueError, ConfigError), match="expected"):
        flaskd.ShutdownEndpoint(flask_app(), **wrong)


def test_under_a_daemon_it_is_the_daemons(token_file):
    """Under a daemon the endpoint is the daemon's, which counts the requests itself, so the app is not wrapped."""
    app, opened = flask_app(), []
    before = app.wsgi_app
    with opened_by(lambda *args: opened.append(args)):
        flaskd.ShutdownEndpoint(app, listen="127.0.0.1:0", token_file=token_file, allowed_hosts=["x"]).start()
    assert opened == [(Address("127.0.0.1", 0), configured_token(token_file, None, {}), ["x"])]
    assert app.wsgi_app == before


def test_a_daemon_that_starts_later_takes_it_over(token_file, no_thread_left):
    """A daemon that starts later takes over the address and unwraps the app; it may also refuse."""
    app, opened = flask_app(), []
    before = app.wsgi_app
    stopper = flaskd.ShutdownEndpoint(app, listen="127.0.0.1:0", token_file=token_file).start()
    address = address_of(stopper)
    with opened_by(lambda *args: opened.append(args)), pytest.raises(ConnectionRefusedError):
        socket.create_connection((address.host, address.port))
    assert opened == [(address, configured_token(token_file, None, {}), [])]
    assert app.wsgi_app == before

    def refuse(*_):
        raise ConfigError("in production")

    stopper.start()
    with pytest.raises(ConfigError, match="^in production$"), opened_by(refuse):
        pass
    assert stopper.url is None


@pytest.mark.parametrize("kind", ["waitress", "werkzeug"])
@pytest.mark.parametrize("first", ["endpoint", "server"])
def test_with_a_server_in_a_thread_it_is_the_servers(token_file, monkeypatch, no_thread_left, kind, first):
    """With a ServerThread, its stop answers requests and runs each function once; then the process is ended."""
    app, entered, ran, ended = flask_app(), threading.Event(), [], threading.Event()

    @app.get("/held")
    def held():
        entered.set()
        assert flask.request.environ["flaskd.draining"].wait(PATIENCE)
        return "answered"

    flaskd.on_stop(lambda context: ran.append(context.reason_text), app=app)
    monkeypatch.setattr(endpoint, "interrupt", ended.set)
    stopper = flaskd.ShutdownEndpoint(app, listen="127.0.0.1:0", token_file=token_file)
    server = flaskd.ServerThread(app, server=kind)
    for each in (stopper, server) if first == "endpoint" else (server, stopper):
        each.start()
    answers = []
    request = threading.Thread(target=lambda: answers.append(ask(server.url, "/held")))
    request.start()
    assert entered.wait(PATIENCE)
    told = json.loads(post(stopper, token_file))
    assert (told["in_flight"], [step["name"] for step in told["steps"]]) == (1, ["function"])
    server.join()
    assert ended.is_set()
    request.join()
    assert (answers, ran, stopper.url) == ([(200, b"answered")], ["endpoint: 127.0.0.1"], None)
    assert (server.stop().completed, ran) == (1, ["endpoint: 127.0.0.1"])


def test_a_stop_under_way_is_joined(token_file, monkeypatch, no_thread_left):
    """Asked while its server stops, the endpoint ends the process after that; nothing runs twice."""
    app, entered, released, ran, ended = flask_app(), threading.Event(), threading.Event(), [], threading.Event()

    @flaskd.on_stop(app=app)
    def close():
        ran.append("closed")
        entered.set()
        assert released.wait(PATIENCE)

    monkeypatch.setattr(endpoint, "interrupt", ended.set)
    stopper = flaskd.ShutdownEndpoint(app, listen="127.0.0.1:0", token_file=token_file).start()
    server, joined = flaskd.ServerThread(app).start(), queue.SimpleQueue()
    real = server.stop_for

    def stop_for(*given):
        joined.put(real(*given))
        return True

    monkeypatch.setattr(server, "stop_for", stop_for)
    stopping = threading.Thread(target=server.stop)
    stopping.start()
    assert entered.wait(PATIENCE)
    post(stopper, token_file)
    assert joined.get(timeout=PATIENCE)
    released.set()
    stopping.join()
    assert ended.wait(PATIENCE)
    assert ran == ["closed"]


def test_elsewhere_it_stops_the_process(token_file, monkeypatch, no_thread_left):
    """Elsewhere running requests are answered, new ones get a 503, the functions run, and then comes SIGINT."""
    app, entered, released, ended, ran = flask_app(), queue.SimpleQueue(), threading.Event(), threading.Event(), []

    @app.get("/held")
    def held():
        entered.put(flask.request.environ["flaskd.draining"])
        released.wait()
        return "answered"

    flaskd.on_stop(lambda: ran.append("closed"), app=app)
    monkeypatch.setattr(endpoint, "interrupt", ended.set)
    stopper = flaskd.ShutdownEndpoint(app, listen="127.0.0.1:0", token_file=token_file).start()
    assert stopper.url.endswith("/shutdown")
    with pytest.raises(flaskd.FlaskdError, match="is open"):
        stopper.start()
    answers = []
    request = threading.Thread(target=lambda: answers.append(app.test_client().get("/held", buffered=True).data))
    request.start()
    draining = entered.get(timeout=PATIENCE)
    first, second = (json.loads(post(stopper, token_file)) for _ in range(2))
    assert first == second
    assert (first["in_flight"], [step["name"] for step in first["steps"]]) == (1, ["function"])
    assert draining.wait(PATIENCE)
    refused = app.test_client().get("/held")
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")
    assert (ran, ended.is_set()) == ([], False)
    released.set()
    assert ended.wait(PATIENCE)
    request.join()
    assert (answers, ran, stopper.url) == ([b"answered"], ["closed"], None)


def address_of(stopper):
    """The address of a ShutdownEndpoint."""
    return Address.parse(stopper.url.removeprefix("http://").removesuffix("/shutdown"))


def post(stopper, token_file):
    """Ask a ShutdownEndpoint for the stop; returns the body of its 202."""
    headers = {"Authorization": f"Bearer {token_file.read_text().strip()}", "Content-Type": "application/json"}
    status, body = ask(str(address_of(stopper)), "/shutdown", "POST", b"{}", headers)
    assert status == 202
    return body


def test_a_stuck_request_does_not_keep_it(token_file, monkeypatch, caplog, no_thread_left):
    """After `timeout` seconds the process ends although a request runs, and the log names the request."""
    caplog.set_level(logging.INFO)
    app, entered, released, ended = flask_app(), threading.Event(), threading.Event(), threading.Event()

    @app.get("/stuck")
    def stuck():
        entered.set()
        released.wait()
        return ""

    monkeypatch.setattr(endpoint, "interrupt", ended.set)
    stopper = flaskd.ShutdownEndpoint(app, listen="127.0.0.1:0", token_file=token_file, timeout=0.5).start()
    request = threading.Thread(target=app.test_client().get, args=("/stuck",), kwargs={"buffered": True})
    request.start()
    assert entered.wait(PATIENCE)
    post(stopper, token_file)
    assert ended.wait(PATIENCE)
    assert "cut=1" in caplog.text
    assert "cut GET /stuck (running for" in caplog.text
    released.set()
    request.join()


def test_it_can_be_closed_without_a_stop(token_file, no_thread_left):
    """After `close` the address is free, and the endpoint can be opened again."""
    stopper = flaskd.ShutdownEndpoint(flask_app(), listen="127.0.0.1:0", token_file=token_file)
    stopper.close()
    for _ in range(2):
        stopper.start()
        assert stopper.url is not None
        stopper.close()
        assert stopper.url is None


def opens(app, token_file):
    """Whether an endpoint of the app opens in this process; it is closed again."""
    stopper = flaskd.ShutdownEndpoint(app, listen="127.0.0.1:0", token_file=token_file).start()
    opened = stopper.url is not None
    stopper.close()
    return opened


@pytest.mark.parametrize(
    ("argv", "environ", "serves"),
    [
        (["run"], {}, True),
        (["run", "--reload"], {}, False),
        (["run", "--reload"], {"WERKZEUG_RUN_MAIN": "true"}, True),
        (["--debug", "run"], {}, False),
        (["--debug", "run", "--no-reload"], {}, True),
        (["run", "--debug"], {"WERKZEUG_RUN_MAIN": "true"}, True),
        (["routes"], {}, False),
    ],
)
def test_it_opens_where_there_is_something_to_stop(monkeypatch, token_file, no_thread_left, argv, environ, serves):
    """It opens in `flask run` and in the reloader's child; not in the reloader's parent and in other Flask commands."""
    for name in ("FLASK_DEBUG", "WERKZEUG_RUN_MAIN", "FLASK_RUN_FROM_CLI"):
        monkeypatch.setenv(name, "")  # so that values set by the command line are undone
        monkeypatch.delenv(name)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("flask.cli.run_simple", lambda *args, **more: None, raising=False)
    monkeypatch.setattr("werkzeug.serving.run_simple", lambda *args, **more: None)
    found = []

    def create_app():
        app = flask_app()
        found.append(opens(app, token_file))
        return app

    group = flask.cli.FlaskGroup(create_app=create_app, set_debug_flag=True)
    group.main(argv, standalone_mode=False)
    assert found[:1] == [serves]


def test_outside_of_flasks_commands_it_opens(token_file, no_thread_left):
    """Outside of Flask's commands it always opens."""
    assert opens(flask_app(), token_file)


def test_a_request_is_over_when_its_answer_is_closed():
    """A stream is in flight to its end and notices the drain; if the app raises, the request is over."""
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/a\x1b", "SCRIPT_NAME": "", "REMOTE_ADDR": "10.0.0.7"}
    requests = Requests(lambda environ, start_response: iter([b"a", b"b"]))
    answer = requests(environ, None)
    assert requests.in_flight == 1
    report = requests.drain(0)
    assert environ["flaskd.draining"].is_set()
    [cut] = report.cut
    assert (cut.client, cut.method, cut.path, cut.reason) == ("10.0.0.7", "GET", "/a%1B", "the drain's time was over")
    answer.close()
    answer.close()
    assert (requests.in_flight, requests.drain(0).completed) == (0, 1)

    failing = Requests(lambda environ, start_response: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        failing(environ, None)
    assert failing.in_flight == 0


def test_a_stream_ends_in_the_drain():
    """A stream ends between two parts in a drain, and is closed; a response of known length is completed."""
    closed = []

    class Parts:
        def __iter__(self):
            return itertools.count()

        def close(self):
            closed.append(True)

    def app(environ, start_response):
        start_response("200 OK", [("Content-Type", environ["kind"])])
        return Parts() if environ["kind"] == "text/event-stream" else [b"1", b"2", b"3"]

    now = 0.0
    requests = Requests(app, clock=lambda: now)
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/"}
    stream = requests(environ | {"kind": "text/event-stream"}, lambda *_: None)
    page = requests(environ | {"kind": "text/plain"}, lambda *_: None)
    parts = [iter(stream), iter(page)]
    assert [next(each) for each in parts] == [0, b"1"]
    assert len(requests.drain(0).cut) == 2
    assert list(parts[1]) == [b"2", b"3"]
    assert next(parts[0]) == 1
    now = STREAM_GRACE
    assert list(parts[0]) == []
    stream.close()
    page.close()
    assert closed == [True]
    assert requests.in_flight == 0


def test_work_in_the_background_is_waited_for():
    """The app's drain waits for background work; what remains at the deadline makes it unclean."""
    requests = Requests(lambda environ, start_response: [])
    with flaskd.background("export"):
        [left] = requests.drain(0).background
    assert left.name == "export"
    reports = []
    with flaskd.background("export"):
        draining = threading.Thread(target=lambda: reports.append(requests.drain(PATIENCE)))
        draining.start()
        draining.join(0.2)
        assert draining.is_alive()
    draining.join()
    assert reports[0].clean


def test_closing_waits_for_no_work_in_the_background(door, caplog):
    """`close` does not wait for background work; the app's drain before it has waited for that."""
    with flaskd.background("export"):
        door.server.close(PATIENCE)
    assert "export" not in caplog.text
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((door.address.host, door.address.port))
