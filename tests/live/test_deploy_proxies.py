"""The files in deploy/haproxy and deploy/nginx work with two real flaskds; only addresses are changed."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from daemon_kit import Flaskd, requires
from http_client import get, refused
from patience import PATIENCE, until
from systemd_kit import PROJECT, free_port

APP = """
import os
from flask import Flask, request

app = Flask(__name__)

@app.get("/")
def who():
    return f"{os.getpid()} for {request.remote_addr}"
"""
COMMANDS = {"haproxy": ["-db", "-f"], "nginx": ["-g", "daemon off; user root; error_log stderr;", "-c"]}


class Addresses:
    """Loopback addresses in place of network ones: each machine has its own, and all have the same ports."""

    def __init__(self) -> None:
        self.ports = {port: str(free_port()) for port in ("80", "8000", "9091")}
        self.url = f"http://127.0.0.1:{self.ports['80']}/"

    def local(self, path: str, machine: str = "0.0.0.0") -> str:
        """A file of deploy/ with these addresses; wildcard addresses become one machine's own."""
        text = (PROJECT / "deploy" / path).read_text().replace("0.0.0.0", machine)
        text = re.sub(r"192\.0\.2\.(\d+)", r"127.0.0.\1", text)
        return re.sub(r"(?<=[: ])(80|8000|9091)\b", lambda found: self.ports[found[1]], text)


@contextmanager
def running(path: str, addresses: Addresses, directory: Path) -> Iterator[None]:
    """The proxy with that file; it listens."""
    kind = path.partition("/")[0]
    requires(kind, [] if shutil.which(kind) else [kind])
    text = addresses.local(path)
    if kind == "nginx":
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        places = "".join(f"{each}_temp_path {directory}/{each};" for each in kinds)
        text = f"pid {directory}/pid;\n" + text.replace("http {\n", f"http {{ access_log off; {places}\n")
    configuration = directory / "proxy.conf"
    configuration.write_text(text)
    with (directory / "proxy.log").open("wb") as log:
        proxy = subprocess.Popen([kind, *COMMANDS[kind], str(configuration)], stdout=log, stderr=log)
    try:
        until(lambda: proxy.poll() is not None or not refused(addresses.url))
        assert proxy.poll() is None, (directory / "proxy.log").read_text()
        yield
    finally:
        proxy.terminate()
        proxy.wait(PATIENCE)


@pytest.mark.parametrize("path", ["haproxy/httpchk.cfg", "haproxy/agent.cfg", "nginx/nginx.conf"])
def test_one_of_two_is_drained_and_comes_back(path: str, make_flaskd: Callable[[], Flaskd], tmp_path: Path) -> None:
    """One of two is drained: every request is answered, by the other one before the announce ends; the app sees clients."""
    addresses = Addresses()
    both = [make_flaskd(), make_flaskd()]
    for each, machine in zip(both, ("127.0.0.11", "127.0.0.12"), strict=True):
        each.write("whoapp.py", APP)
        text = addresses.local(f"{path.partition('/')[0]}/flaskd.yaml", machine)
        each.write("flaskd.yaml", text.replace("announce: 3s", "announce: 6s"))  # longer, for a busy machine
        each.start(app="whoapp", listen=None)
    seen = []

    def answered_by(flaskd: Flaskd) -> bool:
        seen.append(get(addresses.url))
        return seen[-1] == (200, f"{flaskd.pid} for 127.0.0.1".encode())

    with running(path, addresses, tmp_path):
        for each in both:
            until(lambda each=each: answered_by(each))
        one, other = both
        if "haproxy" in path:
            assert one.command("drain").startswith("OK draining")
            until(lambda: [answered_by(other) for _ in range(10)] == [True] * 10)
            assert not refused(
                f"http://127.0.0.11:{addresses.ports['8000']}/"
            )  # HAProxy has noticed before the end of the announce
        else:
            assert one.command("drain wait").splitlines()[-1].startswith("OK drained")
            assert [answered_by(other) for _ in range(10)] == [True] * 10
        assert one.command("resume").startswith("OK ready")
        until(lambda: answered_by(one))
    assert {status for status, _ in seen} == {200}
    for each in both:
        each.client("stop", "--now")
        assert each.wait() == 0
