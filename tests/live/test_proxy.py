"""The configurations of docs/proxy.md with HAProxy and nginx, in front of two flaskds, which restart in turn."""

from __future__ import annotations

import collections
import http.client
import http.server
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from daemon_kit import Flaskd, requires
from http_client import get, refused
from patience import PATIENCE
from systemd_kit import PROJECT, free_port

APP = """
import os
from flask import Flask, request

app = Flask(__name__)

@app.get("/")
def who():
    return str(os.getpid())

@app.get("/admin")
def admin():
    return "admin"

@app.get("/client")
def client():
    return f"{request.remote_addr} {request.scheme}"
"""
FRAMES = {
    "haproxy": "{0}",
    "nginx": "user root;\npid {1}/pid;\nerror_log stderr;\nevents {{}}\nhttp {{\naccess_log off;\n"
    "client_body_temp_path {1}/a; proxy_temp_path {1}/b; fastcgi_temp_path {1}/c; uwsgi_temp_path {1}/d; "
    "scgi_temp_path {1}/e;\n{0}}}\n",
}
BEFORE = {"haproxy": "    default_backend", "nginx": "    location / {"}
"""The line of the configuration before which a rule for a path is inserted."""
COMMANDS = {"haproxy": ["-db", "-f"], "nginx": ["-g", "daemon off;", "-c"]}


def block(kind: str, ports: dict[str, int]) -> str:
    """The block of this kind in docs/proxy.md; `ports` maps its ports to free ones."""
    (text,) = re.findall(rf"```{kind}\n(.*?)```", (PROJECT / "docs/proxy.md").read_text(), re.DOTALL)
    for port, free in ports.items():
        text = re.sub(rf"127\.0\.0\.1:{port}\b", f"127.0.0.1:{free}", text)
    return text


def ask(port: int, path: str = "/", source: str = "127.0.0.1") -> str:
    """GET a path from the address `source`; return the status and the body.

    Many requests from another address than 127.0.0.1 would block their ports for sockets on all addresses for a minute.
    """
    with closing(http.client.HTTPConnection("127.0.0.1", port, PATIENCE, source_address=(source, 0))) as connection:
        connection.request("GET", path, headers={"X-Forwarded-For": "192.0.2.1"})
        response = connection.getresponse()
        return f"{response.status} {response.read().decode()}"


@contextmanager
def running(kind: str, ports: dict[str, int], directory: Path, rule: str = "") -> Iterator[None]:
    """Run the proxy with the configuration of docs/proxy.md and this rule for paths; it listens on entry."""
    requires(kind, [] if shutil.which(kind) else [kind])
    path = directory / "proxy.conf"
    configuration = block(kind, ports)
    assert configuration.count(BEFORE[kind]) == 1
    configuration = configuration.replace(BEFORE[kind], rule + BEFORE[kind])
    path.write_text(FRAMES[kind].format(configuration, directory))
    with (directory / "proxy.log").open("wb") as log:
        proxy = subprocess.Popen([kind, *COMMANDS[kind], str(path)], stdout=log, stderr=log)
    try:
        while refused(f"http://127.0.0.1:{ports['80']}"):
            assert proxy.poll() is None, (directory / "proxy.log").read_text()
            time.sleep(0.01)
        yield
    finally:
        proxy.terminate()
        proxy.wait(PATIENCE)


def test_haproxy_takes_the_other_ways_to_tell_it(tmp_path: Path) -> None:
    """HAProxy accepts the configuration with `agent-check` and `disable-on-404` as docs/proxy.md shows them."""
    requires("haproxy", [] if shutil.which("haproxy") else ["haproxy"])
    page = (PROJECT / "docs/proxy.md").read_text()
    [agent], [code] = (
        re.findall(rf"`({words}[^`]*)`", page) for words in ("agent-check agent-addr", "http-check disable")
    )
    configuration = block("haproxy", {}).replace("127.0.0.1:8001", f"127.0.0.1:8001 {agent}")
    configuration = configuration.replace("    default-server", f"    {code}\n    default-server")
    assert configuration.count(agent) == configuration.count(code) == 1
    (tmp_path / "proxy.conf").write_text(configuration)
    done = subprocess.run(["haproxy", "-c", "-f", tmp_path / "proxy.conf"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class Clients:
    """Three threads that send requests without a pause, and count the outcomes."""

    def __init__(self, port: int) -> None:
        self.outcomes: collections.Counter[str] = collections.Counter()
        self._port, self._ended, self._changed = port, threading.Event(), threading.Condition()
        self._threads = [threading.Thread(target=self._ask) for _ in range(3)]
        for each in self._threads:
            each.start()

    def _ask(self) -> None:
        while not self._ended.is_set():
            try:
                outcome = ask(self._port)
            except (OSError, http.client.HTTPException) as error:
                outcome = repr(error)
            with self._changed:
                self.outcomes[outcome] += 1
                self._changed.notify_all()

    def until_answered_by(self, flaskd: Flaskd) -> None:
        """Wait until the proxy has sent a request to this flaskd, and it has answered."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.outcomes[f"200 {flaskd.pid}"], PATIENCE), self.outcomes

    def end(self) -> None:
        """End the threads."""
        self._ended.set()
        for each in self._threads:
            each.join(PATIENCE)


@pytest.mark.parametrize("kind", ["haproxy", "nginx"])
def test_a_rolling_restart_behind_a_proxy_loses_nothing(
    kind: str, make_flaskd: Callable[[], Flaskd], tmp_path: Path
) -> None:
    """Two flaskds restart in turn under load, and every request is answered; the app sees the client's address."""
    ports = {port: free_port() for port in ("80", "8001", "8002")}
    both = [make_flaskd(), make_flaskd()]
    for each, port in zip(both, ("8001", "8002"), strict=True):
        each.write("whoapp.py", APP)
        each.write("flaskd.yaml", block("yaml", {"8001": ports[port]}))
        each.start(app="whoapp", listen=None)
    with running(kind, ports, tmp_path):
        assert ask(ports["80"], "/client", "127.0.0.2") == "200 127.0.0.2 http"
        clients = Clients(ports["80"])
        try:
            pids = {each.pid for each in both}
            for each in both:
                clients.until_answered_by(each)
            for each in both:
                assert each.stop() == 0
                each.messages.clear()
                each.start(app="whoapp", listen=None)
                clients.until_answered_by(each)
                pids.add(each.pid)
        finally:
            clients.end()
    assert set(clients.outcomes) == {f"200 {pid}" for pid in pids}, clients.outcomes
    for each in both:
        assert each.stop() == 0


class Backend(http.server.ThreadingHTTPServer):
    """A server that counts requests by method and answers 200; if `mute`, it answers the health check only."""

    def __init__(self, port: int, *, mute: bool = False) -> None:
        self.mute, self.got = mute, collections.Counter[str]()
        super().__init__(("127.0.0.1", port), _Reading)
        self.thread = threading.Thread(target=self.serve_forever)
        self.thread.start()

    def close(self) -> None:
        """Stop the server and its thread."""
        self.shutdown()
        self.server_close()
        self.thread.join(PATIENCE)


class _Reading(http.server.BaseHTTPRequestHandler):
    server: Backend

    def answer(self) -> None:
        """Read the request, then answer it, or close the connection if the server is mute."""
        if self.path != "/healthz":
            self.rfile.read(int(self.headers["Content-Length"] or 0))
            self.server.got[self.command] += 1
            if self.server.mute:
                return
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_POST = answer  # noqa: N815 - http.server's names

    def log_message(self, *_: object) -> None:
        """Write no access log."""


def tell(port: int, method: str) -> int:
    """Send one request to the proxy (a POST has a body); return the status."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, PATIENCE)) as connection:
        connection.request(method, "/", b"order=1" if method == "POST" else None)
        return connection.getresponse().status


@pytest.mark.parametrize("kind", ["haproxy", "nginx"])
def test_a_refused_connection_goes_elsewhere(kind: str, tmp_path: Path) -> None:
    """If one server refuses the connection, the other gets the request, also a POST: nothing was sent yet."""
    ports = {port: free_port() for port in ("80", "8001", "8002")}
    with closing(Backend(ports["8002"])) as well, running(kind, ports, tmp_path):
        assert [tell(ports["80"], "POST") for _ in range(6)] == [200] * 6
        assert well.got == {"POST": 6}


@pytest.mark.parametrize(("kind", "sent"), [("haproxy", {"GET": 1, "POST": 1}), ("nginx", {"GET": 2, "POST": 1})])
def test_what_was_sent_is_not_sent_again_unless_it_may_be(kind: str, sent: dict[str, int], tmp_path: Path) -> None:
    """A POST is not repeated when the server has read it and closed the connection: the app may have run it."""
    ports = {port: free_port() for port in ("80", "8001", "8002")}
    with (
        closing(Backend(ports["8001"], mute=True)) as one,
        closing(Backend(ports["8002"], mute=True)) as two,
        running(kind, ports, tmp_path),
    ):
        assert [tell(ports["80"], method) for method in sent] == [502, 502]
        assert one.got + two.got == sent


def test_a_proxy_on_a_unix_socket_is_localhost(flaskd: Flaskd) -> None:
    """On a Unix socket `trusted_proxy: localhost` trusts each client, and another address trusts none."""
    for trusted, seen in (("localhost", b"192.0.2.1 http"), ("127.0.0.1", b"localhost http")):
        flaskd.write("whoapp.py", APP)
        path = flaskd.directory / "http.sock"
        headers = "trusted_proxy_headers: [x-forwarded-for]"
        flaskd.write("flaskd.yaml", f"server: {{listen: 'unix:{path}', trusted_proxy: {trusted}, {headers}}}\n")
        flaskd.start(app="whoapp", listen=None)
        assert get(f"unix:{path}", "/client", **{"X-Forwarded-For": "192.0.2.1"}) == (200, seen)
        assert flaskd.stop() == 0


@pytest.mark.parametrize("kind", ["haproxy", "nginx"])
def test_a_rule_for_a_path_holds_however_it_is_written(
    kind: str, make_flaskd: Callable[[], Flaskd], tmp_path: Path
) -> None:
    """The rule of docs/proxy.md refuses each path that Flask routes to /admin, and lets the others through."""
    ports = {port: free_port() for port in ("80", "8001", "8002")}
    flaskd = make_flaskd()
    flaskd.write("whoapp.py", APP)
    flaskd.write("flaskd.yaml", block("yaml", {"8001": ports["8001"]}))
    flaskd.start(app="whoapp", listen=None)
    ways = ["/admin", "//admin", "///admin", "/%61dmin", "/%2Fadmin", "/%2f%2fadmin", "//%61dmin?q"]
    assert [ask(ports["8001"], way) for way in ways] == ["200 admin"] * len(ways)
    with running(kind, ports, tmp_path, block(f"{kind}-rule", {})):
        assert {ask(ports["80"], way)[:3] for way in ways} == {"403"}
        assert ask(ports["80"], "/client", "127.0.0.2") == "200 127.0.0.2 http"
